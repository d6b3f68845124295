"""Normalisation of states and actions; its statistics are buffers and travel with the checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from spatial_forcing.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

NormMode = Literal["mean_std", "min_max", "quantile"]
"""z-score; [min, max] to [-1, 1]; [q01, q99] to [-1, 1] (values beyond the quantiles are not clipped; minimum
and maximum are taken for a dimension whose quantiles are equal though it changes)."""

Stats = Mapping[str, Mapping[str, ArrayLike]]
"""Statistics of a LeRobot dataset (`meta/stats.json`): feature -> statistic -> (D,) numbers."""

_STATISTICS: dict[str, tuple[str, str]] = {
    "mean_std": ("mean", "std"),
    "min_max": ("min", "max"),
    "quantile": ("q01", "q99"),
}
CONSTANT = 1e-6
"""A dimension whose spread is below this (relative to its magnitude, at least 1) counts as constant."""


def is_constant(spread: Tensor, at: Tensor) -> Tensor:
    """Which dimensions do not change: their spread is nothing beside their value (at least 1)."""
    return spread < CONSTANT * at.abs().clamp(min=1)


def widened(low: Tensor, high: Tensor, least: Tensor, most: Tensor, *, feature: str) -> tuple[Tensor, Tensor]:
    """Quantiles (low, high), replaced by the extremes (least, most) where they are equal and those are not.

    A gripper that closes in under 1 % of the frames has q01 = q99: scaled by them it could never close. Says
    which dimensions of `feature` these are.
    """
    rare = is_constant((high - low) / 2, (high + low) / 2) & ~is_constant((most - least) / 2, low)
    if bool(rare.any()):
        logger.warning(
            "%s: dimensions %s have q01 = q99 but change in a few frames; they are scaled by their minimum "
            "%s and maximum %s instead.",
            feature,
            rare.nonzero().flatten().tolist(),
            least[rare].tolist(),
            most[rare].tolist(),
        )
    return torch.where(rare, least, low), torch.where(rare, most, high)


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
        names = _STATISTICS[self.mode]
        first, second = (self._statistic(stats, feature, name) for name in names)
        if self.mode == "quantile":
            extremes = [self._statistic(stats, feature, name) for name in ("min", "max")]
            first, second = widened(first, second, *extremes, feature=feature)
        if self.mode == "mean_std":
            offset, scale = first, second
        else:
            offset, scale = (first + second) / 2, (second - first) / 2
        if bool((scale < 0).any()):
            low, high = _STATISTICS[self.mode]
            raise DataError(
                f"statistics of {feature!r} have a negative spread ({low}, {high}); recompute them."
            )
        constant = is_constant(scale, offset)
        if bool(constant.any()):
            logger.warning(
                "%s: dimensions %s never change; they are normalised to 0 and come back as %s.",
                feature,
                constant.nonzero().flatten().tolist(),
                offset[constant].tolist(),
            )
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
            setting = "student.action_dim" if feature == "action" else "student.state_dim"
            raise DataError(
                f"statistic {name!r} of {feature!r} is {value.tolist()}; expected {self.offset.numel()} "
                f"finite numbers. Set {setting} to the dataset's, or take a preset for it."
            )
        return value

    def normalize(self, value: Tensor) -> Tensor:
        """Environment units to normalised, (..., D)."""
        divisor = torch.where(self.scale > 0, self.scale, 1)
        return torch.where(self.scale > 0, (value - self.offset) / divisor, 0)

    def denormalize(self, value: Tensor) -> Tensor:
        """Normalised to environment units, (..., D)."""
        return value * self.scale + self.offset
