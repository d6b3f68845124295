"""Builds a feature cache: resumable, only what is new, one builder a folder (of one or more processes)."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.progress import progress_bar
from spatial_forcing.protocols import Teacher, is_partial
from spatial_forcing.storage import disk_full_explained, exclusive, free_bytes, require_disk
from spatial_forcing.teachers.cache.basis import Basis, Moments, fit_basis, load_bases, save_bases
from spatial_forcing.teachers.cache.codec import DTYPES, CacheDtype
from spatial_forcing.teachers.cache.encode import Encoder, ShardWriter, read_views, spread_frames
from spatial_forcing.teachers.cache.format import (
    HEADER,
    CacheHeader,
    Shard,
    TeacherFacts,
    leftovers,
    read_shards,
)
from spatial_forcing.teachers.cache.read import CachedTeacher, changed_episodes, foreign_dataset
from spatial_forcing.teachers.cache.source import FrameSource, SourceEpisode, source_of, wanted_episodes
from spatial_forcing.teachers.layers import resolve_layers

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 * 2**20
"""A shard closes at the first episode that reaches this size; an interruption loses at most one shard."""
KEPT = "completed shards are kept"
FIDELITY_FRAMES = (8, 32)
"""Least and most frames on which fidelity is measured; a hundredth of the dataset in between."""
BASIS_FRAMES = 256
FOUND_OUT = ("basis", "fidelity", "fidelity_frames", "dataset")
"""Of a header, what a build finds out and a later one keeps."""
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
    channels: int | None = None,
    standardise: bool = False,
    basis_frames: int = BASIS_FRAMES,
    batch_size: int = 8,
    replace_changed: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Encode every frame of `source` that `folder` does not hold yet, and measure the fidelity.

    Interrupted at any moment, the same call resumes. A dataset that has grown adds its
    new episodes only. Under `accelerate launch` every process calls this alike and encodes its own shards.

    Args:
        teacher: encodes all views of a frame together.
        source: the frames; see `dataset_source`.
        folder: made if it does not exist.
        layers: of the teacher, 0-based, negative from the end.
        cameras: ordered; default the source's. A cache serves exactly this tuple.
        dtype: how numbers are stored (see `codec`); "int4" needs `channels`.
        channels: store each token's coordinates in a basis of that many directions, fitted on a sample (a
            multiple of 4, 256 for VGGT-1B); None: the teacher's own channels.
        standardise: with `channels`, standardise the teacher's channels before the fit.
        basis_frames: frames in that sample, evenly over the dataset.
        batch_size: frames in one call of the teacher.
        replace_changed: build changed episodes again instead of refusing.
        shard_bytes: size at which a shard is closed.
        progress: print an estimate first, then show a bar with the time left, on stderr.

    Returns:
        The folder.

    Raises:
        ConfigError: unknown camera, dtype, layer or number of channels.
        DataError: the folder holds the cache of another teacher, camera tuple, layers, dtype, channels or
            dataset (both are named), or episodes have changed (named).
        EnvironmentSetupError: not enough disk space (nothing was written), the disk filled up (completed
            shards are kept), another process is building here.
    """
    folder, source = Path(folder), source_of(teacher.name, source)
    names = tuple(source.cameras if cameras is None else cameras)
    _check_settings(source, names, dtype, batch_size)
    _check_basis(teacher, channels, dtype, standardise, basis_frames)
    wanted = tuple(dict.fromkeys(resolve_layers(layers, teacher.depth)))
    encoder = Encoder(teacher, source, names, wanted, batch_size)
    ranks = _Ranks(teacher)
    lock = exclusive(folder, wait=False, doing="building a cache") if ranks.main else nullcontext()
    with lock, disk_full_explained(folder, KEPT):
        work: _Work | None = None
        if ranks.main:
            header = _header(encoder, folder, dtype, channels, standardise)
            shards = _drop_changed(folder, header, source, read_shards(folder), replace_changed)
            work = _plan(
                encoder,
                folder,
                header,
                shards,
                basis_frames=basis_frames,
                shard_bytes=shard_bytes,
                processes=ranks.count,
                progress=progress,
            )
        header, groups, changed = ranks.share(work)
        bases = None if header.basis is None else load_bases(folder, header.basis)
        writer = ShardWriter(encoder, header, _on(bases, teacher))
        mine = groups[ranks.index :: ranks.count]
        rows = sum(e.length for _, group in mine for e in group)
        with progress_bar(progress and ranks.main and rows > 0) as bar:
            share = f" (process 1 of {ranks.count})" if ranks.count > 1 else ""
            task = bar.add_task(f"caching {teacher.name}{share}", total=rows)
            for number, group in mine:
                writer.write(folder / f"shard-{number:05d}.bin", group, lambda n: bar.advance(task, n))
        ranks.wait()
        if ranks.main and (changed or not header.fidelity):
            measure_fidelity(encoder, header, folder)
        ranks.wait()
    return folder


