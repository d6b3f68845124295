"""Removes from a feature cache what no reader uses: leftovers, damaged rows, episodes that are gone."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from spatial_forcing.storage import disk_full_explained, exclusive
from spatial_forcing.teachers.cache.build import KEPT
from spatial_forcing.teachers.cache.format import (
    CachedEpisode,
    CacheHeader,
    Shard,
    checksum,
    leftovers,
    read_shards,
)
from spatial_forcing.teachers.cache.read import changed_episodes, foreign_dataset
from spatial_forcing.teachers.cache.source import FrameSource, source_of


@dataclass(frozen=True)
class Pruned:
    """What pruning removed, or would remove.

    Attributes:
        leftovers: files that no record counts.
        damaged: episodes with rows that are lost; the next build encodes them again.
        gone: episodes that the dataset no longer has as they were.
        bytes: disk space that this frees.
    """

    leftovers: tuple[Path, ...]
    damaged: tuple[int, ...]
    gone: tuple[int, ...]
    bytes: int


def prune_cache(folder: str | Path, source: FrameSource | None = None, *, dry_run: bool = False) -> Pruned:
    """Remove unused features: delete whole shards, rewrite shards that are used in part.

    Interrupted at any moment it has lost nothing: a shard's record is switched to the new data at once.

    Args:
        folder: of the cache.
        source: the dataset; episodes that it no longer has as they were are dropped. None: all are kept.
        dry_run: change nothing, only say what would be done.

    Raises:
        DataError: no cache, or no episode of `source` is the cached one.
        EnvironmentSetupError: a build is going on here, or the disk is full (nothing is lost).
    """
    folder = Path(folder)
    header = CacheHeader.load(folder)
    source = None if source is None else source_of(header.teacher.name, source)
    with exclusive(folder, wait=False, doing="changing the cache"), disk_full_explained(folder, KEPT):
        shards = read_shards(folder)
        gone = set() if source is None else set(changed_episodes(source, shards))
        if source is not None and gone and len(gone) == sum(len(shard.episodes) for shard in shards):
            raise foreign_dataset(header, source, folder)
        whole = [(shard, _whole(header, shard)) for shard in shards]
        left = [(shard, tuple(e for e in episodes if e.episode not in gone)) for shard, episodes in whole]
        size = header.row.itemsize
        freed = sum(_bytes(shard.data) - size * sum(e.length for e in kept) for shard, kept in left)
        unused = tuple(leftovers(folder, shards))
        freed += sum(_bytes(path) for path in unused)
        if not dry_run:
            for path in unused:
                path.unlink()
            for shard, kept in left:
                _rewrite(header, shard, kept)
    damaged = {e.episode for shard, kept in whole for e in shard.episodes if e not in kept}
    return Pruned(unused, tuple(sorted(damaged)), tuple(sorted(gone)), freed)


def _whole(header: CacheHeader, shard: Shard) -> tuple[CachedEpisode, ...]:
    """The episodes whose rows are all there and match their checksums."""
    count = _bytes(shard.data) // header.row.itemsize
    if not count:
        return ()
    rows = np.memmap(shard.data, dtype=header.row, mode="r", shape=(count,))
    ends = [(e, e.row + e.length) for e in shard.episodes]
    return tuple(e for e, end in ends if end <= count and checksum(rows[e.row : end]) == e.crc)


def _rewrite(header: CacheHeader, shard: Shard, episodes: tuple[CachedEpisode, ...]) -> None:
    """Rewrite the shard with `episodes` only; the old data is deleted last."""
    rows = sum(e.length for e in episodes)
    if episodes == shard.episodes and _bytes(shard.data) == rows * header.row.itemsize:
        return
    if not episodes:
        shard.record.unlink()
        shard.data.unlink(missing_ok=True)
        return
    old = np.memmap(shard.data, dtype=np.uint8, mode="r")
    beside = shard.data.with_suffix(".partial")
    size = header.row.itemsize
    try:
        with open(beside, "wb") as handle:
            for e in episodes:
                handle.write(old[e.row * size : (e.row + e.length) * size].data)
            handle.flush()
            os.fsync(handle.fileno())
        data = _next_name(shard)
        os.replace(beside, data)
    finally:
        beside.unlink(missing_ok=True)
    starts = np.cumsum([0, *(e.length for e in episodes)])
    moved = tuple(replace(e, row=int(row)) for e, row in zip(episodes, starts[:-1], strict=True))
    Shard(data, rows, moved).save()
    shard.data.unlink()


def _next_name(shard: Shard) -> Path:
    """`shard-00000.bin`, `shard-00000.r1.bin`, `shard-00000.r2.bin`, ..."""
    parts = shard.data.name.split(".")
    revision = int(parts[1].removeprefix("r")) if len(parts) == 3 else 0
    return shard.data.with_name(f"{parts[0]}.r{revision + 1}.bin")


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
