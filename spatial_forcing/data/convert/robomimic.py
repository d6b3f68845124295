"""Demonstrations in robomimic's HDF5 layout (robomimic, MimicGen, robosuite, RoboCasa).

/data                     attribute `env_args`: JSON with the environment's name and settings
/data/<demo>/actions      (N, A)
/data/<demo>/obs/<key>    (N, ...); images are (N, H, W, 3) uint8 and end in `_image`
/mask/<filter key>        names of the demonstrations in a part, such as `train` and `valid`
"""

from __future__ import annotations

import json
import re
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
    demonstrations,
    episode_files,
    first_size,
    numbers,
    open_hdf5,
    rows_of,
    text_of,
    width_of,
)
from spatial_forcing.data.convert.sources import STILL, appended, column_names, joined, left_out, still
from spatial_forcing.data.episode import Frame
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.registry import unknown

IMAGE, DEPTH = "_image", "_depth"
STATE = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
PARTS = ("train", "valid")
FPS = 20


@dataclass(frozen=True)
class RobomimicConverter:
    """What is converted.

    Attributes:
        source: folder with the .hdf5 files, or one of them.
        output: folder of the dataset.
        task: instruction of every demonstration; default what it says itself (`ep_meta`), else the words of
            the environment's name.
        cameras: cameras to take and their new names, e.g. `agentview front`; default all of the first file.
        state: observations that make the state, in this order; default hand position, quaternion, fingers.
        append: further observations behind the state, e.g. `obs/robot0_joint_pos`.
        filter_key: convert the demonstrations of this part only; default all, first those of `train`, then of
            `valid`, which become splits of the dataset.
        fps: frames per second; default the environment's `control_freq`, else 20.
        image_size: height and width to resize to; default as recorded.
        depth: also write depth maps (`<camera>_depth`, metres).
        keep_still: keep demonstrations in which the state never changes.
        video: colour as mp4; without it as lossless PNG.
    """

    source: Path
    output: Path
    task: str | None = None
    cameras: Mapping[str, str] = field(default_factory=dict)
    state: tuple[str, ...] = STATE
    append: tuple[str, ...] = ()
    filter_key: str | None = None
    fps: int | None = None
    image_size: tuple[int, int] | None = None
    depth: bool = False
    keep_still: bool = False
    video: bool = False

    def __post_init__(self) -> None:
        if (self.fps is not None and self.fps < 1) or (self.image_size and min(self.image_size) < 1):
            raise ConfigError(f"fps is {self.fps}, image_size {self.image_size}; both must be positive.")
        if not self.state:
            raise ConfigError("state is empty; name the observations that make it.")
        if self.depth and self.image_size is not None:
            raise ConfigError("depth maps are those of the recorded frames; leave image_size out.")

    def schema(self) -> Schema:
        """Cameras and sizes of the first demonstration; the others must agree with it."""
        path = self._files()[0][0]
        with open_hdf5(path) as file:
            group = file["data"][demonstrations(file, path)[0]]
            cameras = self._cameras(group, path)
            arrays = arrays_of(group, len(_array(group, "actions", path)))
            names = [self._names(arrays, f"obs/{name}", path) for name in self.state]
            more = [column_names(name, width_of(arrays[name])) for name in self.append if name in arrays]
            taken = {"actions", "states", "rewards", "dones", *self.append}
            taken |= {f"obs/{name}" for name in self.state} | {f"obs/{key}{IMAGE}" for key in cameras}
            taken |= {f"obs/{key}{DEPTH}" for key in cameras} if self.depth else set()
            unused = {
                name: self._option(name)
                for name in arrays
                if name not in taken and not name.startswith("next_obs/")
            }
            return Schema(
                self.fps or _fps(file),
                {new: first_size(self._frames(group, key, path)) for key, new in cameras.items()},
                sum([*names, *more], ()),
                column_names("action", width_of(_array(group, "actions", path))),
                "robosuite",
                depth=self.depth,
                unused=unused,
            )

    def episodes(self) -> Sequence[SourceEpisode]:
        """Every demonstration, part by part.

        Raises:
            ConfigError: no file has the filter key.
            DataError: no file, or one that is damaged or has no demonstrations.
        """
        files, skipped = self._files()
        found: dict[str, list[SourceEpisode]] = {name: [] for name in PARTS}
        known: set[str] = set()
        for path in files:
            with open_hdf5(path) as file:
                masks = {key: _members(mask) for key, mask in (file.get("mask") or {}).items()}
                known |= set(masks)
                for name in demonstrations(file, path):
                    if self.filter_key is not None and name not in masks.get(self.filter_key, ()):
                        continue
                    part = next((key for key in PARTS if name in masks.get(key, ())), PARTS[0])
                    length = rows_of(file["data"][name], "actions")
                    label = f"{self._label(path)}/{name}"
                    episode = SourceEpisode(label, length, partial(self._read, path, name), split=part)
                    found[part].append(episode)
        if self.filter_key is not None and self.filter_key not in known:
            raise unknown("filter key", self.filter_key, known)
        episodes = [episode for part in PARTS for episode in found[part]]
        return episodes + [left_out(self._label(path), why) for path, why in skipped.items()]

    def _label(self, path: Path) -> str:
        return path.name if path == self.source else str(path.relative_to(self.source))

    def _files(self) -> tuple[list[Path], dict[Path, str]]:
        return ([self.source], {}) if self.source.is_file() else episode_files(self.source)

    def _cameras(self, group: Any, path: Path) -> dict[str, str]:
        there = [
            name.removesuffix(IMAGE)
            for name, array in (group.get("obs") or {}).items()
            if name.endswith(IMAGE) and getattr(array, "ndim", 0) == 4
        ]
        if not there:
            raise DataError(
                f"{path} has no images (obs/*{IMAGE}): extract them with robomimic's "
                "dataset_states_to_obs.py and --camera_names."
            )
        for camera in self.cameras:
            if camera not in there:
                raise unknown(f"camera of {path.name}", camera, there)
        return dict(self.cameras) or {name: name for name in there}

    def _frames(self, group: Any, camera: str, path: Path) -> Frames:
        return Frames(_array(group, f"obs/{camera}{IMAGE}", path), size=self.image_size)

    def _names(self, arrays: Mapping[str, Any], name: str, path: Path) -> tuple[str, ...]:
        if name not in arrays:
            there = ", ".join(key.removeprefix("obs/") for key in arrays if key.startswith("obs/"))
            raise ConfigError(f"{path.name} has no observation {name!r}; choose --state from {there}.")
        return column_names(name, width_of(arrays[name]))

    def _option(self, name: str) -> str:
        if name.endswith(IMAGE):
            camera = name.removeprefix("obs/").removesuffix(IMAGE)
            return f"--cameras ... {camera} {camera}"
        return "--depth" if name.endswith(DEPTH) else f"--append {name}"

    def _read(self, path: Path, name: str) -> Iterator[tuple[Frame, str]]:
        with open_hdf5(path) as file:
            group = file["data"][name]
            action = numbers(_array(group, "actions", path))
            if action.ndim != 2 or not len(action):
                raise DataError(f"its actions are {action.shape}; expected rows of numbers")
            arrays = arrays_of(group, len(action))
            first, *rest = appended(arrays, [f"obs/{key}" for key in self.state], len(action))
            state = joined(first, rest)
            if still(state) and not self.keep_still:
                raise EpisodeSkipped(STILL)
            state = joined(state, appended(arrays, self.append, len(action)))
            cameras = self._cameras(group, path)
            frames = {new: self._frames(group, key, path) for key, new in cameras.items()}
            depths = {
                new: _array(group, f"obs/{key}{DEPTH}", path) for key, new in cameras.items() if self.depth
            }
            lengths = {"actions": len(action), **{c: len(f) for c, f in {**frames, **depths}.items()}}
            if len(set(lengths.values())) != 1:
                raise DataError(f"its arrays have different lengths: {lengths}")
            task = self.task or _instruction(file, group)
            for i in range(len(action)):
                frame: dict[str, Any] = {
                    "images": {camera: images[i] for camera, images in frames.items()},
                    "state": state[i],
                    "action": action[i],
                }
                if depths:
                    frame["depth"] = {c: np.asarray(d[i], np.float32)[..., 0] for c, d in depths.items()}
                yield frame, task


