"""Builds a feature cache: resumable, only what is new, one builder a folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.protocols import Teacher
from spatial_forcing.storage import disk_full_explained, exclusive, progress_bar, require_disk
from spatial_forcing.teachers.cache_format import (
    DTYPES,
    HEADER,
    CachedEpisode,
    CacheDtype,
    CacheHeader,
    Shard,
    TeacherFacts,
    checksum,
    encode_rows,
    read_shards,
)
from spatial_forcing.teachers.cache_source import FrameSource, SourceEpisode
from spatial_forcing.teachers.vggt.aggregator import resolve_layers
from spatial_forcing.views import Views

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 * 2**20
"""A shard closes at the first episode that reaches this size; an interruption loses at most one shard."""
KEPT = "completed shards are kept"
FIDELITY_FRAMES = 32
LOW_FIDELITY = 0.95
"""Cosine after mean removal below which a build warns."""


def build_cache(
    teacher: Teacher,
    source: FrameSource,
    folder: str | Path,
    *,
    layers: Sequence[int] = (-1,),
    cameras: Sequence[str] | None = None,
    dtype: CacheDtype = "bf16",
    batch_size: int = 8,
    replace_changed: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Encode every frame of `source` that `folder` does not hold yet, and measure the fidelity.

    Interrupted at any moment, the same call goes on where it stopped. A dataset that has grown adds its
    new episodes only.

    Args:
        teacher: encodes all views of a frame together.
        source: the frames; see `dataset_source`.
        folder: made if it does not exist.
        layers: of the teacher, 0-based, negative from the end.
        cameras: ordered; default the source's. A cache serves exactly this tuple.
        dtype: "bf16", or "int8" with one scale a token.
        batch_size: frames a call of the teacher.
        replace_changed: build changed episodes again instead of refusing.
        shard_bytes: size at which a shard is closed.
        progress: show a bar with the time left on stderr.

    Returns:
        The folder.

    Raises:
        ConfigError: unknown camera, dtype or layer.
        DataError: the folder holds the cache of another teacher, camera tuple, layers, dtype or dataset
            (both are named), episodes have changed (named), cameras differ in frame size.
        EnvironmentSetupError: not enough disk space (nothing was written), the disk filled up (completed
            shards are kept), another process is building here.
    """
    folder = Path(folder)
    names = tuple(source.cameras if cameras is None else cameras)
    _check_settings(source, names, dtype, batch_size)
    wanted = tuple(dict.fromkeys(resolve_layers(layers, teacher.depth)))
    with exclusive(folder, wait=False, doing="building a cache"), disk_full_explained(folder, KEPT):
        header = _header(teacher, source, folder, cameras=names, layers=wanted, dtype=dtype)
        shards = _drop_changed(folder, header, source, read_shards(folder), replace_changed)
        plan = _missing(source, shards)
        rows = sum(episode.length for episode in plan)
        require_disk(folder, rows * header.row.itemsize, "the cache", "cache fewer layers or use int8")
        if plan:
            header = replace(header, fidelity=None, fidelity_frames=0)
        header.save(folder)
        _sweep(folder, shards)
        builder = _Builder(teacher, source, header, batch_size)
        with progress_bar(progress and rows > 0) as bar:
            task = bar.add_task(f"caching {teacher.name}", total=rows)
            for number, group in _groups(plan, header, shards, shard_bytes):
                builder.write_shard(folder / f"shard-{number:05d}.bin", group, lambda n: bar.advance(task, n))
        if plan or not header.fidelity:
            builder.measure_fidelity(folder)
    return folder


def _check_settings(source: FrameSource, names: tuple[str, ...], dtype: str, batch_size: int) -> None:
    unknown = [name for name in names if name not in source.cameras]
    if unknown or not names or len(set(names)) != len(names):
        raise ConfigError(
            f"cameras are {names}; {source.identity} has {tuple(source.cameras)}. "
            "Name one or more of them, each once."
        )
    if dtype not in DTYPES:
        raise ConfigError(f"cache dtype is {dtype!r}; choose from {', '.join(DTYPES)}.")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; expected at least 1.")
    if not source.episodes:
        raise DataError(f"{source.identity} has no episodes; there is nothing to cache.")


