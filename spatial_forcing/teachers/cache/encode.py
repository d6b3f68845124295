"""Encodes frames with a teacher and writes them into the shards of a feature cache.

Shapes: n rows, V view, h x w teacher grid, C channels of the teacher, k channels stored.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spatial_forcing.alignment import Views
from spatial_forcing.data.geometry import common_frame, letterboxed
from spatial_forcing.errors import DataError
from spatial_forcing.protocols import Teacher
from spatial_forcing.teachers.cache.basis import Basis
from spatial_forcing.teachers.cache.format import CachedEpisode, CacheHeader, Shard, checksum, encode_rows
from spatial_forcing.teachers.cache.source import FrameSource, SourceEpisode, wanted_episodes

READ_AHEAD = 2
"""Batches of frames that are read while the teacher works."""


def read_views(
    source: FrameSource, indices: NDArray[np.int64], cameras: Sequence[str]
) -> tuple[Views, NDArray[np.bool_]]:
    """The frames `indices` and their (n, V) present views.

    Cameras of several sizes are letterboxed to one, as a student and its live teacher see them.
    """
    present = np.stack([source.present(indices, camera) for camera in cameras], axis=1)
    images = [source.images(indices, camera) for camera in cameras]
    frames = [torch.from_numpy(image).movedim(-1, 1) for image in images]
    sizes = {(frame.shape[-2], frame.shape[-1]) for frame in frames}
    valid = None
    if len(sizes) > 1:
        frames, pictures = zip(*(letterboxed(frame, common_frame(sizes)) for frame in frames), strict=True)  # type: ignore[assignment]
        valid = torch.stack(pictures).expand(len(indices), len(cameras), *common_frame(sizes))
    keys = torch.from_numpy(indices.astype(np.int64))
    views = Views.create(
        torch.stack(list(frames), 1), cameras, present=torch.from_numpy(present), valid=valid, keys=keys
    )
    return views, present


def spread_frames(source: FrameSource, count: int) -> NDArray[np.int64]:
    """At most `count` frame indices, spread evenly over the dataset."""
    every = np.concatenate([np.arange(e.first, e.first + e.length) for e in wanted_episodes(source)])
    return every[np.linspace(0, len(every) - 1, min(count, len(every))).astype(int)]


class Encoder:
    """Frames to features, with the frames of the next batches read ahead in a thread.

    Args:
        teacher, source: whose features of which frames.
        cameras, layers: ordered.
        batch_size: frames in one call of the teacher.
    """

    def __init__(
        self,
        teacher: Teacher,
        source: FrameSource,
        cameras: Sequence[str],
        layers: Sequence[int],
        batch_size: int,
    ) -> None:
        self.teacher, self.source = teacher, source
        self.cameras, self.layers, self.batch_size = cameras, layers, batch_size

    def batches(
        self, indices: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], Views, tuple[Tensor, ...]]]:
        """(indices, views, one (n, V, h, w, C) tensor a layer) of consecutive batches of `indices`.

        Raises:
            DataError: features that are not finite.
        """
        parts = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        with ThreadPoolExecutor(1, thread_name_prefix="cache-reader") as pool:
            waiting: list[Future[tuple[Views, NDArray[np.bool_]]]] = []
            try:
                for number, part in enumerate(parts):
                    for ahead in parts[number + len(waiting) : number + 1 + READ_AHEAD]:
                        waiting.append(pool.submit(read_views, self.source, ahead, self.cameras))
                    views, _ = waiting.pop(0).result()
                    features = self.teacher.features(views, self.layers)
                    self._check(part, features)
                    yield part, views, features
            finally:
                for future in waiting:
                    future.cancel()

    def _check(self, indices: NDArray[np.int64], features: Sequence[Tensor]) -> None:
        for layer, values in zip(self.layers, features, strict=True):
            if not bool(torch.isfinite(values).all()):
                raise DataError(
                    f"{self.teacher.name} gave features that are not finite in layer {layer} for frames "
                    f"{indices[0]} to {indices[-1]} of {self.source.identity}; check those frames and the "
                    "teacher's arithmetic type."
                )


class ShardWriter:
    """Writes shards of one cache.

    Args:
        encoder: what to write.
        header: of the cache.
        bases: by layer, where fewer channels are stored than the teacher has.
    """

    def __init__(self, encoder: Encoder, header: CacheHeader, bases: Mapping[int, Basis] | None) -> None:
        self.encoder, self.header, self.bases = encoder, header, bases

    def write(self, path: Path, episodes: Sequence[SourceEpisode], advance: Callable[[int], None]) -> None:
        """Write the rows beside `path`, rename, then write the record that makes them count."""
        indices = np.concatenate([np.arange(e.first, e.first + e.length) for e in episodes])
        crc = EpisodeChecksums([e.length for e in episodes])
        beside = path.with_suffix(".partial")
        try:
            with open(beside, "wb") as handle:
                for _, views, features in self.encoder.batches(indices):
                    rows = self._rows(views, features)
                    handle.write(rows.view(np.uint8).data)
                    crc.add(rows)
                    advance(len(rows))
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        starts = np.cumsum([0, *(e.length for e in episodes)])
        entries = tuple(
            CachedEpisode(e.episode, e.first, e.length, e.hash, int(row), value)
            for e, row, value in zip(episodes, starts[:-1], crc.values, strict=True)
        )
        Shard(path, len(indices), entries).save()

    def _rows(self, views: Views, features: Sequence[Tensor]) -> NDArray[Any]:
        present, layers = views.present.numpy(), self.header.layers
        stored = [self._stored(layer, f, views) for layer, f in zip(layers, features, strict=True)]
        expected = (*present.shape, *self.header.grid, self.header.channels)
        for layer, values in zip(layers, stored, strict=True):
            if tuple(values.shape) != expected:
                raise DataError(
                    f"{self.encoder.teacher.name} gave features of shape {tuple(values.shape)} in layer "
                    f"{layer}, and the cache holds {expected}; frames of one dataset must have one size."
                )
        return encode_rows(self.header, stored, present)

    def _stored(self, layer: int, features: Tensor, views: Views) -> Tensor:
        if self.bases is None:
            return features
        coordinates = self.bases[layer].project(features)
        absent = ~views.present.to(features.device)
        return coordinates.masked_fill_(absent[:, :, None, None, None], 0.0)


class EpisodeChecksums:
    """CRC-32 of consecutive episodes from batches of rows that do not follow their borders."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.values = [0] * len(lengths)
        self._stops = np.cumsum(lengths)
        self._row = 0

    def add(self, rows: NDArray[Any]) -> None:
        """Take the next rows."""
        start = 0
        while start < len(rows):
            episode = int(np.searchsorted(self._stops, self._row, side="right"))
            stop = min(len(rows), start + int(self._stops[episode]) - self._row)
            self.values[episode] = checksum(rows[start:stop], self.values[episode])
            self._row += stop - start
            start = stop
