"""Recomputes a dataset's statistics that do not match its rows, as after trimming or merging."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa

from spatial_forcing.data.info import BOOKKEEPING, DEPTH_UNITS_PER_METRE
from spatial_forcing.data.reader import Dataset
from spatial_forcing.data.stats import (
    MOMENTS,
    Stats,
    image_stats,
    load_stats,
    sampled_indices,
    save_stats,
    thumbnail,
    vector_stats,
)
from spatial_forcing.data.tables import read_table, to_numpy
from spatial_forcing.errors import DataError
from spatial_forcing.progress import progress_bar


def recompute_stats(root: str | Path, *, progress: bool = True) -> list[str]:
    """Recompute `meta/stats.json`; returns the features whose statistics changed.

    Numbers are taken from all rows, images from evenly spread frames of every episode. Features that hold
    neither keep what the file says about them.

    Raises:
        DataError: as `Dataset.open`, or a frame cannot be read.
    """
    dataset = Dataset.open(root)
    old: dict[str, Stats] = {}
    with suppress(DataError):
        old = load_stats(dataset.root)
    new = old | _numbers(dataset) | _images(dataset, progress)
    save_stats(dataset.root, new)
    return [key for key, value in new.items() if key not in old or not _same(old[key], value)]


def _numbers(dataset: Dataset) -> dict[str, Stats]:
    info = dataset.info
    keys = [key for key in (*info.vectors, *BOOKKEEPING) if key in info.features]
    files = dataset.source_files([])
    found = {}
    for key in keys:
        tables = [read_table(file, [key]) for file in files]
        with suppress(DataError, KeyError, ValueError, pa.ArrowException):  # no numbers of one shape
            parts = [to_numpy(table[key], info.features[key]["shape"]) for table in tables]
            found[key] = vector_stats(np.concatenate(parts))
    return found


def _images(dataset: Dataset, progress: bool) -> dict[str, Stats]:
    info = dataset.info
    frames = [e.start + i for e in dataset.episodes for i in sampled_indices(e.length)]
    depths = {name: key for name, key in info.depths.items() if not info.is_video(key)}
    found = {}
    with progress_bar(progress) as bar:
        task = bar.add_task("reading frames", total=len(frames) * (len(info.cameras) + len(depths)))
        for camera, key in info.cameras.items():
            images = []
            for frame in frames:
                images.append(thumbnail(dataset.image(frame, camera)).copy())
                bar.advance(task)
            found[key] = image_stats(images)
        for camera, key in depths.items():
            maps = []
            for frame in frames:
                metres = thumbnail(dataset.depth(frame, camera)[..., None])
                maps.append(np.rint(metres * DEPTH_UNITS_PER_METRE))
                bar.advance(task)
            found[key] = image_stats(maps, depth=True)
    return found


def _same(old: Stats, new: Stats) -> bool:
    """Quantiles are left out: other writers average those of the episodes."""
    return set(old) == set(new) and all(
        np.shape(old[name]) == np.shape(new[name]) and np.allclose(old[name], new[name], rtol=1e-5, atol=1e-6)
        for name in MOMENTS
    )
