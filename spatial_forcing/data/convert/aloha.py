"""Recordings of ALOHA and AgileX robots: one HDF5 file an episode, as ACT's `record_episodes` writes it.

    /observations/qpos            (N, 14) joint positions: left arm 6, gripper, right arm 6, gripper
    /observations/images/<name>   (N, H, W, 3) uint8, or N JPEG / PNG images
    /action                       (N, 14) absolute joint positions that were commanded

Encoded images are taken for ordinary ones (their file says what is red); raw frames for RGB. `--swap-colours`
is for recordings where that is not so: look at one converted frame before training.
"""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spatial_forcing.data.convert import EpisodeSkipped, Schema, SourceEpisode
from spatial_forcing.data.convert.hdf5 import (
    Frames,
    arrays_of,
    dataset,
    episode_files,
    first_size,
    numbers,
    open_hdf5,
    text_of,
    width_of,
)
from spatial_forcing.data.convert.sources import STILL, appended, column_names, joined, left_out, still
from spatial_forcing.data.episode import Frame
from spatial_forcing.data.info import DEPTH_UNITS_PER_METRE
from spatial_forcing.envs.aloha import JOINTS
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.registry import unknown

STATE, ACTION, IMAGES = "observations/qpos", "action", "observations/images"
DEPTHS = "observations/images_depth"
INSTRUCTION_KEYS = ("task", "instruction", "language_instruction", "language_raw")
INSTRUCTION_FILES = ("instructions.json", "instruction.json", "expanded_instruction_gpt-4-turbo.json")
FROZEN = 0.5
"""A camera that repeats its picture in more than this fraction of the steps is reported."""
SHORT = 0.25
"""An episode shorter than this fraction of the median is reported."""


