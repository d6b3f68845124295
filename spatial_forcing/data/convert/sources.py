"""What every converter does with a folder of recordings: their order, what is skipped and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.data.convert import EpisodeSkipped, SourceEpisode
from spatial_forcing.data.episode import Frame
from spatial_forcing.errors import ConfigError, DataError

STILL = "the robot never moves"


def natural(name: str) -> list[tuple[int, str]]:
    """Sorting key by which `demo_2` comes before `demo_10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def recordings(source: Path, pattern: str) -> tuple[list[Path], dict[Path, str]]:
    """Files below `source` in natural order, and those that are not recordings, with the reason.

    Hidden files are what other systems leave (`._episode_0.hdf5`), and TFDS builds in folders named
    `*.incomplete*`.

    Raises:
        DataError: no such folder.
    """
    if not source.is_dir():
        raise DataError(f"{source} is not a folder; give the one that holds the recordings ({pattern}).")
    files: list[Path] = []
    left_out: dict[Path, str] = {}
    for path in sorted(source.rglob(pattern), key=lambda path: natural(str(path.relative_to(source)))):
        parts = path.relative_to(source).parts
        if not path.is_file():
            continue
        if any(part.startswith(".") for part in parts):
            left_out[path] = "a hidden file"
        elif any(".incomplete" in part for part in parts):
            left_out[path] = "in the folder of an interrupted download"
        else:
            files.append(path)
    return files, left_out


def left_out(name: str, reason: str) -> SourceEpisode:
    """An episode that is counted and not converted."""
    return SourceEpisode(name, 0, partial(_skip, reason))


def _skip(reason: str) -> Iterator[tuple[Frame, str]]:
    raise EpisodeSkipped(reason)


def still(state: NDArray[Any]) -> bool:
    """Whether (N, D) states of several frames never change."""
    return len(state) > 1 and not np.ptp(state, axis=0).any()


def appended(arrays: Mapping[str, Any], names: Sequence[str], length: int) -> list[NDArray[np.float32]]:
    """The arrays `names` of a recording, (length, n) each.

    Raises:
        ConfigError: one is not there; lists those that are.
        DataError: one has no row for each frame, or is not an array of numbers.
    """
    found = []
    for name in names:
        if name not in arrays:
            there = ", ".join(arrays) or "none"
            raise ConfigError(f"--append: there is no array {name!r}; there are {there}.")
        try:
            values = np.asarray(arrays[name], np.float32)
        except (TypeError, ValueError) as error:
            raise DataError(f"--append: {name!r} holds no numbers ({error})") from error
        if len(values) != length:
            raise DataError(f"--append: {name!r} has {len(values)} rows for {length} frames")
        found.append(values.reshape(length, -1))
    return found


def column_names(name: str, width: int) -> tuple[str, ...]:
    """A name for each number of an array that is appended."""
    last = name.rpartition("/")[2]
    return (last,) if width == 1 else tuple(f"{last}_{i}" for i in range(width))


def joined(first: NDArray[Any], more: Iterable[NDArray[Any]]) -> NDArray[np.float32]:
    """(N, D) with the columns of `more` behind its own."""
    return np.concatenate([np.asarray(first, np.float32), *more], axis=1)
