"""Images to the size VGGT encodes, as its authors resize them: bicubic, no antialiasing, no clamp.

Shapes: N images, H x W pixels. Three framings of an image that is not square:

- `fit`: the longer side gets `resolution` pixels, the other keeps its proportion, rounded to whole
  patches. The whole image, nothing else: what `VGGTTeacher` does.
- `pad`: `fit`, then white borders to a square.
- `crop`: the width gets `resolution` pixels; a taller image loses top and bottom. A wide one stays
  wide (the original code cuts it to a strip by a wrapped slice).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_forcing.errors import ConfigError

Mode = Literal["fit", "pad", "crop"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RESIZE_RULE = "bicubic, no antialias, no clamp, fit to whole patches, v1"
"""Part of a teacher's fingerprint: change it when the arithmetic below changes."""
ANTIALIASED_RULE = "bicubic, antialias, clamp, fit to whole patches, v1"
"""The same of teachers that filter before shrinking, and clamp to [0, 1]."""


@dataclass(frozen=True)
class Framed:
    """Resized images and how they relate to the originals.

    Attributes:
        images: (N, 3, H', W'); bicubic overshoot may leave [0, 1].
        valid: (N, H', W') bool; False on padding.
        from_original: (2, 3), corner-to-corner coordinates of the original to those of `images`.
    """

    images: Tensor
    valid: Tensor
    from_original: Tensor


def resized_shape(height: int, width: int, resolution: int, patch: int, mode: Mode) -> tuple[int, int]:
    """(H', W') before padding or cropping: whole patches, at least one.

    Raises:
        ConfigError: `resolution` is not a multiple of `patch`, or the mode is unknown.
    """
    if resolution <= 0 or resolution % patch:
        raise ConfigError(
            f"resolution {resolution} is not a positive multiple of the teacher's patch size {patch}."
        )
    if mode not in ("fit", "pad", "crop"):
        raise ConfigError(f"unknown framing {mode!r}; expected 'fit', 'pad' or 'crop'.")

    def whole_patches(pixels: float) -> int:
        return max(1, round(pixels / patch)) * patch

    if mode == "crop" or width >= height:
        return whole_patches(height * (resolution / width)), resolution
    return resolution, whole_patches(width * (resolution / height))


def resize(
    images: Tensor, resolution: int, patch: int, mode: Mode = "fit", *, antialias: bool = False
) -> Tensor:
    """(N, 3, H, W) -> (N, 3, H', W'), no padding, no cropping. Raises `ConfigError` like `resized_shape`."""
    height, width = images.shape[-2:]
    size = resized_shape(height, width, resolution, patch, mode)
    if size == (height, width):
        return images
    return F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=antialias)


def frame(
    images: Tensor, valid: Tensor, resolution: int, patch: int, mode: Mode, *, antialias: bool = False
) -> Framed:
    """Resize, then pad with white or crop.

    Args:
        images: (N, 3, H, W) in [0, 1].
        valid: (N, H, W) bool.
        resolution: pixels of the longer side (of the width in mode `crop`).
        patch: pixels on a side of a patch.
        mode: see the module's head.
        antialias: filter before shrinking; VGGT does not.

    Raises:
        ConfigError: like `resized_shape`.
    """
    return place(resize(images, resolution, patch, mode, antialias=antialias), valid, resolution, mode)


def place(images: Tensor, valid: Tensor, resolution: int, mode: Mode) -> Framed:
    """Pad resized images with white, or crop them, as `mode` says.

    Args:
        images: (N, 3, H', W') after resizing.
        valid: (N, H, W) bool, of the originals.
        resolution: see `frame`.
        mode: see the module's head.
    """
    height, width = images.shape[-2:]
    mask = F.interpolate(valid[:, None].float(), size=(height, width), mode="nearest")[:, 0] > 0.5
    top = left = bottom = right = 0
    if mode == "pad":
        top, left = (resolution - height) // 2, (resolution - width) // 2
        bottom, right = resolution - height - top, resolution - width - left
    elif height > resolution:
        top = -((height - resolution) // 2)
        bottom = resolution - height - top
    # Negative padding crops.
    images = F.pad(images, (left, right, top, bottom), value=1.0)
    mask = F.pad(mask, (left, right, top, bottom), value=False)
    rows, columns = images.shape[-2:]
    affine = torch.tensor([_axis(width, columns, left), _axis(height, rows, top)], device=images.device)
    matrix = torch.diag_embed(affine[:, 0])
    return Framed(images, mask, torch.cat([matrix, affine[:, 1:]], dim=1))


def _axis(resized: int, final: int, offset: int) -> tuple[float, float]:
    """Scale and shift of one axis, corner-to-corner, for an offset in pixels."""
    if resized == final:
        return 1.0, 0.0
    return (resized - 1) / (final - 1), (resized - 1 + 2 * offset) / (final - 1) - 1
