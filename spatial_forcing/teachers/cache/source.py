"""Where a feature cache gets its frames from: episodes with content hashes, and images by index."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.errors import DataError
from spatial_forcing.teachers.recorded import reads_depth

Indices = NDArray[np.int64]
Images = Callable[[Indices, str], NDArray[np.uint8]]
"""(absolute indices, camera) -> (n, H, W, 3) uint8."""


@dataclass(frozen=True, order=True)
class SourceEpisode:
    """One row of the episode table.

    Attributes:
        first: absolute index of its first frame.
        length: number of frames.
        episode: its number.
        hash: changes when the images do.
    """

    first: int
    length: int
    episode: int
    hash: str


class FrameSource(Protocol):
    """What `build_cache` reads."""

    @property
    def identity(self) -> str:
        """A name of the dataset for messages; content hashes decide whether it is the same."""
        ...

    @property
    def cameras(self) -> tuple[str, ...]:
        """The cameras there are."""
        ...

    @property
    def episodes(self) -> Sequence[SourceEpisode]:
        """The episode table."""
        ...

    @property
    def wanted(self) -> Collection[int] | None:
        """Numbers of the episodes that are encoded; None: all."""
        ...

    def images(self, indices: Indices, camera: str) -> NDArray[np.uint8]:
        """Frames, (n, H, W, 3) uint8; anything where the camera is absent."""
        ...

    def present(self, indices: Indices, camera: str) -> NDArray[np.bool_]:
        """(n,) bool: whether the camera was recorded in these frames."""
        ...


def wanted_episodes(source: FrameSource) -> list[SourceEpisode]:
    """The episodes of `source` that are encoded, in order of their frames."""
    return sorted(e for e in source.episodes if source.wanted is None or e.episode in source.wanted)


class DatasetLike(Protocol):
    """The part of `spatial_forcing.data.Dataset` that `dataset_source` uses."""

    @property
    def root(self) -> Any:
        """The dataset's folder."""
        ...

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of its cameras."""
        ...

    @property
    def episodes(self) -> Sequence[Any]:
        """Rows with `index`, `start` and `length`."""
        ...

    def image(self, index: int, camera: str) -> NDArray[np.uint8]:
        """One frame, (H, W, 3) uint8."""
        ...

    def content_hash(
        self, episode: int, cameras: Sequence[str] | None = None, *, geometry: bool = False
    ) -> str:
        """Digest of an episode's images and, with `geometry`, of their depth and poses."""
        ...


class DatasetSource:
    """A LeRobot dataset as `FrameSource`; every camera is present in every frame."""

    def __init__(
        self,
        dataset: DatasetLike,
        cameras: Sequence[str],
        images: Images | None,
        episodes: Sequence[int] | None = None,
        geometry: bool = False,
    ) -> None:
        self.identity = str(dataset.root)
        self.cameras = tuple(cameras)
        self.wanted = None if episodes is None else frozenset(episodes)
        self._dataset, self._images, self._geometry = dataset, images, geometry

    @cached_property
    def episodes(self) -> list[SourceEpisode]:
        """The episode table; hashes the content of every episode, once."""
        found = []
        for e in self._dataset.episodes:
            # An episode that is left out may be damaged.
            with nullcontext() if self.wanted is None or e.index in self.wanted else suppress(DataError):
                digest = self._dataset.content_hash(e.index, self.cameras, geometry=self._geometry)
                found.append(SourceEpisode(e.start, e.length, e.index, digest))
        return found

    def with_geometry(self) -> DatasetSource:
        """The same frames, of which depth and poses count as content, too."""
        wanted = None if self.wanted is None else sorted(self.wanted)
        return DatasetSource(self._dataset, self.cameras, self._images, wanted, geometry=True)

    def images(self, indices: Indices, camera: str) -> NDArray[np.uint8]:
        """Frames by absolute index, (n, H, W, 3) uint8."""
        if self._images is not None:
            return self._images(indices, camera)
        return np.stack([self._dataset.image(int(index), camera) for index in indices])

    def present(self, indices: Indices, camera: str) -> NDArray[np.bool_]:
        """All True, (n,)."""
        return np.ones(len(indices), dtype=bool)


def dataset_source(
    dataset: DatasetLike,
    cameras: Sequence[str] | None = None,
    images: Images | None = None,
    episodes: Sequence[int] | None = None,
) -> DatasetSource:
    """Read a cache's frames from `dataset`.

    Args:
        dataset: an opened `spatial_forcing.data.Dataset`.
        cameras: default all of them, in the dataset's order.
        images: a faster way to the same frames, such as `DecodedStore.build(dataset, cameras).images`.
        episodes: encode these only; a cache may hold others of the dataset as well. Default: all.
    """
    return DatasetSource(dataset, cameras if cameras is not None else dataset.cameras, images, episodes)


def source_of(teacher: str, source: FrameSource) -> FrameSource:
    """`source` with what a teacher of this name looks at as content: depth and poses for `recorded-depth`."""
    if reads_depth(teacher) and isinstance(source, DatasetSource):
        return source.with_geometry()
    return source
