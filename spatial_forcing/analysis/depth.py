"""The error of predicted depth, one number for each image."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_forcing.errors import DataError

NEAREST = 0.01
"""Metres; depth below it counts as not measured."""


def depth_metrics(predicted: Tensor, truth: Tensor, measured: Tensor | None = None) -> dict[str, Tensor]:
    """AbsRel, RMSE (metres) and delta < 1.25 of every image, each (N,); NaN for one without measured pixels.

    Args:
        predicted, truth: (N, H, W) metres.
        measured: (N, H, W) bool: pixels that count; None: all.

    Raises:
        DataError: shapes differ, or a prediction is not finite.
    """
    if predicted.shape != truth.shape or truth.ndim != 3:
        raise DataError(
            f"depth is {tuple(predicted.shape)}, the truth {tuple(truth.shape)}; expected (N, H, W) of both."
        )
    if not bool(torch.isfinite(predicted).all()):
        raise DataError("predicted depth is not finite; the model diverged.")
    measured = torch.ones_like(truth, dtype=torch.bool) if measured is None else measured
    truth = truth.clamp(min=NEAREST)
    count = measured.flatten(1).sum(1)

    def mean(values: Tensor) -> Tensor:
        return torch.where(measured, values, 0.0).flatten(1).sum(1) / count

    ratio = torch.maximum(predicted / truth, truth / predicted)
    return {
        "abs_rel": mean((predicted - truth).abs() / truth),
        "rmse": mean((predicted - truth).square()).sqrt(),
        "delta": mean((ratio < 1.25).float()),
    }
