"""Images to the size that Depth Anything 3 encodes, as its authors do: to a bound, then to whole patches.

Shrinking averages over areas, growing is bicubic, and both steps round to 256 levels, as the original's cv2
does (up to one level, because cv2 computes in fixed point).

Shapes: N images, H x W pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_forcing.errors import ConfigError

Method = Literal["upper_bound_resize", "upper_bound_crop", "lower_bound_resize", "lower_bound_crop"]
METHODS = ("upper_bound_resize", "upper_bound_crop", "lower_bound_resize", "lower_bound_crop")
RESIZE_RULE = "area or bicubic to a bound, then to whole patches, 256 levels, v1"
"""Part of the fingerprint: change it when the arithmetic changes."""

Size = tuple[int, int]
"""Height and width in pixels."""


def resized_sizes(
    size: Size, resolution: int, patch: int, method: Method = "upper_bound_resize"
) -> tuple[Size, Size]:
    """The size after the bound, and the one after it is fitted to whole patches.

    Args:
        size: (H, W) of the image.
        resolution: pixels of the longer side ("upper") or of the shorter one ("lower").
        patch: pixels on a side of a patch.
        method: fitted by resizing each side to the nearest multiple (a tie goes up), or by cropping.

    Raises:
        ConfigError: `resolution` is not a multiple of `patch`, or the method is unknown.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown resizing {method!r}; expected one of {', '.join(METHODS)}.")
    if resolution <= 0 or resolution % patch:
        raise ConfigError(
            f"resolution {resolution} is not a positive multiple of the teacher's patch size {patch}."
        )
    side = max(size) if method.startswith("upper") else min(size)
    scale = resolution / side
    bound = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    if method.endswith("crop"):
        fitted = (max(patch, bound[0] // patch * patch), max(patch, bound[1] // patch * patch))
    else:
        fitted = (_nearest(bound[0], patch), _nearest(bound[1], patch))
    return bound, fitted


def _nearest(pixels: int, patch: int) -> int:
    return max(patch, (pixels + patch // 2) // patch * patch)


def resize(images: Tensor, resolution: int, patch: int, method: Method = "upper_bound_resize") -> Tensor:
    """(N, 3, H, W) in [0, 1] -> (N, 3, H', W') in [0, 1], on 256 levels. Raises like `resized_sizes`."""
    bound, fitted = resized_sizes((images.shape[-2], images.shape[-1]), resolution, patch, method)
    images = _to(_levels(images), bound)
    if method.endswith("crop") and bound[0] >= fitted[0] and bound[1] >= fitted[1]:
        top, left = (bound[0] - fitted[0]) // 2, (bound[1] - fitted[1]) // 2
        return images[..., top : top + fitted[0], left : left + fitted[1]]
    return _to(images, fitted)


def _levels(images: Tensor) -> Tensor:
    return (images * 255).round().clamp(0, 255) / 255


def _to(images: Tensor, size: Size) -> Tensor:
    height, width = images.shape[-2:]
    if (height, width) == size:
        return images
    if size[0] > height or size[1] > width:
        resized = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
    else:
        rows = _areas(height, size[0], images)
        columns = _areas(width, size[1], images)
        resized = rows @ images @ columns.T
    return _levels(resized)


def _areas(source: int, target: int, like: Tensor) -> Tensor:
    """(target, source): the share of each source pixel in a target pixel."""
    scale = source / target
    edge = torch.arange(target + 1, dtype=torch.float64) * scale
    pixel = torch.arange(source, dtype=torch.float64)
    low = torch.maximum(edge[:-1, None], pixel)
    high = torch.minimum(edge[1:, None], pixel + 1)
    return ((high - low).clamp(min=0) / scale).to(like)
