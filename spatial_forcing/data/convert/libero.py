"""LIBERO's demonstrations (official HDF5 files, or RLDS TFRecords).

As OpenVLA prepares them: frames in which nothing happens are dropped; images are oriented in one place
(`libero_conventions`). With the simulator at hand HDF5 demonstrations can be played again at a higher
resolution, and those that then fail are left out, as the published "no_noops" data sets were made.

State: hand position, rotation as axis times angle, finger positions (8). Action: as recorded (7).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.data.convert import EpisodeSkipped, Schema, SourceEpisode
from spatial_forcing.data.convert.hdf5 import arrays_of, demonstrations, numbers, open_hdf5, rows_of, width_of
from spatial_forcing.data.convert.rlds import RLDSEpisode, read_episodes, tfrecord_files
from spatial_forcing.data.convert.sources import STILL, appended, column_names, joined, left_out, recordings
from spatial_forcing.data.episode import Frame
from spatial_forcing.envs.base import make_env
from spatial_forcing.envs.libero_conventions import Orientation, check_conventions, oriented
from spatial_forcing.envs.libero_setup import instruction_of, task_of_entry
from spatial_forcing.envs.robosuite_tasks import CAMERAS
from spatial_forcing.errors import ConfigError, DataError

FPS = 20
NO_OP_MOTION = 1e-4
STORED = {"agentview": "agentview_rgb", "robot0_eye_in_hand": "eye_in_hand_rgb"}
SUFFIX = "_demo.hdf5"
HDF5_TAKEN = {
    "actions", "states", "robot_states", "rewards", "dones", "obs/ee_states", "obs/ee_pos", "obs/ee_ori",
    "obs/gripper_states", *(f"obs/{name}" for name in STORED.values()),
}  # fmt: skip
"""Arrays of a demonstration that are read, or that repeat one that is."""
STATE_NAMES = (*"xyz", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_left", "finger_right")
ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")

Frames = Iterator[tuple[Frame, str]]


@dataclass(frozen=True)
class LiberoConverter:
    """What is converted.

    Attributes:
        source: folder of `<task>_demo.hdf5` files, or of TFRecord shards (at any depth).
        output: folder of the dataset.
        episodes_per_task: the first so many demonstrations of each file (shard); None: all.
        keep_no_ops: keep the frames in which the arm rests and the gripper stays.
        rerender: play the actions again in the simulator and record what it shows, at `image_size`;
            demonstrations that then fail are left out.
        image_size: pixels on a side when rendering again; stored images keep their size.
        orientation: of the images, "openvla" (mirrored, as in all published data) or "upright".
        video: colour as mp4; without it as lossless PNG.
        append: further arrays of a demonstration behind the state: `obs/joint_states` of the HDF5 files,
            `steps/observation/joint_state` of TFRecords.
    """

    source: Path
    output: Path
    episodes_per_task: int | None = None
    keep_no_ops: bool = False
    rerender: bool = False
    image_size: int = 256
    orientation: Orientation = "openvla"
    video: bool = False
    append: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rerender and self.append:
            raise ConfigError("append takes recorded arrays; the simulator gives none when it plays again.")
        check_conventions(self.orientation, "openvla")
        if self.image_size < 1 or (self.episodes_per_task is not None and self.episodes_per_task < 1):
            raise ConfigError("image_size and episodes_per_task must be at least 1.")

    def schema(self) -> Schema:
        """Sizes of the first demonstration's images, or those that are rendered again."""
        if self.rerender:
            cameras = dict.fromkeys(CAMERAS, (self.image_size, self.image_size))
        else:
            frame = self._first_frame()
            cameras = {name: image.shape[:2] for name, image in frame["images"].items()}
        more = self._appended_names()
        return Schema(FPS, cameras, STATE_NAMES + more, ACTION_NAMES, "LiberoEnv", unused=self._unused())

    def _first_frame(self) -> Frame:
        """The value of the first episode that has one; lists no more episodes than needed."""
        for source in self._sources():
            try:
                return next(iter(source.frames()))[0]
            except (EpisodeSkipped, StopIteration):
                continue
        raise DataError(f"{self.source} holds no demonstration in which the arm moves.")

    def episodes(self) -> Sequence[SourceEpisode]:
        """All HDF5 files of the folder, or, where it holds none, all TFRecord shards below it.

        Raises:
            ConfigError: TFRecords are to be rendered again (they hold no simulator states).
            DataError: no demonstrations there, or a file without the expected contents.
        """
        found = list(self._sources())
        skipped = {**recordings(self.source, f"*{SUFFIX}")[1], **tfrecord_files(self.source)[1]}
        return found + [left_out(str(path.relative_to(self.source)), why) for path, why in skipped.items()]

    def _sources(self) -> Iterator[SourceEpisode]:
        if files := self._files():
            player = _Player({"image_size": self.image_size, "orientation": self.orientation})
            for path in files:
                yield from self._of_hdf5(path, player)
            return
        shards = tfrecord_files(self.source)[0]
        if not shards:
            raise DataError(
                f"{self.source} holds neither *{SUFFIX} nor *.tfrecord* files; download a suite into it."
            )
        if self.rerender:
            raise ConfigError("TFRecords hold no simulator states to play again; convert the HDF5 files.")
        for path in shards:
            yield from self._of_shard(path)

    def _of_hdf5(self, path: Path, player: _Player) -> Iterator[SourceEpisode]:
        with open_hdf5(path) as file:
            for name in demonstrations(file, path)[: self.episodes_per_task]:
                length = rows_of(file["data"][name], "actions")
                yield SourceEpisode(f"{path.name}/{name}", length, partial(self._read, path, name, player))

    def _of_shard(self, path: Path) -> Iterator[SourceEpisode]:
        shard = _Shard(path)
        for number, episode in enumerate(islice(read_episodes(path), self.episodes_per_task)):
            name = f"{path.relative_to(self.source)}/{number}"
            yield SourceEpisode(name, len(episode.actions), partial(self._decode, shard, number))

    def _files(self) -> list[Path]:
        """The suite's HDF5 files, which lie in the folder itself."""
        return [path for path in recordings(self.source, f"*{SUFFIX}")[0] if path.parent == self.source]

    def _first_arrays(self) -> tuple[dict[str, Any], set[str]]:
        """Widths of the first demonstration's arrays of numbers, and which of them are taken or repeated."""
        if files := self._files():
            with open_hdf5(files[0]) as file:
                group = file["data"][demonstrations(file, files[0])[0]]
                arrays = arrays_of(group, rows_of(group, "actions"))
                return {name: width_of(array) for name, array in arrays.items()}, HDF5_TAKEN
        for shard in tfrecord_files(self.source)[0]:
            for episode in read_episodes(shard):
                return {name: values.shape[1] for name, values in episode.more.items()}, set()
        return {}, set()

    def _appended_names(self) -> tuple[str, ...]:
        widths, _ = self._first_arrays() if self.append else ({}, set())
        return sum((column_names(name, widths[name]) for name in self.append if name in widths), ())

    def _unused(self) -> dict[str, str]:
        if self.rerender:
            return {}
        widths, taken = self._first_arrays()
        return {name: f"--append {name}" for name in widths if name not in taken and name not in self.append}

    def _read(self, path: Path, name: str, player: _Player) -> Frames:
        with open_hdf5(path) as file:
            demonstration = _demonstration(path, name, file["data"][name], self.append)
        entry = path.name.removesuffix(SUFFIX)
        kept = np.flatnonzero(self._kept(demonstration.actions))
        if not len(kept):
            raise EpisodeSkipped(STILL)
        frames = (
            player.play(entry, demonstration, kept) if self.rerender else self._stored(demonstration, kept)
        )
        for frame in frames:
            yield frame, instruction_of(entry)

    def _stored(self, demonstration: Demonstration, kept: NDArray[np.intp]) -> Iterator[Frame]:
        for i in kept:
            # The simulator's images are upside down in the files.
            images = {c: oriented(s[i, ::-1], self.orientation) for c, s in demonstration.images.items()}
            yield {"images": images, "state": demonstration.states[i], "action": demonstration.actions[i]}

    def _decode(self, shard: _Shard, number: int) -> Frames:
        episode = shard.episode(number)
        turn = slice(None, None, 1 if self.orientation == "openvla" else -1)
        states = joined(episode.states, appended(episode.more, self.append, len(episode.actions)))
        kept = np.flatnonzero(self._kept(episode.actions)).tolist()
        if not kept:
            raise EpisodeSkipped(STILL)
        for i in kept:
            images = {camera: episode.image(camera, i)[:, turn] for camera in CAMERAS}
            yield {"images": images, "state": states[i], "action": episode.actions[i]}, episode.task

    def _kept(self, actions: NDArray[np.float32]) -> NDArray[np.bool_]:
        return np.ones(len(actions), bool) if self.keep_no_ops else moves(actions)


