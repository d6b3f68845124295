"""Normalisation of states and actions; its statistics are buffers and travel with the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from spatial_forcing.errors import ConfigError, DataError

NormMode = Literal["mean_std", "min_max", "quantile"]
"""z-score; [min, max] to [-1, 1]; [q01, q99] to [-1, 1] (values beyond the quantiles are not clipped)."""

Stats = Mapping[str, Mapping[str, ArrayLike]]
"""Statistics of a LeRobot dataset (`meta/stats.json`): feature -> statistic -> (D,) numbers."""

_STATISTICS: dict[str, tuple[str, str]] = {
    "mean_std": ("mean", "std"),
    "min_max": ("min", "max"),
    "quantile": ("q01", "q99"),
}
CONSTANT = 1e-6
"""A dimension whose spread is below this (relative to its magnitude, at least 1) counts as constant."""


class Normalizer(nn.Module):
    """`(x - offset) / scale` for vectors (..., D), and back.

    A constant dimension has scale 0: it is always normalised to 0, and comes back as its constant.
    Before `fit` it is the identity.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, dim: int, mode: NormMode) -> None:
        super().__init__()
        if mode not in get_args(NormMode):
            raise ConfigError(f"normalisation {mode!r} is unknown; choose from {get_args(NormMode)}.")
        self.mode = mode
        self.register_buffer("offset", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def fit(self, stats: Stats, feature: str) -> None:
        """Take the statistics of `feature`.

        Raises:
            DataError: the feature or a statistic is absent, of another size, not finite, or reversed.
        """
        first, second = (self._statistic(stats, feature, name) for name in _STATISTICS[self.mode])
        if self.mode == "mean_std":
            offset, scale = first, second
        else:
            offset, scale = (first + second) / 2, (second - first) / 2
        if bool((scale < 0).any()):
            low, high = _STATISTICS[self.mode]
            raise DataError(
                f"statistics of {feature!r} have a negative spread ({low}, {high}); recompute them."
            )
        constant = scale < CONSTANT * offset.abs().clamp(min=1)
        self.offset.copy_(offset)
        self.scale.copy_(torch.where(constant, 0, scale))

    def _statistic(self, stats: Stats, feature: str, name: str) -> Tensor:
        if feature not in stats or name not in stats[feature]:
            there = sorted(stats[feature]) if feature in stats else sorted(stats)
            raise DataError(
                f"statistics have no {name!r} of {feature!r} (found {there}); "
                "recompute the dataset's statistics or choose another normalisation."
            )
        value = torch.as_tensor(stats[feature][name], dtype=torch.float64).flatten()
        if value.shape != self.offset.shape or not bool(torch.isfinite(value).all()):
            raise DataError(
                f"statistic {name!r} of {feature!r} is {value.tolist()}; expected {self.offset.numel()} "
                "finite numbers. The student's dimensions must be those of the dataset."
            )
        return value

    def normalize(self, value: Tensor) -> Tensor:
        """Environment units to normalised, (..., D)."""
        divisor = torch.where(self.scale > 0, self.scale, 1)
        return torch.where(self.scale > 0, (value - self.offset) / divisor, 0)

    def denormalize(self, value: Tensor) -> Tensor:
        """Normalised to environment units, (..., D)."""
        return value * self.scale + self.offset