def _header(
    teacher: Teacher,
    source: FrameSource,
    folder: Path,
    *,
    cameras: tuple[str, ...],
    layers: tuple[int, ...],
    dtype: CacheDtype,
) -> CacheHeader:
    """The header of this build; equal, but for the fidelity and the dataset's name, to one on disk."""
    first = np.array([min(source.episodes).first])
    views, _ = _read_views(source, first, cameras)
    (features, *_) = teacher.features(views, layers[:1])
    header = CacheHeader(
        teacher=teacher_facts(teacher),
        cameras=cameras,
        layers=layers,
        grid=(features.shape[2], features.shape[3]),
        channels=features.shape[4],
        dtype=dtype,
        frame_size=(views.images.shape[-2], views.images.shape[-1]),
        dataset=source.identity,
    )
    if not (folder / HEADER).exists():
        return header
    stored = CacheHeader.load(folder)
    kept = replace(
        header, fidelity=stored.fidelity, fidelity_frames=stored.fidelity_frames, dataset=stored.dataset
    )
    ours, theirs = asdict(kept), asdict(stored)
    if differing := [key for key in ours if ours[key] != theirs[key]]:
        facts = "; ".join(f"{key}: {theirs[key]} cached, {ours[key]} asked for" for key in differing)
        raise DataError(f"{folder} holds another cache ({facts}). Build into another folder.")
    return kept


def teacher_facts(teacher: Teacher) -> TeacherFacts:
    """What the header says about a teacher."""
    return TeacherFacts(
        name=teacher.name,
        fingerprint=teacher.fingerprint,
        licence=teacher.licence,
        dim=teacher.dim,
        depth=teacher.depth,
        patch=teacher.patch,
        resolution=teacher.resolution,
    )


def _read_views(
    source: FrameSource, indices: NDArray[np.int64], cameras: Sequence[str]
) -> tuple[Views, NDArray[np.bool_]]:
    present = np.stack([source.present(indices, camera) for camera in cameras], axis=1)
    images = [source.images(indices, camera) for camera in cameras]
    if len({image.shape for image in images}) != 1:
        sizes = {camera: image.shape[1:3] for camera, image in zip(cameras, images, strict=True)}
        raise DataError(
            f"cameras of {source.identity} differ in size ({sizes}) and cannot be encoded together; "
            "give `dataset_source` an `images` function that resizes them."
        )
    pixels = torch.from_numpy(np.stack(images, axis=1)).movedim(-1, 2)
    keys = torch.from_numpy(indices.astype(np.int64))
    return Views.create(pixels, cameras, present=torch.from_numpy(present), keys=keys), present


def changed_episodes(source: FrameSource, shards: Sequence[Shard]) -> list[int]:
    """Numbers of cached episodes that `source` no longer has as they were."""
    current = {(e.episode, e.first, e.length, e.hash) for e in source.episodes}
    entries = [e for shard in shards for e in shard.episodes]
    return sorted(e.episode for e in entries if (e.episode, e.first, e.length, e.hash) not in current)


def foreign_dataset(header: CacheHeader, source: FrameSource, folder: Path) -> DataError:
    """The error for a source none of whose episodes is the cached one."""
    return DataError(
        f"{folder} caches {header.dataset}, and no episode of {source.identity} is the same; "
        "use another folder, or the dataset that was cached."
    )


def _drop_changed(
    folder: Path, header: CacheHeader, source: FrameSource, shards: list[Shard], replace_changed: bool
) -> list[Shard]:
    """The shards without changed episodes; damaged ones are refused."""
    for shard in shards:
        shard.check_size(header.row)
    changed = changed_episodes(source, shards)
    if not changed:
        return shards
    if not replace_changed:
        if len(changed) == sum(len(shard.episodes) for shard in shards):
            raise foreign_dataset(header, source, folder)
        raise DataError(
            f"episodes {changed} of {source.identity} have changed or are gone since {folder} was built; "
            "build with replace_changed=True to encode them again, or use another folder."
        )
    kept = []
    for shard in shards:
        left = replace(shard, episodes=tuple(e for e in shard.episodes if e.episode not in changed))
        if left.episodes:
            if left != shard:
                left.save()
            kept.append(left)
        else:
            shard.record.unlink()
            shard.data.unlink()
    return kept


def _sweep(folder: Path, shards: Sequence[Shard]) -> None:
    """Remove what interrupted builds left: data that no record counts."""
    counted = {shard.data for shard in shards}
    for path in (*folder.glob("*.partial"), *folder.glob(".*.tmp"), *folder.glob("shard-*.bin")):
        if path not in counted:
            path.unlink()


def _missing(source: FrameSource, shards: Sequence[Shard]) -> list[SourceEpisode]:
    done = {entry.episode for shard in shards for entry in shard.episodes}
    return [episode for episode in sorted(source.episodes) if episode.episode not in done]


