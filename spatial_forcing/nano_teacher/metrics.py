"""Depth and pose metrics, macro-averaged: one number an image (or view pair), then the mean.

Depth is clipped at 3 m on both sides, prediction and truth. Shapes: N images, H x W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_forcing.errors import DataError
from spatial_forcing.nano_teacher.losses import NEAREST
from spatial_forcing.nano_teacher.scenes import DEPTH_MAX


def depth_metrics(predicted: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Per-image depth errors.

    Args:
        predicted, truth: (N, H, W) metres.

    Returns:
        (N,) each: `abs_rel` (metric), `abs_rel_scaled` (after aligning the medians, clipped again) and
        `delta_1.25` (share of pixels whose ratio to the truth, either way, is below 1.25; metric).

    Raises:
        DataError: shapes differ, or a prediction is not finite.
    """
    if predicted.shape != truth.shape or truth.ndim != 3:
        raise DataError(
            f"depth is {tuple(predicted.shape)}, the truth {tuple(truth.shape)}; expected (N, H, W)."
        )
    if not bool(torch.isfinite(predicted).all()):
        raise DataError("predicted depth is not finite; the model diverged.")
    truth = truth.clamp(NEAREST, DEPTH_MAX)
    predicted = predicted.clamp(NEAREST, DEPTH_MAX)
    scale = truth.flatten(1).median(1).values / predicted.flatten(1).median(1).values
    scaled = (predicted * scale[:, None, None]).clamp(NEAREST, DEPTH_MAX)
    ratio = torch.maximum(predicted / truth, truth / predicted)
    return {
        "abs_rel": ((predicted - truth).abs() / truth).mean((1, 2)),
        "abs_rel_scaled": ((scaled - truth).abs() / truth).mean((1, 2)),
        "delta_1.25": (ratio < 1.25).float().mean((1, 2)),
    }


def pose_metrics(predicted: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Errors of camera poses relative to the reference view.

    Args:
        predicted, truth: (N, 3, 4) or (N, 4, 4) camera from reference.

    Returns:
        (N,) each: `rotation_deg`, `translation_angle_deg` (between the translations' directions) and
        `translation_m`.
    """
    product = predicted[:, :3, :3].transpose(1, 2) @ truth[:, :3, :3]
    cosine = (product.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2
    shift, true_shift = predicted[:, :3, 3], truth[:, :3, 3]
    direction = torch.cosine_similarity(shift, true_shift, dim=1, eps=1e-6)
    return {
        "rotation_deg": torch.rad2deg(torch.acos(cosine.clamp(-1, 1))),
        "translation_angle_deg": torch.rad2deg(torch.acos(direction.clamp(-1, 1))),
        "translation_m": (shift - true_shift).norm(dim=1),
    }
