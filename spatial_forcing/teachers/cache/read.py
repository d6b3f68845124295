"""`CachedTeacher`: teacher features from disk; what a cache holds, and whether it is intact.

Features belong to stored frames, with all views of a frame encoded together; `Views.student_to_view` says
how a student's crop lies in them. Shapes: B batch, V view, h x w teacher grid, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spatial_forcing.alignment import Views
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.teachers.cache.basis import load_bases
from spatial_forcing.teachers.cache.codec import columns, decode
from spatial_forcing.teachers.cache.format import (
    CacheHeader,
    Shard,
    checksum,
    decode_present,
    read_shards,
)
from spatial_forcing.teachers.cache.source import FrameSource, source_of
from spatial_forcing.teachers.cards import announce_licence
from spatial_forcing.teachers.layers import resolve_layers


class CachedTeacher:
    """The features of a cache, read by `Views.keys` from memory-mapped shards. Implements `Teacher`.

    A cache with fewer channels than its teacher delivers its own: `dim` is their number, and cosines between
    tokens are those of the projected features (see `basis`).

    Args:
        folder: what `build_cache` wrote.
        fingerprint: refuse the cache of a teacher with another fingerprint.
        source: refuse the cache of another dataset, or of episodes that have changed since.
        device: where features are delivered.
        all_channels: deliver the teacher's own channels (standardised, if the cache is), as far as the basis
            reaches; slow, for inspection.

    Raises:
        DataError: no cache, a damaged shard, another teacher or dataset (both are named).
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        fingerprint: str | None = None,
        source: FrameSource | None = None,
        device: torch.device | str = "cpu",
        all_channels: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.header = CacheHeader.load(self.folder)
        self.device = torch.device(device)
        facts = self.header.teacher
        self.name, self.licence, self.fingerprint = facts.name, facts.licence, facts.fingerprint
        self.bases = None if self.header.basis is None else load_bases(self.folder, self.header.basis)
        # Computed here, because a training step may run under autocast.
        self._offsets = {layer: basis.offset * basis.gain for layer, basis in (self.bases or {}).items()}
        self.all_channels = all_channels
        self.dim = facts.dim if all_channels else self.header.channels
        self.depth = facts.depth
        self.patch, self.resolution = facts.patch, facts.resolution
        self.partial = facts.partial
        if fingerprint not in (None, facts.fingerprint):
            raise DataError(
                f"{self.folder} holds features of {facts.name!r} with fingerprint {facts.fingerprint}, not "
                f"{fingerprint}: its weights, size or preprocessing differ. Build a cache with this teacher."
            )
        self._shards = read_shards(self.folder)
        for shard in self._shards:
            shard.check_size(self.header.row)
        if source is not None:
            self._check_source(source_of(facts.name, source))
        # One line an episode, sorted by first index: first, stop, shard, row of its first frame.
        table = sorted(
            (e.first, e.first + e.length, number, e.row)
            for number, shard in enumerate(self._shards)
            for e in shard.episodes
        )
        self._table = np.array(table, dtype=np.int64).reshape(-1, 4)
        self._open: dict[int, NDArray[Any]] = {}
        announce_licence(self.name, self.licence)

    @property
    def cameras(self) -> tuple[str, ...]:
        """The camera tuple that was encoded, in order."""
        return self.header.cameras

    @property
    def layers(self) -> tuple[int, ...]:
        """The teacher's layers that were cached, 0-based."""
        return self.header.layers

    @property
    def projected(self) -> bool:
        """Whether the delivered channels are coordinates in a basis instead of the teacher's own."""
        return self.bases is not None and not self.all_channels

    @property
    def frames(self) -> NDArray[np.int64]:
        """The absolute indices of the cached frames, ascending."""
        spans = [np.arange(first, stop) for first, stop in self._table[:, :2]]
        return np.concatenate([np.empty(0, np.int64), *spans])

    def present(self, keys: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which views frames were cached with, (n, V). Raises `DataError` for frames that are not cached."""
        return decode_present(self.header, self._gather("present", *self._locate(keys)))

    def reference(self, layer: int, features: Tensor) -> Tensor:
        """The teacher's `features` of a layer as this cache approximates them: standardised where it is."""
        return features if self.bases is None else self.bases[layer].reference(features)

    def __len__(self) -> int:
        return int((self._table[:, 1] - self._table[:, 0]).sum())

    def holds(self, keys: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the frames `keys` (n,) are cached, (n,) bool."""
        line = np.searchsorted(self._table[:, 0], keys, side="right") - 1
        found: NDArray[np.bool_] = line >= 0
        found[found] = keys[found] < self._table[line[found], 1]
        return found

    def last_frames(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """The last frame of the episode of each frame, (n,); a frame that is not cached is its own."""
        found, last = self.holds(keys), keys.copy()
        line = np.searchsorted(self._table[:, 0], keys[found], side="right") - 1
        last[found] = self._table[line, 1] - 1
        return last

    def to(self, device: torch.device | str) -> Self:
        """Deliver features on `device`."""
        self.device = torch.device(device)
        return self

    @torch.no_grad()
    def features(self, views: Views, layers: Sequence[int] = (-1,)) -> tuple[Tensor, ...]:
        """The stored features of the frames `views.keys`, one (B, V, h, w, C) float32 tensor a layer.

        Pixels are not looked at.

        Raises:
            DataError: other cameras, or in another order, than those cached; views without keys; a frame
                that is not cached, or was cached with other views present.
            ConfigError: a layer that the teacher does not have, or that is not cached.
        """
        wanted = resolve_layers(layers, self.depth)
        if missing := sorted(set(wanted) - set(self.layers)):
            raise ConfigError(
                f"layers {missing} of {self.name!r} are not in {self.folder}, which has {self.layers}; "
                f"build a cache with layers={tuple(sorted({*self.layers, *missing}))}."
            )
        keys = self._keys(views)
        shard_of, row_of = self._locate(keys)
        self._check_present(views, keys, shard_of, row_of)
        read = {layer: self._read(layer, shard_of, row_of, views.present) for layer in set(wanted)}
        return tuple(read[layer] for layer in wanted)

    def _check_source(self, source: FrameSource) -> None:
        changed = changed_episodes(source, self._shards)
        if changed and len(changed) == sum(len(shard.episodes) for shard in self._shards):
            raise foreign_dataset(self.header, source, self.folder)
        if changed:
            raise DataError(
                f"episodes {changed} of {source.identity} have changed or are gone since {self.folder} "
                "was built; build the cache again with replace_changed=True."
            )

    def _keys(self, views: Views) -> NDArray[np.int64]:
        if views.cameras != self.cameras:
            raise DataError(
                f"{self.folder} caches the cameras {self.cameras}, and the student shows {views.cameras}. "
                "Views attend to each other, so another subset or order needs a cache of its own."
            )
        if views.keys is None:
            raise DataError(
                f"a cached teacher ({self.folder}) needs Views.keys, the absolute frame index of each "
                "sample; put `index` into the batch."
            )
        return views.keys.cpu().numpy()

    def _locate(self, keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard and row of every frame, (B,) each."""
        if not (found := self.holds(keys)).all():
            raise DataError(
                f"frames {sorted(set(keys[~found].tolist()))} are not in {self.folder}, which holds "
                f"{len(self)} frames of {self.header.dataset}; build it again to add what is new."
            )
        line = np.searchsorted(self._table[:, 0], keys, side="right") - 1
        first, _, shard, row = self._table[line].T
        return shard, row + keys - first

    def _gather(self, column: str, shard_of: NDArray[np.int64], row_of: NDArray[np.int64]) -> NDArray[Any]:
        layout = self.header.row[column]
        result = np.empty((len(row_of), *layout.shape), dtype=layout.base)
        for number in np.unique(shard_of):
            if int(number) not in self._open:
                self._open[int(number)] = self._shards[number].open(self.header.row)
            where = shard_of == number
            result[where] = self._open[int(number)][column][row_of[where]]
        return result

    def _read(
        self, layer: int, shard_of: NDArray[np.int64], row_of: NDArray[np.int64], present: Tensor
    ) -> Tensor:
        parts = {
            name: self._gather(f"{name}{layer}", shard_of, row_of)
            for name in columns(self.header.dtype, self.header.channels)
        }
        decoded = decode(self.header.dtype, parts, self.device)
        if self.bases is None:
            return decoded
        basis = self.bases[layer]
        if self.all_channels:
            decoded = basis.to(self.device).expand(decoded)
        else:
            decoded.mul_(basis.gain).add_(self._offsets[layer].to(self.device))
        if bool(present.all()):
            return decoded
        return decoded.masked_fill_(~present.to(self.device)[:, :, None, None, None], 0.0)

    def _check_present(
        self, views: Views, keys: NDArray[np.int64], shard_of: NDArray[np.int64], row_of: NDArray[np.int64]
    ) -> None:
        cached = decode_present(self.header, self._gather("present", shard_of, row_of))
        asked = views.present.cpu().numpy()
        if differing := np.flatnonzero((cached != asked).any(1)).tolist():
            row = differing[0]
            raise DataError(
                f"frame {keys[row]} was cached with present views {cached[row].tolist()} of {self.cameras}, "
                f"and the batch has {asked[row].tolist()}; its features depend on all views, so build "
                "another cache or deliver the views as recorded."
            )

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry its content; workers open their own.
        return {**self.__dict__, "_open": {}}


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


@dataclass(frozen=True)
class CacheInfo:
    """A summary of a cache.

    Attributes:
        header: what is cached, with its fidelity.
        episodes, frames, shards: how much of it.
        bytes: size of the shards on disk.
        row_bytes: of one frame.
    """

    header: CacheHeader
    episodes: int
    frames: int
    shards: int
    bytes: int
    row_bytes: int


def cache_info(folder: str | Path) -> CacheInfo:
    """What `folder` holds. Raises `DataError` when it is not a cache or a record is malformed."""
    folder = Path(folder)
    header, shards = CacheHeader.load(folder), read_shards(folder)
    episodes = [episode for shard in shards for episode in shard.episodes]
    return CacheInfo(
        header=header,
        episodes=len(episodes),
        frames=sum(episode.length for episode in episodes),
        shards=len(shards),
        bytes=sum(shard.data.stat().st_size for shard in shards if shard.data.is_file()),
        row_bytes=header.row.itemsize,
    )


def verify_cache(folder: str | Path) -> list[str]:
    """Read every byte; one message a damaged shard (with its episodes), none when all is well.

    Raises:
        DataError: `folder` is not a cache, or a record is malformed.
    """
    header = CacheHeader.load(Path(folder))
    return [problem for shard in read_shards(Path(folder)) for problem in _problems(header, shard)]


def _problems(header: CacheHeader, shard: Shard) -> list[str]:
    try:
        rows = shard.open(header.row)
    except DataError as error:
        return [str(error)]
    broken = [e.episode for e in shard.episodes if checksum(rows[e.row : e.row + e.length]) != e.crc]
    if not broken:
        return []
    return [
        f"{shard.data}: the rows of episodes {broken} do not match their checksums. "
        f"`spatial-forcing cache prune {shard.data.parent}` drops them; the next build redoes them alone."
    ]
