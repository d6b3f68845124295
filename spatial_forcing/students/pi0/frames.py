"""The images of a batch as pi0 sees them: letterboxed, in [-1, 1], with masks of padding and presence.

Shapes: B batch, V view, H x W pixels as delivered, S the model's image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spatial_forcing.data.letterbox import letterbox_mask, placement_map, resize_with_pad_tensor
from spatial_forcing.errors import DataError
from spatial_forcing.protocols import Batch
from spatial_forcing.views import (
    FRAME_PREFIX,
    FRAME_VALID_SUFFIX,
    GEOMETRY_PREFIX,
    IMAGE_PREFIX,
    Views,
    compose,
    identity_map,
)

VALID_PREFIX = "valid."
"""`valid.<camera>` (B, H, W) bool marks the picture in images that were letterboxed before."""


@dataclass(frozen=True)
class Frames:
    """What the model sees.

    Attributes:
        pixels: (B, V, 3, S, S) float32 in [-1, 1]; -1 on padding and where a view is absent.
        valid: (B, V, S, S) bool; False on padding and where a view is absent.
        present: (B, V) bool.
    """

    pixels: Tensor
    valid: Tensor
    present: Tensor


def frames_from_batch(batch: Batch, cameras: Sequence[str], size: int) -> Frames:
    """Letterbox the batch's images as openpi does: centred, antialiased, black padding.

    `<image key>_is_pad` (B,) marks absent views, `valid.<camera>` earlier padding.

    Raises:
        DataError: a camera is missing from the batch, or an image that is present is not in [0, 1].
    """
    pixels = torch.stack([_fitted(batch, camera, size) for camera in cameras], 1)
    return Frames(pixels, picture_mask(batch, cameras, size), _presence(batch, cameras))


def picture_mask(batch: Batch, cameras: Sequence[str], size: int) -> Tensor:
    """`Frames.valid` without the pixels: (B, V, S, S) bool, False on padding and where a view is absent."""
    return torch.stack([_picture(batch, camera, size) for camera in cameras], 1)


def views_of(batch: Batch, cameras: Sequence[str], size: int) -> Views:
    """What the teacher should see: the images as delivered, without the letterbox's black bars.

    Where the loader kept the stored frames (`frame.<camera>`, for a cached teacher), those. The letterbox is
    part of `student_to_view`, so that tokens on padding have no target. Images that differ in size between
    cameras cannot be encoded together; they are letterboxed first and masked.

    Raises:
        DataError: see `frames_from_batch`; or stored frames of different sizes.
    """
    present, keys = _presence(batch, cameras), batch.get("index")
    shown = [batch.get(FRAME_PREFIX + camera, _image(batch, camera)) for camera in cameras]
    if len({image.shape for image in shown}) > 1:
        if any(FRAME_PREFIX + camera in batch for camera in cameras):
            sizes = {c: tuple(image.shape[-2:]) for c, image in zip(cameras, shown, strict=True)}
            raise DataError(
                f"the stored frames differ in size ({sizes}), so they cannot have been cached together; "
                "train with a live teacher, or record the cameras at one size."
            )
        own = frames_from_batch(batch, cameras, size)
        return Views.create(
            (own.pixels + 1) / 2,
            cameras,
            present=present,
            valid=own.valid | ~present[..., None, None],
            keys=keys,
        )
    maps, valid = [], []
    for camera, frame in zip(cameras, shown, strict=True):
        image = _image(batch, camera)
        letterbox = placement_map((image.shape[-2], image.shape[-1]), (size, size)).to(image.device)
        geometry = batch.get(GEOMETRY_PREFIX + camera, identity_map(len(image), device=image.device))
        maps.append(compose(geometry.float(), letterbox.expand(len(image), 2, 3)))
        kept = FRAME_PREFIX + camera in batch  # a mask of the delivered image says nothing about the frame
        of_frame = batch.get(FRAME_PREFIX + camera + FRAME_VALID_SUFFIX)
        mask = of_frame if kept else _mask(batch, camera, image)
        everything = torch.ones(len(frame), *frame.shape[-2:], dtype=torch.bool, device=frame.device)
        valid.append(everything if mask is None else mask)
    return Views.create(
        torch.stack(shown, 1),
        cameras,
        present=present,
        valid=torch.stack(valid, 1),
        student_to_view=torch.stack(maps, 1),
        keys=keys,
    )


def _fitted(batch: Batch, camera: str, size: int) -> Tensor:
    """One view's pixels, (B, 3, S, S) in [-1, 1]."""
    image = _image(batch, camera)
    here = _presence(batch, (camera,))
    # Views checks the range and blanks absent views, which may hold anything.
    own = Views.create(image[:, None], (camera,), present=here).images[:, 0]
    fitted = resize_with_pad_tensor(own * 2 - 1, (size, size), antialias=True)
    return torch.where(here[..., None, None], fitted, fitted.new_tensor(-1.0))


def _picture(batch: Batch, camera: str, size: int) -> Tensor:
    """One view's valid pixels, (B, S, S)."""
    image = _image(batch, camera)
    picture = letterbox_mask((image.shape[-2], image.shape[-1]), (size, size)).to(image.device)
    mask = _mask(batch, camera, image)
    if mask is not None:
        picture = picture & (resize_with_pad_tensor(mask[:, None].float() * 2 - 1, (size, size))[:, 0] > 0)
    return picture & _presence(batch, (camera,))[..., None]


def _presence(batch: Batch, cameras: Sequence[str]) -> Tensor:
    """(B, V) bool."""
    rows = []
    for camera in cameras:
        image = _image(batch, camera)
        absent = batch.get(IMAGE_PREFIX + camera + "_is_pad")
        everywhere = torch.ones(len(image), dtype=torch.bool, device=image.device)
        rows.append(everywhere if absent is None else ~absent.to(image.device, torch.bool))
    return torch.stack(rows, 1)


def _image(batch: Batch, camera: str) -> Tensor:
    key = IMAGE_PREFIX + camera
    if key not in batch:
        keys = [k for k in batch if k.startswith(IMAGE_PREFIX) and not k.endswith("_is_pad")]
        there = sorted(k.removeprefix(IMAGE_PREFIX) for k in keys)
        raise DataError(
            f"camera {camera!r} is not in the batch (no key {key!r}); it has {there}. "
            "Change the student's cameras or record the missing one."
        )
    image: Tensor = batch[key]
    return image


def _mask(batch: Batch, camera: str, image: Tensor) -> Tensor | None:
    """The batch's own pixel mask (B, H, W) of an image, if it has one."""
    mask = batch.get(VALID_PREFIX + camera)
    if mask is None:
        return None
    shape = (len(image), *image.shape[-2:])
    if tuple(mask.shape) != shape:
        raise DataError(f"valid.{camera} is {tuple(mask.shape)}; expected {shape}, one value a pixel.")
    found: Tensor = mask.to(image.device, torch.bool)
    return found
