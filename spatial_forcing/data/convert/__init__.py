"""Converters from other formats to LeRobot v3.0. A new one is one file here and one `CONVERTERS` line.

A converter is a frozen dataclass: its fields are the settings (and the options of
`spatial-forcing data convert NAME`), its two methods say what the dataset looks like and give the episodes.
`convert` does the rest: disk estimate, writing, statistics, resuming after an interruption, the final check.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.data.episode import EncodedEpisode, Frame
from spatial_forcing.data.info import Feature
from spatial_forcing.registry import Registry


@dataclass(frozen=True)
class Schema:
    """What the dataset will hold.

    Attributes:
        fps: frames per second.
        cameras: camera -> (height, width) in pixels of the frames that will be written.
        state_names, action_names: one name a number of `observation.state` and `action`.
        robot_type: goes into `meta/info.json`.
        depth, extrinsics: whether frames bring `depth` and `extrinsics` (see `data.episode.Frame`).
        intrinsics: camera -> (3, 3) in pixels of the frames that will be written, where known.
        features: LeRobot's feature dictionary, where it has one; then only fps, cameras and
            robot_type of the fields above are looked at.
        unused: arrays of the source that no feature takes -> the option that takes them ("" where none does).
    """

    fps: int
    cameras: Mapping[str, tuple[int, int]]
    state_names: Sequence[str]
    action_names: Sequence[str]
    robot_type: str
    depth: bool = False
    extrinsics: bool = False
    intrinsics: Mapping[str, NDArray[np.floating[Any]]] | None = None
    features: Mapping[str, Feature] | None = None
    unused: Mapping[str, str] = field(default_factory=dict)


class EpisodeSkipped(Exception):
    """Raised by an episode's `frames`, before the first one, when the dataset is better without it."""


@dataclass(frozen=True)
class SourceEpisode:
    """One episode of the source, read only when it is converted.

    Attributes:
        name: identifies it in messages and across runs, e.g. its file relative to the source.
        length: frames.
        frames: reads it: (frame, instruction) pairs. Raises `DataError` when the source is damaged,
            `EpisodeSkipped` when the episode is to be left out.
        encoded: instead of `frames`: the episode as it will be written, where nothing has to be encoded
            again.
        split: the part of the dataset that it belongs to (`splits` in `meta/info.json`).
    """

    name: str
    length: int
    frames: Callable[[], Iterator[tuple[Frame, str]]] = lambda: iter(())
    encoded: Callable[[], EncodedEpisode] | None = None
    split: str = "train"


@runtime_checkable
class Converter(Protocol):
    """What a converter class provides."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # it is a dataclass

    @property
    def output(self) -> Path:
        """Folder of the dataset to write."""
        ...

    @property
    def video(self) -> bool:
        """Write colour as mp4 (small) instead of PNG (lossless)."""
        ...

    def schema(self) -> Schema:
        """What will be written. Raises `DataError` when the source is absent or inconsistent."""
        ...

    def episodes(self) -> Sequence[SourceEpisode]:
        """The episodes in the order in which they are written. Raises `DataError` when there is none."""
        ...


CONVERTERS: Registry[str] = Registry("converter")
"""Converter classes by name, as "module:class"; the module is imported when the converter is used."""
CONVERTERS.add("aloha", "spatial_forcing.data.convert.aloha:AlohaConverter")
CONVERTERS.add("lerobot-v2", "spatial_forcing.data.convert.lerobot_v2:LeRobotV2Converter")
CONVERTERS.add("libero", "spatial_forcing.data.convert.libero:LiberoConverter")
CONVERTERS.add("robomimic", "spatial_forcing.data.convert.robomimic:RobomimicConverter")
CONVERTERS.add("robotwin", "spatial_forcing.data.convert.robotwin:RoboTwinConverter")


def load_converter(name: str) -> type[Converter]:
    """The class of the converter `name`. Raises `ConfigError` for an unknown one (did you mean)."""
    module, _, cls = CONVERTERS[name].partition(":")
    found: type[Converter] = getattr(importlib.import_module(module), cls)
    return found


__all__ = ["CONVERTERS", "Converter", "EpisodeSkipped", "Schema", "SourceEpisode", "load_converter"]
