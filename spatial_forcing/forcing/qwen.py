"""Qwen-VL's images as views: its processor cuts them into patches, in the order in which they are merged.

For `as_student` on Qwen2-VL, Qwen2.5-VL, Qwen3-VL and models built on them (StarVLA). Views are undone from
`pixel_values`, so they show exactly what the model sees.

Shapes: B samples, V views, h x w tokens of a view, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from spatial_forcing.alignment import TokenLayout, Views
from spatial_forcing.errors import DataError
from spatial_forcing.forcing.layout import layout_from_input_ids

PIXELS, GRID, IDS = "pixel_values", "image_grid_thw", "input_ids"


class QwenImages(Protocol):
    """The part of Qwen's image processor (`processor.image_processor`) that says how images were cut."""

    image_mean: Sequence[float]
    image_std: Sequence[float]
    patch_size: int
    temporal_patch_size: int
    merge_size: int


def views_from_qwen(
    batch: Mapping[str, Any], cameras: Sequence[str], processor: QwenImages, *, keys: Tensor | None = None
) -> Views:
    """The images of a batch as Qwen's processor made it, put together again.

    Args:
        batch: `pixel_values` (patches, 3 x temporal x patch x patch) and `image_grid_thw` (images, 3); the
            images of a sample follow each other, in the order of `cameras`.
        cameras: V names.
        processor: the image processor that made them. Its mean and deviation differ between Qwen2.5-VL and
            Qwen3-VL.
        keys: (B,) frame indices, for a cached teacher; pixels are then never put together.

    Raises:
        DataError: a key is missing, images of different sizes, videos, another number of images or patches.
    """
    count, (rows, columns) = _grid(batch, len(cameras))
    patches = _entry(batch, PIXELS)
    patch, merge, frames = processor.patch_size, processor.merge_size, processor.temporal_patch_size
    width = 3 * frames * patch**2
    if tuple(patches.shape) != (count * rows * columns, width):
        raise DataError(
            f"{PIXELS} is {tuple(patches.shape)}; expected ({count * rows * columns}, {width}) for {count} "
            f"images of {rows} x {columns} patches of {patch} px. Give the processor that made it."
        )
    samples = count // len(cameras)

    def images() -> Tensor:
        # A block of merge x merge patches is one token; of the repeated frames the first one is enough.
        cut = patches.float().reshape(
            count, rows // merge, columns // merge, merge, merge, 3, frames, patch, patch
        )[:, :, :, :, :, :, 0]
        whole = cut.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(count, 3, rows * patch, columns * patch)
        mean, std = (whole.new_tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
        return (whole * std + mean).unflatten(0, (samples, len(cameras)))

    return Views.create(
        images,
        cameras,
        keys=keys,
        shape=(samples, len(cameras), rows * patch, columns * patch),
        device=patches.device,
    )


def layout_from_qwen(
    batch: Mapping[str, Any], cameras: Sequence[str], token: int, processor: QwenImages
) -> TokenLayout:
    """Where the tokens of such a batch are: `token` in `input_ids`, merge x merge patches each.

    Args:
        batch, cameras, processor: see `views_from_qwen`.
        token: the placeholder, `model.config.image_token_id`.

    Raises:
        DataError: like `views_from_qwen`.
        LayoutError: another number of placeholders than of tokens.
    """
    _, (rows, columns) = _grid(batch, len(cameras))
    grid = (rows // processor.merge_size, columns // processor.merge_size)
    ids = _entry(batch, IDS)
    return layout_from_input_ids(ids, token, [[grid] * len(cameras)] * len(ids))


def _grid(batch: Mapping[str, Any], views: int) -> tuple[int, tuple[int, int]]:
    """The number of images, and the patches (rows, columns) that all of them have."""
    grids = _entry(batch, GRID)
    sizes = torch.unique(grids, dim=0).tolist()
    if len(sizes) != 1 or sizes[0][0] != 1:
        raise DataError(
            f"{GRID} holds {sizes} (frames, rows, columns); expected one size, and one frame. Resize the "
            "cameras to one size before the processor."
        )
    if not views or len(grids) % views:
        raise DataError(f"{GRID} holds {len(grids)} images, which are not samples of {views} cameras.")
    return len(grids), (sizes[0][1], sizes[0][2])


def _entry(batch: Mapping[str, Any], key: str) -> Tensor:
    value = batch.get(key)
    if not isinstance(value, Tensor):
        raise DataError(f"the batch has no tensor {key!r}; it has {', '.join(map(str, batch))}.")
    return value
