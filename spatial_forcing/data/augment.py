"""Image augmentation that reports its geometry, so that a teacher's features can follow it.

One crop and rotation a view and sample, combined with the letterbox into one affine map; no mirroring, which
would need mirrored actions, state and language.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_forcing.alignment import compose, identity_map
from spatial_forcing.data.geometry import Size, crop_map, from_pixels
from spatial_forcing.errors import ConfigError


@dataclass(frozen=True)
class Augment:
    """What is drawn for each view of each sample.

    Attributes:
        crop_area: range of the crop's share of the area; (1, 1) is no crop.
        crop_aspect: range of the crop's aspect ratio relative to the image's.
        rotation: largest angle in degrees, either way.
        brightness: factors are drawn from 1 - x to 1 + x.
        contrast: likewise.
        saturation: likewise.
        fixed_views: cameras that get no crop or rotation (openpi leaves wrist cameras alone).
    """

    crop_area: tuple[float, float] = (0.9, 1.0)
    crop_aspect: tuple[float, float] = (1.0, 1.0)
    rotation: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    fixed_views: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise ConfigError(f"augment.crop_area is {self.crop_area}; expected 0 < low <= high <= 1.")
        if not 0 < self.crop_aspect[0] <= self.crop_aspect[1]:
            raise ConfigError(f"augment.crop_aspect is {self.crop_aspect}; expected 0 < low <= high.")
        if not 0 <= self.rotation <= 45:
            raise ConfigError(f"augment.rotation is {self.rotation}; expected 0 to 45 degrees.")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augment.{name} is {getattr(self, name)}; expected 0 to 1.")

    @property
    def photometric(self) -> bool:
        """Whether colours change."""
        return max(self.brightness, self.contrast, self.saturation) > 0

    def draw(self, rng: np.random.Generator, camera: str, size: Size) -> Draw:
        """One view's parameters for a student image of `size`; the same number of draws in every case."""
        area, aspect, *place, angle, bright, contrast, saturated = rng.random(8).tolist()
        colours = [
            1 + spread * (2 * share - 1)
            for spread, share in (
                (self.brightness, bright),
                (self.contrast, contrast),
                (self.saturation, saturated),
            )
        ]
        if camera in self.fixed_views:
            return Draw(identity_map(), *colours)
        area = self.crop_area[0] + area * (self.crop_area[1] - self.crop_area[0])
        narrow, wide = self.crop_aspect
        aspect = narrow * (wide / narrow) ** aspect
        extent = (min(1.0, math.sqrt(area * aspect)), min(1.0, math.sqrt(area / aspect)))
        centre = ((2 * place[0] - 1) * (1 - extent[0]), (2 * place[1] - 1) * (1 - extent[1]))
        return Draw(crop_map(centre, extent, (2 * angle - 1) * self.rotation, size), *colours)


@dataclass(frozen=True)
class Draw:
    """Drawn parameters of one view: `affine` (2, 3) from the student's image to the uncropped one, and
    colour factors, 1 for no change.
    """

    affine: Tensor
    brightness: float
    contrast: float
    saturation: float


def colour_jitter(
    images: Tensor, brightness: Sequence[float], contrast: Sequence[float], saturation: Sequence[float]
) -> Tensor:
    """Scale brightness, then contrast about each image's mean, then saturation about each pixel's mean.

    Args:
        images: (N, 3, H, W) float in [0, 1].
        brightness, contrast, saturation: N factors each.

    Returns:
        (N, 3, H, W) float, clamped to [0, 1].
    """

    def column(factors: Sequence[float]) -> Tensor:
        return torch.as_tensor(factors, dtype=images.dtype, device=images.device).reshape(-1, 1, 1, 1)

    bright, contrasted, saturated = column(brightness), column(contrast), column(saturation)
    mean = images.mean((1, 2, 3), keepdim=True) * bright
    jittered = (images * (bright * contrasted)).add_(mean * (1 - contrasted))
    grey = jittered.mean(1, keepdim=True)
    return jittered.mul_(saturated).add_(grey * (1 - saturated)).clamp_(0, 1)


def openpi_crop_rotate(
    images: Tensor, crop: tuple[int, int, int, int], degrees: float
) -> tuple[Tensor, Tensor]:
    """Openpi's geometric augmentation with given parameters, its two resamplings included, for parity.

    Args:
        images: (N, 3, H, W) float.
        crop: (top, left, height, width) in pixels, resized back bilinearly.
        degrees: rotation after the crop.

    Returns:
        The images, and the one (2, 3) map from the result to the input that both steps amount to.
    """
    top, left, height, width = crop
    size: Size = (images.shape[-2], images.shape[-1])
    cropped = images[..., top : top + height, left : left + width]
    resized = F.interpolate(cropped, size, mode="bilinear", align_corners=False)
    angle = torch.tensor(degrees, dtype=torch.float32) * torch.pi / 180
    cosine, sine = angle.cos(), angle.sin()
    # The published grid spans [-1, 1] at pixel centres but is read as edge-to-edge: it magnifies by
    # size / (size - 1). The reported map says so.
    y, x = torch.meshgrid(torch.linspace(-1, 1, size[0]), torch.linspace(-1, 1, size[1]), indexing="ij")
    grid = torch.stack([x * cosine - y * sine, x * sine + y * cosine], -1).expand(len(images), *size, 2)
    turned = F.grid_sample(resized, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    spread = torch.tensor([size[1] / max(1, size[1] - 1), size[0] / max(1, size[0] - 1)])
    turn = torch.stack([torch.stack([cosine, -sine]), torch.stack([sine, cosine])])
    rotation = torch.cat([turn * spread.unsqueeze(-1), torch.zeros(2, 1)], dim=1)
    scale = torch.tensor([width / size[1], height / size[0]])
    shift = torch.tensor([float(left), float(top)]) + (scale - 1) / 2
    return turned, compose(from_pixels(torch.diag(scale), shift, size, size), rotation)