@dataclass(frozen=True)
class Demonstration:
    """One episode: `actions` (N, 7), `states` (N, 8 or more), `simulator` (N, S), images (N, H, W, 3)."""

    actions: NDArray[np.float32]
    states: NDArray[np.float32]
    simulator: NDArray[np.float64]
    images: dict[str, NDArray[np.uint8]]


class _Shard:
    """Episodes of one TFRecord file by number; going forward reads each of them once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next = 0
        self._episodes: Iterator[RLDSEpisode] = iter(())

    def episode(self, number: int) -> RLDSEpisode:
        if self._next == 0 or number < self._next:
            self._episodes, self._next = read_episodes(self._path), 0
        found = next(islice(self._episodes, number - self._next, None))
        self._next = number + 1
        return found


class _Player:
    """Plays demonstrations again; keeps one simulator, of the task that was asked for last."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._entry = ""
        self._env: Any = None

    def play(self, entry: str, demonstration: Demonstration, kept: NDArray[np.intp]) -> Iterator[Frame]:
        if entry != self._entry:
            if self._env is not None:
                self._env.close()
            self._env = make_env(task_of_entry(entry), cameras=CAMERAS, **self._settings)
            self._entry = entry
        observation = self._env.replay_from(demonstration.simulator[0])
        frames: list[Frame] = []
        for action in demonstration.actions[kept]:
            images, state = dict(observation["images"]), observation["state"]
            frames.append({"images": images, "state": state, "action": action})
            observation, _, success, truncated, _ = self._env.step(action)
            if success:
                return iter(frames)
            if truncated:
                break
        raise EpisodeSkipped("failed when played again")