_Work = tuple[CacheHeader, list[tuple[int, list[SourceEpisode]]], bool]
"""The header, the shards to write (number, episodes), and whether there are any."""


class _Ranks:
    """The processes of this build: those of `accelerate launch`, or this one alone."""

    def __init__(self, teacher: Teacher) -> None:
        self._state: PartialState | None = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            device = getattr(teacher, "device", torch.device("cpu"))
            self._state = PartialState(cpu=device.type == "cpu")
        self.index = 0 if self._state is None else self._state.process_index
        self.count = 1 if self._state is None else self._state.num_processes
        self.main = self.index == 0

    def share(self, work: _Work | None) -> _Work:
        """Give every process the value of the main process."""
        box: list[_Work | None] = [work]
        if self._state is not None:
            broadcast_object_list(box)
        (result,) = box
        assert result is not None
        return result

    def wait(self) -> None:
        """Until every process is here."""
        if self._state is not None:
            self._state.wait_for_everyone()


def _on(bases: Mapping[int, Basis] | None, teacher: Teacher) -> Mapping[int, Basis] | None:
    device = getattr(teacher, "device", "cpu")
    return None if bases is None else {layer: basis.to(device) for layer, basis in bases.items()}


def _plan(
    encoder: Encoder,
    folder: Path,
    header: CacheHeader,
    shards: list[Shard],
    *,
    basis_frames: int,
    shard_bytes: int,
    processes: int,
    progress: bool,
) -> _Work:
    """Check the disk, clear what interrupted builds left, write the header; what is left to encode."""
    plan = _missing(encoder.source, shards)
    rows = sum(episode.length for episode in plan)
    needed = rows * header.row.itemsize
    require_disk(folder, needed, "the cache", "cache fewer layers, or use int8 and fewer channels")
    if progress and plan:
        with progress_bar() as bar:
            bar.console.print(
                f"{rows:,} frames in {len(plan)} episodes to encode: {needed / 2**20:,.1f} MiB "
                f"({header.row.itemsize:,} bytes a frame) into {folder}, {free_bytes(folder) / 2**20:,.0f} "
                "MiB free",
                highlight=False,
                soft_wrap=True,
            )
    for path in leftovers(folder, shards):
        path.unlink()
    if header.channels != header.teacher.dim and header.basis is None:
        header = replace(header, basis=_fit(encoder, header, folder, basis_frames, progress))
    if plan:
        header = replace(header, fidelity=None, fidelity_frames=0)
    header.save(folder)
    most = math.ceil(rows / processes)
    groups = list(_groups(plan, shards, most, shard_bytes / header.row.itemsize))
    return header, groups, bool(plan)


def _fit(
    encoder: Encoder, header: CacheHeader, folder: Path, frames: int, progress: bool
) -> dict[str, object]:
    """Fit the bases of all layers on a sample, save them, and return what the header says about them."""
    picked = spread_frames(encoder.source, frames)
    moments = {layer: Moments() for layer in header.layers}
    with progress_bar(progress) as bar:
        task = bar.add_task("sampling features for the basis", total=len(picked))
        for indices, views, features in encoder.batches(picked):
            for layer, values in zip(header.layers, features, strict=True):
                moments[layer].add(values[views.present.to(values.device)].flatten(0, -2))
            bar.advance(task, len(indices))
    bases = {
        layer: fit_basis(sample, header.channels, header.standardised) for layer, sample in moments.items()
    }
    return {**save_bases(folder, bases), "frames": len(picked)}


def _check_basis(
    teacher: Teacher, channels: int | None, dtype: CacheDtype, standardise: bool, frames: int
) -> None:
    if channels is None:
        if dtype == "int4":
            raise ConfigError(
                "int4 stores leading directions more exactly than others; set channels too, or use int8."
            )
        if standardise:
            raise ConfigError(
                "standardise belongs to a cache with fewer channels; set channels too, or standardise in "
                "training (forcing.standardise)."
            )
        return
    if is_partial(teacher):
        raise ConfigError(
            f"{teacher.name!r} marks what was not measured by zeros, which a basis would not keep; leave "
            "channels out."
        )
    if channels % 4 or not 0 < channels < teacher.dim:
        raise ConfigError(
            f"channels is {channels}; expected a multiple of 4 (for the positional embedding) below the "
            f"{teacher.dim} channels of {teacher.name!r}, or None for all of them."
        )
    if frames < 1:
        raise ConfigError(f"basis_frames is {frames}; expected at least 1.")


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
    if not wanted_episodes(source):
        raise DataError(f"{source.identity} has no episodes; there is nothing to cache.")