def _groups(
    plan: Sequence[SourceEpisode], header: CacheHeader, shards: Sequence[Shard], shard_bytes: int
) -> Iterator[tuple[int, list[SourceEpisode]]]:
    """Shard numbers that are free, each with the whole episodes that go into it."""
    number = 1 + max((int(shard.data.stem.removeprefix("shard-")) for shard in shards), default=-1)
    group: list[SourceEpisode] = []
    for episode in plan:
        group.append(episode)
        if sum(e.length for e in group) * header.row.itemsize >= shard_bytes:
            yield number, group
            number, group = number + 1, []
    if group:
        yield number, group


class _Builder:
    """Encodes frames with one teacher into shards of one cache."""

    def __init__(self, teacher: Teacher, source: FrameSource, header: CacheHeader, batch_size: int) -> None:
        self.teacher, self.source, self.header, self.batch_size = teacher, source, header, batch_size

    def write_shard(
        self, path: Path, episodes: Sequence[SourceEpisode], advance: Callable[[int], None]
    ) -> None:
        """Write the rows beside, rename, then write the record that makes them count."""
        indices = np.concatenate([np.arange(e.first, e.first + e.length) for e in episodes])
        crc = _EpisodeChecksums([e.length for e in episodes])
        beside = path.with_suffix(".partial")
        try:
            with open(beside, "wb") as handle:
                for start in range(0, len(indices), self.batch_size):
                    rows = self._encode(indices[start : start + self.batch_size])
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

    def _encode(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        views, present = _read_views(self.source, indices, self.header.cameras)
        features = self.teacher.features(views, self.header.layers)
        expected = (*present.shape, *self.header.grid, self.header.channels)
        for layer, values in zip(self.header.layers, features, strict=True):
            if tuple(values.shape) != expected or not bool(torch.isfinite(values).all()):
                raise DataError(
                    f"{self.teacher.name} gave {tuple(values.shape)} features (expected {expected}, "
                    f"finite) in layer {layer} for frames {indices[0]} to {indices[-1]} of "
                    f"{self.source.identity}; check those frames and the teacher's arithmetic type."
                )
        return encode_rows(self.header, features, present)

    def measure_fidelity(self, folder: Path) -> None:
        """Compare what a reader gets with fresh features on frames spread over the dataset."""
        from spatial_forcing.teachers.cache import CachedTeacher  # it imports this module

        every = np.concatenate([np.arange(e.first, e.first + e.length) for e in sorted(self.source.episodes)])
        picked = every[np.linspace(0, len(every) - 1, min(FIDELITY_FRAMES, len(every))).astype(int)]
        cached, fresh_parts, stored_parts = CachedTeacher(folder), [], []
        for start in range(0, len(picked), self.batch_size):
            views, _ = _read_views(self.source, picked[start : start + self.batch_size], self.header.cameras)
            real = views.present
            fresh = self.teacher.features(views, self.header.layers)
            stored = cached.features(views, self.header.layers)
            fresh_parts.append([layer.cpu().float()[real].flatten(0, -2) for layer in fresh])
            stored_parts.append([layer[real].flatten(0, -2) for layer in stored])
        fidelity = {
            str(layer): cosines(torch.cat(fresh), torch.cat(stored))
            for layer, fresh, stored in zip(
                self.header.layers,
                zip(*fresh_parts, strict=True),
                zip(*stored_parts, strict=True),
                strict=True,
            )
        }
        replace(self.header, fidelity=fidelity, fidelity_frames=len(picked)).save(folder)
        for layer, figures in fidelity.items():
            if not figures["cosine_mean_removed"] >= LOW_FIDELITY:  # also catches NaN
                logger.warning(
                    f"{folder}: features stored for layer {layer} agree with fresh ones only to cosine "
                    f"{figures['cosine']:.3f}, {figures['cosine_mean_removed']:.3f} after mean removal. Use "
                    "bf16; if it is bf16, this teacher's features of a frame depend on the rest of its batch."
                )


def cosines(fresh: Tensor, stored: Tensor) -> dict[str, float]:
    """Mean cosine of tokens (n, C), as they are and after removal of the fresh tokens' mean.

    Most of a feature's norm can lie in one constant vector, which hides losses in the first figure.
    """
    mean = fresh.mean(0)

    def cosine(a: Tensor, b: Tensor) -> float:
        return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).mean().item()

    return {"cosine": cosine(fresh, stored), "cosine_mean_removed": cosine(fresh - mean, stored - mean)}


class _EpisodeChecksums:
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