def moves(actions: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which of the (N, 7) actions move the arm, or the gripper since the last one that did either."""
    kept = np.zeros(len(actions), bool)
    last: NDArray[np.float32] | None = None
    for i, action in enumerate(actions):
        still = float(np.linalg.norm(action[:-1])) < NO_OP_MOTION
        kept[i] = not (still and (last is None or action[-1] == last[-1]))
        if kept[i]:
            last = action
    return kept


def _demonstration(path: Path, name: str, group: Any, append: Sequence[str]) -> Demonstration:
    def read(key: str, ndim: int = 2) -> NDArray[Any]:
        if key not in group:
            raise DataError(f"{path}, {name}: {key!r} is missing; this is not a LIBERO demonstration file.")
        array = numbers(group[key], group[key].dtype)
        if array.ndim != ndim:
            raise DataError(f"{path}, {name}: {key!r} is {array.shape}; expected {ndim} dimensions.")
        return array

    actions: NDArray[np.float32] = read("actions").astype(np.float32)
    parts = [read("obs/ee_states"), read("obs/gripper_states")]
    images = {camera: read(f"obs/{key}", 4) for camera, key in STORED.items()}
    simulator = read("states").astype(np.float64)
    lengths = {len(actions), len(simulator), *map(len, parts), *map(len, images.values())}
    if len(lengths) != 1 or actions.shape[1:] != (7,) or sum(part.shape[1] for part in parts) != 8:
        raise DataError(
            f"{path}, {name}: actions {actions.shape}, states {[part.shape for part in parts]} and images of "
            f"{[len(stack) for stack in images.values()]} frames do not fit together; download it again."
        )
    states = np.concatenate(parts, axis=1).astype(np.float32)
    states = joined(states, appended(arrays_of(group, len(actions)), append, len(actions)))
    return Demonstration(actions, states, simulator, images)