@dataclass(frozen=True)
class AlohaConverter:
    """What is converted.

    Attributes:
        source: folder with the .hdf5 episodes, sub-folders included.
        output: folder of the dataset.
        task: instruction of every episode; default what the files say (an attribute or array `task` or
            `instruction`, or an instructions.json beside them).
        cameras: cameras to take and their new names, e.g. `cam_high top`; default all, under their own names.
        fps: frames per second of the recording: 50 for ALOHA, 30 for AgileX as usually set up.
        image_size: height and width to resize to; default as recorded.
        swap_colours: exchange red and blue.
        video: colour as mp4; without it as PNG, lossless and some ten times larger.
        append: further arrays, e.g. `base_action observations/qvel`: those below `observations` go behind the
            state, others behind the action.
        depth: also write the depth maps of the cameras, /observations/images_depth/<name> in millimetres.
        keep_still: keep episodes in which no joint moves.
    """

    source: Path
    output: Path
    task: str | None = None
    cameras: Mapping[str, str] = field(default_factory=dict)
    fps: int = 50
    image_size: tuple[int, int] | None = None
    swap_colours: bool = False
    video: bool = True
    append: tuple[str, ...] = ()
    depth: bool = False
    keep_still: bool = False

    def __post_init__(self) -> None:
        if self.fps < 1 or (self.image_size and min(self.image_size) < 1):
            raise ConfigError(f"fps is {self.fps}, image_size {self.image_size}; both must be positive.")

    def schema(self) -> Schema:
        """Cameras and sizes of the first episode; the others must agree with it."""
        with open_hdf5(episode_files(self.source)[0][0]) as file:
            cameras = {name: first_size(self._frames(file, key)) for key, name in self._cameras(file).items()}
            state, action = (width_of(dataset(file, key)) for key in (STATE, ACTION))
            arrays = arrays_of(file, len(dataset(file, ACTION)))
            widths = {name: width_of(arrays[name]) for name in self.append if name in arrays}
            more = [
                sum((column_names(n, w) for n, w in widths.items() if _observed(n) == observed), ())
                for observed in (True, False)
            ]
            unused = {name: self._option(name) for name in arrays if not self._takes(file, name)}
        return Schema(
            self.fps,
            cameras,
            names(state, "state") + more[0],
            names(action, "action") + more[1],
            "aloha",
            depth=self.depth,
            unused=unused,
        )

    def episodes(self) -> Sequence[SourceEpisode]:
        """One a file; reports files that are much shorter than the others."""
        found = []
        files, skipped = episode_files(self.source)
        for path in files:
            with open_hdf5(path) as file:
                length = len(dataset(file, ACTION))
            name = str(path.relative_to(self.source))
            found.append(SourceEpisode(name, length, partial(self._read, path, name)))
        median = statistics.median(episode.length for episode in found)
        for episode in found:
            if episode.length < SHORT * median:
                _report(
                    episode.name, f"has {episode.length} frames, the median is {median:g}; was it cut off?"
                )
        return found + [left_out(str(path.relative_to(self.source)), why) for path, why in skipped.items()]

    def _read(self, path: Path, name: str) -> Iterator[tuple[Frame, str]]:
        with open_hdf5(path) as file:
            state, action = (numbers(dataset(file, key)) for key in (STATE, ACTION))
            task = self.task or instruction(file, path, self.source)
            cameras = {new: self._frames(file, key) for key, new in self._cameras(file).items()}
            lengths = {STATE: len(state), ACTION: len(action), **{c: len(f) for c, f in cameras.items()}}
            if len(set(lengths.values())) != 1:
                raise DataError(f"its arrays have different lengths: {lengths}")
            if state.ndim != 2 or action.ndim != 2:
                raise DataError(
                    f"{STATE} is {state.shape} and {ACTION} {action.shape}; expected rows of numbers"
                )
            if still(state) and not self.keep_still:
                raise EpisodeSkipped(STILL)
            arrays = arrays_of(file, len(state))
            parts = dict(zip(self.append, appended(arrays, self.append, len(state)), strict=True))
            state = joined(state, (part for key, part in parts.items() if _observed(key)))
            action = joined(action, (part for key, part in parts.items() if not _observed(key)))
            depths = self._depths(file)
            repeats = dict.fromkeys(cameras, 0)
            before: dict[str, bytes] = {}
            for index in range(len(state)):
                images = {camera: frames[index] for camera, frames in cameras.items()}
                for camera, frames in cameras.items():
                    stored = frames.stored(index)
                    repeats[camera] += before.get(camera) == stored
                    before[camera] = stored
                frame: dict[str, Any] = {"images": images, "state": state[index], "action": action[index]}
                if depths:
                    millimetres = {c: np.asarray(d[index], np.float32) for c, d in depths.items()}
                    frame["depth"] = {c: d / DEPTH_UNITS_PER_METRE for c, d in millimetres.items()}
                yield frame, task
        for camera, count in repeats.items():
            if count > FROZEN * len(state):
                _report(name, f"camera {camera!r} repeats its picture in {count} of {len(state)} steps")

    def _cameras(self, file: Any) -> dict[str, str]:
        """Name in the file -> name in the dataset."""
        group = file.get(IMAGES)
        there = sorted(group) if group is not None else []
        if not there:
            raise DataError(f"{Path(file.filename).name} has no camera under /{IMAGES}")
        for camera in self.cameras:
            if camera not in there:
                raise unknown(f"camera of {Path(file.filename).name}", camera, there)
        return dict(self.cameras) or {name: name for name in there}

    def _depths(self, file: Any) -> dict[str, Any]:
        if not self.depth:
            return {}
        return {new: dataset(file, f"{DEPTHS}/{key}") for key, new in self._cameras(file).items()}

    def _takes(self, file: Any, name: str) -> bool:
        """Whether a feature is made of the array `name`."""
        images = {f"{IMAGES}/{key}" for key in self._cameras(file)}
        maps = {f"{DEPTHS}/{key}" for key in self._cameras(file)} if self.depth else set()
        return name in {STATE, ACTION, *self.append, *images, *maps, *INSTRUCTION_KEYS}

    def _option(self, name: str) -> str:
        folder, _, camera = name.rpartition("/")
        if folder == IMAGES:
            return f"--cameras {camera} {camera}"
        return "--depth" if folder == DEPTHS else f"--append {name}"

    def _frames(self, file: Any, camera: str) -> Frames:
        array = dataset(file, f"{IMAGES}/{camera}")
        return Frames(array, swap=self.swap_colours, size=self.image_size)


def _observed(name: str) -> bool:
    return name.startswith("observations/")


def names(dim: int, kind: str) -> tuple[str, ...]:
    """The joints' names for 14 numbers, else numbered ones."""
    return JOINTS if dim == len(JOINTS) else tuple(f"{kind}_{i}" for i in range(dim))


def instruction(file: Any, path: Path, source: Path) -> str:
    """The instruction, from the episode or from a file in its folder.

    Raises:
        DataError: neither gives an instruction.
    """
    for key in INSTRUCTION_KEYS:
        if found := text_of(file.attrs.get(key)) or text_of(file.get(key)):
            return found
    folders = [folder for folder in path.parents if folder == source or source in folder.parents]
    for folder in folders:
        for name in INSTRUCTION_FILES:
            if (folder / name).is_file() and (found := _from_json(folder / name)):
                return found
    raise DataError("it does not say what the task is; give --task 'the instruction in words'")


def _from_json(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error})") from error
    if isinstance(content, dict):
        content = next((content[key] for key in (*INSTRUCTION_KEYS, "instructions") if key in content), None)
    if isinstance(content, list):
        content = content[0] if content else None
    return content.strip() or None if isinstance(content, str) else None


def _report(episode: str, what: str) -> None:
    warnings.warn(f"episode {episode}: {what}", stacklevel=2)
