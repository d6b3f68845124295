"""Affine resampling: every geometric operation is one map, resampled once, and reported.

A map takes the output's corner-to-corner coordinates to the source's (see `views`): (..., 2, 3) float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_forcing.alignment import compose

Size = tuple[int, int]
"""(height, width) in pixels."""


def from_pixels(linear: Tensor, shift: Tensor, source: Size, target: Size) -> Tensor:
    """The map of a pixel-to-pixel relation.

    Args:
        linear: (..., 2, 2), shift: (..., 2): source pixel = linear @ target pixel + shift, (x, y), where
            (0, 0) is the centre of the top-left pixel.
        source, target: image sizes.

    Returns:
        (..., 2, 3) float32 in corner-to-corner coordinates.
    """
    half_target, half_source = _half_extent(target), _half_extent(source)
    matrix = linear.double() * half_target / half_source.unsqueeze(-1)
    centre = (linear.double() @ half_target.unsqueeze(-1)).squeeze(-1) + shift.double()
    return torch.cat([matrix, (centre / half_source - 1).unsqueeze(-1)], dim=-1).float()


def resize_map(source: Size, target: Size) -> Tensor:
    """The map (2, 3) of a plain resize: the outer pixels' *edges* coincide, as in image libraries."""
    scale = _pixels(source) / _pixels(target)
    return from_pixels(torch.diag(scale), (scale - 1) / 2, source, target)


def letterbox_map(source: Size, target: Size) -> Tensor:
    """The map (2, 3) that fits `source` into `target`, centred, aspect kept, the rest padding."""
    ratio = max(source[0] / target[0], source[1] / target[1])
    margin = (_pixels(target) - _pixels(source) / ratio) / 2
    scale = torch.full((2,), ratio, dtype=torch.float64)
    return from_pixels(torch.diag(scale), (0.5 - margin) * ratio - 0.5, source, target)


def common_frame(sizes: Iterable[Size]) -> Size:
    """The smallest frame that holds images of all `sizes`, in which a teacher encodes cameras together."""
    heights, widths = zip(*sizes, strict=True)
    return max(heights), max(widths)


def letterboxed(images: Tensor, target: Size) -> tuple[Tensor, Tensor]:
    """Fit images into `target`, aspect kept: uint8 (N, 3, *target), and a mask (*target) of the picture.

    Args:
        images: (N, 3, H, W) uint8.
        target: (height, width).
    """
    source = (images.shape[-2], images.shape[-1])
    maps = letterbox_map(source, target).expand(len(images), 2, 3)
    picture = inside(sampling_grid(maps[:1], target), source)[0]
    return (warp(images, maps, target) + 0.5).to(torch.uint8), picture


def crop_map(
    centre: tuple[float, float], extent: tuple[float, float], degrees: float = 0.0, size: Size = (1, 1)
) -> Tensor:
    """The map (2, 3) of a crop, turned about its own centre.

    Args:
        centre: (x, y) in [-1, 1].
        extent: (x, y) in (0, 1], the crop's share of each side.
        degrees: the picture turns counter-clockwise for positive angles.
        size: (height, width) of the output, needed for an angle: it turns in pixels.
    """
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    aspect = max(size[1] - 1, 1) / max(size[0] - 1, 1)
    return torch.tensor(
        [
            [extent[0] * cosine, -extent[0] * sine / aspect, centre[0]],
            [extent[1] * sine * aspect, extent[1] * cosine, centre[1]],
        ],
        dtype=torch.float32,
    )


def warp(images: Tensor, maps: Tensor, size: Size) -> Tensor:
    """Resample `images` once.

    What lies more than half a pixel outside an image is black. Where the maps shrink at least twofold, the
    images are first reduced with antialiasing, so that the result does not alias.

    Args:
        images: (N, C, H, W) uint8, or float.
        maps: (N, 2, 3), output coordinates to source coordinates.
        size: (height, width) of the output.

    Returns:
        (N, C, *size), float32 in the range of the input.
    """
    source: Size = (images.shape[-2], images.shape[-1])
    pixels = images.float()
    reduced = _reduced_size(maps, source, size)
    if reduced != source:
        pixels = F.interpolate(pixels, reduced, mode="bilinear", antialias=True, align_corners=False)
        maps = compose(resize_map(reduced, source).expand(len(maps), 2, 3), maps)
    grid = sampling_grid(maps.float(), size)
    sampled = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=True)
    if bool(inside(grid[:, :: size[0] - 1 or 1, :: size[1] - 1 or 1], reduced).all()):
        return sampled  # the corners lie inside, so everything does
    return sampled * inside(grid, reduced).unsqueeze(1)


def sampling_grid(maps: Tensor, size: Size) -> Tensor:
    """Where `maps` (N, 2, 3) take every pixel of an output of `size`: (N, H, W, 2), x first."""
    y, x = (torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in size)
    rows = maps[:, :, 1, None] * y + maps[:, :, 2, None]  # (N, 2, H)
    columns = maps[:, :, 0, None] * x  # (N, 2, W)
    return torch.stack([rows[:, i, :, None] + columns[:, i, None, :] for i in range(2)], dim=-1)


def inside(points: Tensor, size: Size) -> Tensor:
    """Whether coordinates (..., 2) lie on an image of `size`, up to its pixels' outer edges; bool (...)."""
    limit = 1 + 0.5 / _half_extent(size).float() + 1e-4
    return (points.abs() <= limit).all(-1)


def _reduced_size(maps: Tensor, source: Size, target: Size) -> Size:
    """The size to which images may be reduced before sampling without losing any output detail."""
    steps = maps[:, :, :2].double() * _half_extent(source).unsqueeze(-1) / _half_extent(target)
    factor = float(torch.linalg.matrix_norm(steps, ord=-2).min()) if len(maps) else 1.0
    if factor < 2:
        return source
    return max(1, round(source[0] / int(factor))), max(1, round(source[1] / int(factor)))


def _pixels(size: Size) -> Tensor:
    return torch.tensor([size[1], size[0]], dtype=torch.float64)


def _half_extent(size: Size) -> Tensor:
    """Half the distance between the outer pixels' centres, (x, y); 0.5 for a single pixel."""
    return ((_pixels(size) - 1) / 2).clamp(min=0.5)
