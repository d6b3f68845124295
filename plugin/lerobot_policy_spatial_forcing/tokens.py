"""Where the policies' image tokens are: in the image (framing) and in the sequence (layout).

Shapes: B batch, V view, h x w tokens of a view.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spatial_forcing.alignment import TokenLayout, compose
from spatial_forcing.data.geometry import Size, from_pixels, resize_map
from spatial_forcing.data.letterbox import placement_map
from spatial_forcing.errors import DataError
from spatial_forcing.forcing import layout_from_input_ids, layout_from_offset

Framing = Callable[[Any, Size], tuple[Tensor, Size]]
"""(policy, size of a view as delivered) -> map (2, 3) from the token image to the view, its size."""

Layout = Callable[[Any, Mapping[str, Any], Sequence[str]], TokenLayout]
"""(policy, batch, keys of the views in the batch, in the sequence's order) -> layout of them all."""


def pi_framing(policy: Any, source: Size) -> tuple[Tensor, Size]:
    """pi0, pi0.5, pi0-FAST: fitted into a square, centred."""
    height, width = policy.config.image_resolution
    return placement_map(source, (height, width)), (height, width)


def paligemma_layout(policy: Any, batch: Mapping[str, Any], keys: Sequence[str]) -> TokenLayout:
    """Views first, one after the other, a SigLIP grid each; missing views come later and are masked."""
    vision = policy.model.paligemma_with_expert.paligemma.config.vision_config
    side = policy.config.image_resolution[0] // vision.patch_size
    B = len(batch[keys[0]])
    return layout_from_offset(B, len(keys), (side, side), start=0, device=batch[keys[0]].device)


def smolvla_framing(policy: Any, source: Size) -> tuple[Tensor, Size]:
    """SmolVLA: fitted into a square, at its bottom right (padding on the left and the top)."""
    target = policy.config.resize_imgs_with_padding
    return bottom_right(source, None if target is None else (target[1], target[0]))


def bottom_right(source: Size, target: Size | None) -> tuple[Tensor, Size]:
    """Fitted into `target` with its aspect kept, padding on the left and the top; None: as it is."""
    if target is None or source == target:
        return torch.eye(2, 3), source
    height, width = target
    ratio = max(source[1] / width, source[0] / height)
    fitted = torch.tensor([int(source[1] / ratio), int(source[0] / ratio)], dtype=torch.float64)
    scale = torch.tensor([source[1], source[0]], dtype=torch.float64) / fitted
    margin = torch.tensor([width, height], dtype=torch.float64) - fitted
    shift = (0.5 - margin) * scale - 0.5
    return from_pixels(torch.diag(scale), shift, source, (height, width)), (height, width)


def smolvla_layout(policy: Any, batch: Mapping[str, Any], keys: Sequence[str]) -> TokenLayout:
    """Views first; with special tokens, a start before and an end after each view's pixel-shuffled grid."""
    model = policy.model
    config = model.vlm_with_expert.config
    image = batch[keys[0]]
    _, size = smolvla_framing(policy, (image.shape[-2], image.shape[-1]))
    cell = config.vision_config.patch_size * config.scale_factor
    grid = (size[0] // cell, size[1] // cell)
    before = after = 0
    if model.add_image_special_tokens:
        before, after = model.global_image_start_token.numel(), model.image_end_token.numel()
    masks = [batch.get(f"{key}_padding_mask") for key in keys]
    here = [
        torch.ones(len(image), dtype=torch.bool, device=image.device) if m is None else m.bool()
        for m in masks
    ]
    return layout_from_offset(
        len(image),
        len(keys),
        grid,
        start=before,
        stride=before + grid[0] * grid[1] + after,
        valid=torch.stack(here, 1),
        device=image.device,
    )


def xvla_framing(policy: Any, source: Size) -> tuple[Tensor, Size]:
    """X-VLA: as delivered, or fitted like SmolVLA's (here the setting is height, width).

    DaViT's strided convolutions are centred on the first pixel of a cell, not on its middle, so the token
    image begins half a cell before the picture.
    """
    target = policy.config.resize_imgs_with_padding
    fitted, size = bottom_right(source, None if target is None else (target[0], target[1]))
    half = math.prod(policy.model.vlm.config.vision_config.patch_stride) / 2
    shift = from_pixels(torch.eye(2), torch.full((2,), -half), size, size)
    return compose(fitted, shift), size


def xvla_layout(policy: Any, batch: Mapping[str, Any], keys: Sequence[str]) -> TokenLayout:
    """The first view only: one pooled token, then DaViT's grid (a cell is the product of its strides)."""
    image = batch[keys[0]]
    size = policy.config.resize_imgs_with_padding or (image.shape[-2], image.shape[-1])
    for stride in policy.model.vlm.config.vision_config.patch_stride:
        size = (-(-size[0] // stride), -(-size[1] // stride))
    return layout_from_offset(len(image), 1, size, start=1, device=image.device)


RESNET_STRIDE = 32
"""Pixels of one cell of a ResNet's last feature map; 16 where its last stride is a dilation."""


def _resnet_stride(policy: Any) -> int:
    return RESNET_STRIDE // (2 if policy.config.replace_final_stride_with_dilation else 1)


def act_framing(policy: Any, source: Size) -> tuple[Tensor, Size]:
    """ACT: as delivered; a ResNet's strided convolutions are centred on the first pixel of a cell."""
    half = _resnet_stride(policy) / 2
    return from_pixels(torch.eye(2), torch.full((2,), -half), source, source), source


def act_layout(policy: Any, batch: Mapping[str, Any], keys: Sequence[str]) -> TokenLayout:
    """Latent, then robot and environment state where there are any, then every camera's feature map."""
    sizes = {tuple(batch[key].shape[-2:]) for key in keys}
    if len(sizes) > 1:
        raise DataError(
            f"the cameras {list(keys)} differ in size ({sorted(sizes)}), so ACT's feature maps differ, too; "
            "resize them to one size in the dataset."
        )
    image, stride = batch[keys[0]], _resnet_stride(policy)
    grid = (-(-image.shape[-2] // stride), -(-image.shape[-1] // stride))
    config = policy.config
    start = 1 + (config.robot_state_feature is not None) + (config.env_state_feature is not None)
    return layout_from_offset(len(image), len(keys), grid, start=start, device=image.device)


def sequence_first(calls: Sequence[Tensor]) -> Tensor:
    """(L, B, D) to (B, L, D)."""
    return calls[0].transpose(0, 1)


def qwen_framing(policy: Any, source: Size) -> tuple[Tensor, Size]:
    """Qwen-VL: squashed to a near multiple of a token's side; no padding, so the target's size is moot."""
    return resize_map(source, source), source


def qwen_layout(policy: Any, batch: Mapping[str, Any], keys: Sequence[str]) -> TokenLayout:
    """Placeholders in `input_ids`; grids of any size, padded sequences on either side."""
    config = policy.model.vlm_backbone.config
    merge = config.vision_config.spatial_merge_size
    B = len(batch["input_ids"])
    cells = (batch["image_grid_thw"][:, 1:] // merge).view(B, len(keys), 2).tolist()
    grids = [[(int(rows), int(columns)) for rows, columns in sample] for sample in cells]
    return layout_from_input_ids(batch["input_ids"], config.image_token_id, grids, views=len(keys))
