"""Demonstrations of RoboTwin 2.0 (`data/TASK/CONFIG`: data/episodeN.hdf5, instructions/episodeN.json).

Files hold joint positions only: the action of a frame is the joint vector of the next one, so an episode of N
stored frames gives N - 1. RoboTwin encodes its RGB frames with OpenCV, which takes them for BGR: in the files
red and blue are exchanged, and they are put right here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.data.convert import EpisodeSkipped, Schema, SourceEpisode
from spatial_forcing.data.convert.aloha import names
from spatial_forcing.data.convert.hdf5 import (
    Frames,
    arrays_of,
    dataset,
    episode_files,
    first_size,
    numbers,
    open_hdf5,
    width_of,
)
from spatial_forcing.data.convert.sources import STILL, appended, column_names, joined, left_out, still
from spatial_forcing.data.episode import Frame
from spatial_forcing.data.info import DEPTH_UNITS_PER_METRE
from spatial_forcing.envs.robotwin import CAMERAS
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.registry import unknown

JOINTS, OBSERVATION = "joint_action/vector", "observation"
SAME = dict(zip(CAMERAS, CAMERAS, strict=True))


@dataclass(frozen=True)
class RoboTwinConverter:
    """What is converted.

    Attributes:
        source: RoboTwin's `data/TASK/CONFIG` (or a folder of several).
        output: folder of the dataset.
        cameras: cameras to take and their new names; default the head's and both wrists', under their own
            names.
        task: instruction of every episode; default one of the episode's own (`instructions/episodeN.json`).
        instructions: which of its own instructions may be taken, "seen" or "unseen".
        seed: of the choice among them.
        fps: frames per second to write down; RoboTwin stores every 15th physics step, not at an even rate.
        image_size: height and width to resize to; default as recorded.
        swap_colours: exchange red and blue, as RoboTwin's files need.
        geometry: also write intrinsics and extrinsics.
        depth: also write depth maps, where they were recorded.
        video: colour as mp4; without it as PNG.
        append: further arrays behind the state, e.g. `endpose/left_endpose endpose/left_gripper`.
        keep_still: keep episodes in which no joint moves.
    """

    source: Path
    output: Path
    cameras: Mapping[str, str] = field(default_factory=lambda: dict(SAME))
    task: str | None = None
    instructions: str = "seen"
    seed: int = 0
    fps: int = 25
    image_size: tuple[int, int] | None = None
    swap_colours: bool = True
    geometry: bool = False
    depth: bool = False
    video: bool = True
    append: tuple[str, ...] = ()
    keep_still: bool = False

    def __post_init__(self) -> None:
        if self.instructions not in ("seen", "unseen"):
            raise unknown("kind of instruction", self.instructions, ["seen", "unseen"])
        if self.fps < 1 or not self.cameras:
            raise ConfigError(f"fps is {self.fps}, cameras {dict(self.cameras)}; both are needed.")
        if self.image_size is not None and (self.geometry or self.depth):
            raise ConfigError("geometry and depth are those of the recorded frames; leave image_size out.")

    def schema(self) -> Schema:
        """Cameras and sizes of the first episode; the others must agree with it."""
        with open_hdf5(episode_files(self.source)[0][0]) as file:
            sizes = {new: first_size(self._frames(file, old)) for old, new in self.cameras.items()}
            joints = width_of(dataset(file, JOINTS))
            arrays = arrays_of(file, len(dataset(file, JOINTS)))
            more = sum((column_names(n, width_of(arrays[n])) for n in self.append if n in arrays), ())
            unused = {name: self._option(name) for name in arrays if not self._takes(name)}
            intrinsics = {
                new: numbers(dataset(file, f"{OBSERVATION}/{old}/intrinsic_cv"), np.float64)[0]
                for old, new in self.cameras.items()
                if self.geometry
            }
        joint_names = names(joints, "joint")
        return Schema(
            self.fps,
            sizes,
            joint_names + more,
            joint_names,
            "aloha-agilex",
            depth=self.depth,
            extrinsics=self.geometry,
            intrinsics=intrinsics or None,
            unused=unused,
        )

    def episodes(self) -> Sequence[SourceEpisode]:
        """One a file, a frame shorter than it."""
        found = []
        files, skipped = episode_files(self.source)
        for number, path in enumerate(files):
            with open_hdf5(path) as file:
                length = len(dataset(file, JOINTS)) - 1
            if length < 1:
                raise DataError(f"{path} has {length + 1} frames; an action needs two. Leave the file out.")
            name = str(path.relative_to(self.source))
            found.append(SourceEpisode(name, length, partial(self._read, path, number)))
        return found + [left_out(str(path.relative_to(self.source)), why) for path, why in skipped.items()]

    def _read(self, path: Path, number: int) -> Iterator[tuple[Frame, str]]:
        task = self.task or self._instruction(path, number)
        with open_hdf5(path) as file:
            joints = numbers(dataset(file, JOINTS))
            cameras = {new: self._frames(file, old) for old, new in self.cameras.items()}
            depths, poses = self._depths(file), self._poses(file)
            parts = {"joints": joints, **cameras, **{f"{c} depth": d for c, d in depths.items()}}
            lengths = {name: len(part) for name, part in parts.items()}
            if len(set(lengths.values())) != 1:
                raise DataError(f"its arrays have different lengths: {lengths}")
            if joints.ndim != 2:
                raise DataError(f"{JOINTS} is {joints.shape}; expected rows of numbers")
            if still(joints) and not self.keep_still:
                raise EpisodeSkipped(STILL)
            state = joined(joints, appended(arrays_of(file, len(joints)), self.append, len(joints)))
            for index in range(len(joints) - 1):
                frame: dict[str, Any] = {
                    "images": {camera: frames[index] for camera, frames in cameras.items()},
                    "state": state[index],
                    "action": joints[index + 1],
                }
                if depths:
                    millimetres = {c: np.asarray(depth[index], np.float32) for c, depth in depths.items()}
                    frame["depth"] = {c: d / DEPTH_UNITS_PER_METRE for c, d in millimetres.items()}
                if poses:
                    frame["extrinsics"] = {c: world_from_camera(pose[index]) for c, pose in poses.items()}
                yield frame, task

    def _takes(self, name: str) -> bool:
        """Whether a feature is made of the array `name`, or it repeats one that is taken."""
        wanted = ["rgb"] + ["depth"] * self.depth + ["extrinsic_cv", "intrinsic_cv"] * self.geometry
        cameras = {f"{OBSERVATION}/{camera}/{kind}" for camera in self.cameras for kind in wanted}
        return name in cameras or name in self.append or name.startswith("joint_action/")

    def _option(self, name: str) -> str:
        if not name.startswith(f"{OBSERVATION}/"):
            return "" if name == "pointcloud" or name.endswith("_rgb") else f"--append {name}"
        camera, _, kind = name.removeprefix(f"{OBSERVATION}/").partition("/")
        if kind == "rgb":
            return f"--cameras ... {camera} {camera}"
        return "--depth" if kind == "depth" else "--geometry"

    def _frames(self, file: Any, camera: str) -> Frames:
        there = sorted(file.get(OBSERVATION) or [])
        if camera not in there:
            raise unknown(f"camera of {Path(file.filename).name}", camera, there)
        array = dataset(file, f"{OBSERVATION}/{camera}/rgb")
        return Frames(array, swap=self.swap_colours and array.ndim != 4, size=self.image_size)

    def _depths(self, file: Any) -> dict[str, Any]:
        if not self.depth:
            return {}
        return {new: dataset(file, f"{OBSERVATION}/{old}/depth") for old, new in self.cameras.items()}

    def _poses(self, file: Any) -> dict[str, NDArray[np.float64]]:
        if not self.geometry:
            return {}
        return {
            new: numbers(dataset(file, f"{OBSERVATION}/{old}/extrinsic_cv"), np.float64)
            for old, new in self.cameras.items()
        }

    def _instruction(self, path: Path, number: int) -> str:
        """One of the episode's own instructions, drawn by (seed, episode)."""
        place = path.parent.parent / "instructions" / f"{path.stem}.json"
        try:
            texts = json.loads(place.read_text(encoding="utf-8"))[self.instructions]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{place} gives no {self.instructions!r} instructions ({error}); generate them with "
                "RoboTwin, or give --task 'the instruction in words'"
            ) from error
        if not texts:
            raise DataError(f"{place} has an empty list of {self.instructions!r} instructions; give --task")
        return str(texts[int(np.random.default_rng([self.seed, number]).integers(len(texts)))])


def world_from_camera(camera_from_world: NDArray[np.float64]) -> NDArray[np.float32]:
    """RoboTwin's `extrinsic_cv` (3, 4), OpenCV axes -> (4, 4) world from camera."""
    pose = np.eye(4)
    rotation, shift = camera_from_world[:3, :3], camera_from_world[:3, 3]
    pose[:3, :3], pose[:3, 3] = rotation.T, -rotation.T @ shift
    return pose.astype(np.float32)
