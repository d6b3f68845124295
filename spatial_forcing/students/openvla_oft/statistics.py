"""q01 / q99 normalisation with the published formula, and `dataset_statistics.json`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from spatial_forcing.errors import CheckpointError, DataError
from spatial_forcing.precision import FixedPrecision
from spatial_forcing.registry import did_you_mean
from spatial_forcing.students.normalize import Stats, is_constant, widened

logger = logging.getLogger(__name__)

STATISTICS_FILE = "dataset_statistics.json"
EPSILON = 1e-8
BOUNDS = {"quantile": ("q01", "q99"), "min_max": ("min", "max")}


class Bounds(FixedPrecision):
    """`2 (x - low) / (high - low + 1e-8) - 1`, clipped to [-1, 1], and back; float64 throughout.

    Dimensions that the mask excludes (the gripper) pass unchanged. Those that never move (low == high) are 0
    normalised, and come back as `low`.
    """

    low: Tensor
    high: Tensor
    mask: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("low", -torch.ones(dim, dtype=torch.float64, device="cpu"))
        self.register_buffer("high", torch.ones(dim, dtype=torch.float64, device="cpu"))
        self.register_buffer("mask", torch.ones(dim, dtype=torch.bool, device="cpu"))

    def set(self, low: Any, high: Any, mask: Any | None, place: str) -> None:
        """Take bounds of this size.

        Raises:
            DataError: another size, not finite, or reversed; `place` says where they are from.
        """
        mask = torch.ones_like(self.mask) if mask is None else torch.as_tensor(mask, dtype=torch.bool)
        for name, value in (("low", low), ("high", high)):
            tensor = torch.as_tensor(value, dtype=torch.float64).flatten()
            if tensor.shape != self.low.shape or not bool(torch.isfinite(tensor).all()):
                raise DataError(
                    f"{place}: the {name} bound is {tensor.tolist()}; expected {self.low.numel()} finite "
                    "numbers. The student's state_dim and action_dim must be those of the dataset."
                )
            getattr(self, name).copy_(tensor)
        if mask.shape != self.mask.shape or bool((self.high < self.low).any()):
            raise DataError(f"{place}: bounds are reversed, or the mask has another size; recompute them.")
        self.mask.copy_(mask)

    def normalize(self, value: Tensor) -> Tensor:
        """(..., D) raw -> (..., D) float64 in [-1, 1] where the mask is set."""
        value = value.double()
        scaled = (2 * (value - self.low) / (self.high - self.low + EPSILON) - 1).clamp(-1, 1)
        scaled = torch.where(self.high > self.low, scaled, 0)
        return torch.where(self.mask, scaled, value)

    def denormalize(self, value: Tensor) -> Tensor:
        """(..., D) normalised -> (..., D) float64 raw."""
        value = value.double()
        spread = torch.where(self.high > self.low, self.high - self.low + EPSILON, 0)
        return torch.where(self.mask, 0.5 * (value + 1) * spread + self.low, value)

    def published(self) -> dict[str, list[Any]]:
        """As `dataset_statistics.json` has it: both names of each bound, and the mask."""
        low, high = self.low.tolist(), self.high.tolist()
        return {"q01": low, "q99": high, "min": low, "max": high, "mask": self.mask.tolist()}


def read_statistics(folder: Path, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics by dataset name: `dataset_statistics.json`, else `norm_stats` of `config.json`; maybe empty.

    Raises:
        CheckpointError: the file is not JSON.
    """
    path = folder / STATISTICS_FILE
    if not path.is_file():
        return dict(stored.get("norm_stats") or {})
    try:
        return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); copy it again.") from error


def choose_statistics(statistics: Mapping[str, Any], name: str, place: str | Path) -> str:
    """The name of the statistics to use; an empty `name` means the only ones there are.

    Raises:
        CheckpointError: the name is not there, or several are and none was chosen; lists them.
    """
    if name in statistics:
        return name
    there = ", ".join(sorted(statistics)) or "none"
    if name:
        raise CheckpointError(
            f"{place} has no statistics of {name!r}.{did_you_mean(name, statistics)} There are: {there}."
        )
    if len(statistics) == 1:
        return next(iter(statistics))
    raise CheckpointError(
        f"{place} has statistics of {len(statistics)} datasets and none was chosen; pass "
        f"statistics=NAME, one of: {there}."
    )


def set_from_published(bounds: Bounds, entry: Mapping[str, Any], feature: str, norm: str, place: str) -> None:
    """Fill `bounds` from one dataset's entry (`feature` is "action" or "proprio").

    Raises:
        CheckpointError: the feature or a bound is missing; names what is there.
    """
    first, second = BOUNDS[norm]
    values = entry.get(feature)
    if not isinstance(values, Mapping) or first not in values or second not in values:
        there = sorted(values) if isinstance(values, Mapping) else sorted(entry)
        raise CheckpointError(f"{place} has no {first} and {second} of {feature!r}; it has {there}.")
    try:
        bounds.set(values[first], values[second], values.get("mask"), f"{place}, {feature!r}")
    except DataError as error:
        raise CheckpointError(str(error)) from error


def set_from_dataset(
    bounds: Bounds, stats: Stats, feature: str, norm: str, unscaled: Sequence[int] = ()
) -> None:
    """Fill `bounds` from a LeRobot dataset's statistics; dimensions `unscaled` pass unchanged.

    A dimension that changes in so few frames that its quantiles are equal takes its minimum and maximum.

    Raises:
        DataError: the feature or a bound is missing, or has another size.
    """
    first, second = BOUNDS[norm]
    if feature not in stats or first not in stats[feature] or second not in stats[feature]:
        there = sorted(stats.get(feature, stats))
        raise DataError(
            f"statistics have no {first!r} and {second!r} of {feature!r} (found {there}); recompute them."
        )
    mask = torch.ones_like(bounds.mask, device="cpu")
    mask[list(unscaled)] = False
    low, high = (
        torch.as_tensor(stats[feature][name], dtype=torch.float64).flatten() for name in (first, second)
    )
    if norm == "quantile" and {"min", "max"} <= set(stats[feature]) and low.shape == bounds.low.shape:
        extremes = (
            torch.as_tensor(stats[feature][name], dtype=torch.float64).flatten() for name in ("min", "max")
        )
        wide_low, wide_high = widened(low, high, *extremes, feature=feature)
        low, high = torch.where(mask, wide_low, low), torch.where(mask, wide_high, high)
    bounds.set(low, high, mask, f"statistics of {feature!r}")
    if bool((still := is_constant((high - low) / 2, low) & mask).any()):
        logger.warning(
            "%s: dimensions %s never change; they are normalised to 0 and come back as %s.",
            feature,
            still.nonzero().flatten().tolist(),
            low[still].tolist(),
        )
