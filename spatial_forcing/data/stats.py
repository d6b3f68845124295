"""Dataset statistics in LeRobot's layout: feature -> min, max, mean, std, count, q01, q10, q50, q90, q99.

A vector feature's statistics have its own shape; a colour image's are (3, 1, 1) in [0, 1] over sampled
frames, a depth map's (1, 1, 1) in millimetres. `count` is (1,), the number of frames behind them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.data.info import STATS_FILE
from spatial_forcing.errors import DataError
from spatial_forcing.storage import write_json

Stats = dict[str, NDArray[Any]]

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
MOMENTS = ("min", "max", "mean", "std")
NAMES = (*MOMENTS, "count", *QUANTILES)
SAMPLED_FRAMES = 16
"""Frames of an episode whose pixels enter the image statistics."""
SAMPLED_SIDE = 64
"""Pixels are strided so that about this many remain a side."""


def vector_stats(values: NDArray[Any]) -> Stats:
    """Statistics over dimension 0 of (N, ...) numbers, in float64."""
    array = np.asarray(values, dtype=np.float64)
    quantiles = np.quantile(array, list(QUANTILES.values()), axis=0)
    return {
        "min": np.atleast_1d(array.min(0)),
        "max": np.atleast_1d(array.max(0)),
        "mean": np.atleast_1d(array.mean(0)),
        "std": np.atleast_1d(array.std(0)),
        "count": np.array([len(array)]),
        **{name: np.atleast_1d(q) for name, q in zip(QUANTILES, quantiles, strict=True)},
    }


def sampled_indices(length: int) -> list[int]:
    """Evenly spread frame numbers of an episode whose images are looked at."""
    count = min(length, SAMPLED_FRAMES)
    return sorted({int(i) for i in np.linspace(0, length - 1, count).round()})


def thumbnail(image: NDArray[Any]) -> NDArray[Any]:
    """Every n-th pixel of (H, W, C), so that about `SAMPLED_SIDE` remain a side."""
    stride = max(1, min(image.shape[:2]) // SAMPLED_SIDE)
    return image[::stride, ::stride]


def image_stats(images: Sequence[NDArray[Any]], *, depth: bool = False) -> Stats:
    """Statistics of sampled (H, W, C) images: uint8 colour scaled to [0, 1], or uint16 millimetres."""
    pixels = [thumbnail(image).reshape(-1, image.shape[2]) for image in images]
    stats = vector_stats(np.concatenate(pixels).astype(np.float64) / (1.0 if depth else 255.0))
    shaped = {name: value.reshape(-1, 1, 1) for name, value in stats.items()}
    return {**shaped, "count": np.array([len(images)])}


def combine_stats(parts: Sequence[Stats]) -> Stats:
    """Statistics of several episodes together.

    Minimum, maximum, mean and standard deviation are exact; quantiles are the count-weighted mean of the
    parts' quantiles, as LeRobot aggregates them.
    """
    counts = np.array([float(part["count"][0]) for part in parts])
    weights = (counts / counts.sum()).reshape(-1, *[1] * parts[0]["mean"].ndim)
    means = np.stack([part["mean"] for part in parts])
    mean = (weights * means).sum(0)
    variances = np.stack([part["std"] for part in parts]) ** 2 + (means - mean) ** 2
    return {
        "min": np.stack([part["min"] for part in parts]).min(0),
        "max": np.stack([part["max"] for part in parts]).max(0),
        "mean": mean,
        "std": np.sqrt((weights * variances).sum(0)),
        "count": np.array([int(counts.sum())]),
        **{q: (weights * np.stack([part[q] for part in parts])).sum(0) for q in QUANTILES},
    }


def save_stats(root: Path, stats: dict[str, Stats]) -> None:
    """Write `meta/stats.json` atomically."""
    write_json(
        root / STATS_FILE,
        {key: {name: np.asarray(v).tolist() for name, v in value.items()} for key, value in stats.items()},
    )


def load_stats(root: Path) -> dict[str, Stats]:
    """Read `meta/stats.json`. Raises `DataError` when it is missing or unreadable."""
    path = root / STATS_FILE
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); finish the recording or restore it.") from error
    return {key: {name: np.asarray(v) for name, v in value.items()} for key, value in raw.items()}