def _header(
    encoder: Encoder, folder: Path, dtype: CacheDtype, channels: int | None, standardise: bool
) -> CacheHeader:
    """The header of this build; equal, except for what a build finds out, to one on disk."""
    teacher, source = encoder.teacher, encoder.source
    first = np.array([wanted_episodes(source)[0].first])
    views, _ = read_views(source, first, encoder.cameras)
    (features, *_) = teacher.features(views, encoder.layers[:1])
    header = CacheHeader(
        teacher=teacher_facts(teacher),
        cameras=tuple(encoder.cameras),
        layers=tuple(encoder.layers),
        grid=(features.shape[2], features.shape[3]),
        channels=channels or features.shape[4],
        dtype=dtype,
        frame_size=(views.images.shape[-2], views.images.shape[-1]),
        dataset=source.identity,
        standardised=standardise,
    )
    if not (folder / HEADER).exists():
        return header
    stored = CacheHeader.load(folder)
    kept = replace(header, **{name: getattr(stored, name) for name in FOUND_OUT})
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
        partial=is_partial(teacher),
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


def _missing(source: FrameSource, shards: Sequence[Shard]) -> list[SourceEpisode]:
    done = {entry.episode for shard in shards for entry in shard.episodes}
    return [episode for episode in wanted_episodes(source) if episode.episode not in done]


def _groups(
    plan: Sequence[SourceEpisode], shards: Sequence[Shard], most: float, full: float
) -> Iterator[tuple[int, list[SourceEpisode]]]:
    """Shard numbers that are free, each with the whole episodes that go into it.

    A shard closes at the first episode with which it is `full` or has `most` rows, a process's share.
    """
    number = 1 + max((shard.number for shard in shards), default=-1)
    group: list[SourceEpisode] = []
    for episode in plan:
        group.append(episode)
        if sum(e.length for e in group) >= min(most, full):
            yield number, group
            number, group = number + 1, []
    if group:
        yield number, group


def measure_fidelity(encoder: Encoder, header: CacheHeader, folder: Path) -> None:
    """Compare what a reader gets with fresh features on frames spread over the dataset; into the header."""
    # They are encoded once more: a small dataset would spend its build on them.
    least, most = FIDELITY_FRAMES
    share = sum(episode.length for episode in wanted_episodes(encoder.source)) // 100
    picked = spread_frames(encoder.source, min(most, max(least, share)))
    cached = CachedTeacher(folder, all_channels=True)
    fresh_parts: dict[int, list[Tensor]] = {layer: [] for layer in header.layers}
    stored_parts: dict[int, list[Tensor]] = {layer: [] for layer in header.layers}
    for _, views, features in encoder.batches(picked):
        stored = cached.features(views, header.layers)
        for layer, fresh, read in zip(header.layers, features, stored, strict=True):
            real = cached.reference(layer, fresh.cpu().float())[views.present]
            fresh_parts[layer].append(real.flatten(0, -2))
            stored_parts[layer].append(read[views.present].flatten(0, -2))
    fidelity = {
        str(layer): cosines(torch.cat(fresh_parts[layer]), torch.cat(stored_parts[layer]))
        for layer in header.layers
    }
    replace(header, fidelity=fidelity, fidelity_frames=len(picked)).save(folder)
    for name, figures in fidelity.items():
        if not figures["cosine_mean_removed"] >= LOW_FIDELITY:  # also catches NaN
            logger.warning(
                f"{folder}: features stored for layer {name} agree with fresh ones only to cosine "
                f"{figures['cosine']:.3f}, {figures['cosine_mean_removed']:.3f} after mean removal. Use "
                "bf16 or more channels; if it is bf16 with all channels, this teacher's features of a frame "
                "depend on the rest of its batch."
            )


def cosines(fresh: Tensor, stored: Tensor) -> dict[str, float]:
    """Mean cosine of tokens (n, C), as they are and after removal of the fresh tokens' mean.

    Most of a feature's norm can lie in one constant vector, which hides losses in the first figure.
    """
    mean = fresh.mean(0)

    def cosine(a: Tensor, b: Tensor) -> float:
        return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).mean().item()

    return {"cosine": cosine(fresh, stored), "cosine_mean_removed": cosine(fresh - mean, stored - mean)}
