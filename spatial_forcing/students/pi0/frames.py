"""The images of a batch as pi0 sees them: letterboxed, in [-1, 1], with masks of padding and presence.

Shapes: B batch, V view, H x W pixels as delivered, S the model's image size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_forcing.alignment import (
    CameraImages,
    Views,
    compose,
    identity_map,
)
from spatial_forcing.data.letterbox import letterbox_mask, placement_map, resize_with_pad_tensor


def letterboxed_pixels(source: CameraImages, size: int) -> Tensor:
    """The images as openpi letterboxes them: centred, antialiased, black padding.

    Returns:
        (B, V, 3, S, S) float32 in [-1, 1]; -1 on padding and where a view is absent.

    Raises:
        DataError: an image that is present is not in [0, 1].
    """
    pixels = []
    for number, (camera, image) in enumerate(zip(source.cameras, source.images, strict=True)):
        here = source.present[:, number]
        # Views checks the range and blanks absent views, which may hold anything.
        own = Views.create(image[:, None], (camera,), present=here[:, None]).images[:, 0]
        fitted = resize_with_pad_tensor(own * 2 - 1, (size, size), antialias=True)
        pixels.append(torch.where(here[:, None, None, None], fitted, fitted.new_tensor(-1.0)))
    return torch.stack(pixels, 1)


def picture_mask(source: CameraImages, size: int) -> Tensor:
    """The picture in the model's images: (B, V, S, S) bool, False on padding and where a view is absent."""
    pictures = []
    for number, (image, mask) in enumerate(zip(source.images, source.masks, strict=True)):
        picture = letterbox_mask((image.shape[-2], image.shape[-1]), (size, size)).to(image.device)
        if mask is not None:
            fitted = resize_with_pad_tensor(mask[:, None].float() * 2 - 1, (size, size))
            picture = picture & (fitted[:, 0] > 0)
        pictures.append(picture & source.present[:, number, None, None])
    return torch.stack(pictures, 1)


def views_of(source: CameraImages, size: int) -> Views:
    """What the teacher should see: the frames without the letterbox's black bars.

    The letterbox is part of `student_to_view`, so that tokens on padding have no target. Images that differ
    in size between cameras cannot be encoded together; they are letterboxed first and masked.
    """
    first = source.images[0]
    B, V = source.present.shape
    if not source.stored and len({image.shape for image in source.images}) > 1:
        return Views.create(
            lambda: (letterboxed_pixels(source, size) + 1) / 2,
            source.cameras,
            present=source.present,
            valid=picture_mask(source, size) | ~source.present[..., None, None],
            keys=source.keys,
            shape=(B, V, size, size),
            device=first.device,
        )
    plain = source.views()
    maps, valid = [], []
    for number, (image, geometry) in enumerate(zip(source.images, source.maps, strict=True)):
        letterbox = placement_map((image.shape[-2], image.shape[-1]), (size, size)).to(image.device)
        own = identity_map(B, device=image.device) if geometry is None else geometry.float()
        maps.append(compose(own, letterbox.expand(B, 2, 3)))
        # A mask of the delivered image says nothing about a stored frame.
        mask = source.frame_masks[number] if source.stored else source.masks[number]
        everything = torch.ones(B, *plain.valid.shape[-2:], dtype=torch.bool, device=image.device)
        valid.append(everything if mask is None else mask)
    return Views.create(
        plain.make,
        source.cameras,
        present=source.present,
        valid=torch.stack(valid, 1),
        student_to_view=torch.stack(maps, 1),
        keys=source.keys,
        shape=(B, V, plain.valid.shape[-2], plain.valid.shape[-1]),
        device=first.device,
    )