def _array(group: Any, name: str, path: Path) -> Any:
    found = group.get(name)
    if not getattr(found, "ndim", 0):
        raise DataError(f"{path}, {group.name}: there is no array {name!r}; it is not a robomimic file.")
    return found


def _members(mask: Any) -> set[str]:
    return {name.decode() if isinstance(name, bytes) else str(name) for name in np.asarray(mask).ravel()}


def _env_args(file: Any) -> dict[str, Any]:
    try:
        found = json.loads(text_of(file["data"].attrs.get("env_args")) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _fps(file: Any) -> int:
    settings = _env_args(file).get("env_kwargs")
    rate = settings.get("control_freq") if isinstance(settings, dict) else None
    return int(rate) if isinstance(rate, (int, float)) and rate >= 1 else FPS


def _instruction(file: Any, group: Any) -> str:
    """The instruction in `ep_meta`, else the words of the environment's name.

    Raises:
        DataError: the file gives neither.
    """
    try:
        meta = json.loads(text_of(group.attrs.get("ep_meta")) or "{}")
    except ValueError:
        meta = {}
    if isinstance(meta, dict) and isinstance(meta.get("lang"), str) and meta["lang"].strip():
        return str(meta["lang"].strip())
    name = _env_args(file).get("env_name")
    if not isinstance(name, str) or not name:
        raise DataError("it does not say what the task is; give --task 'the instruction in words'")
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)).lower()
