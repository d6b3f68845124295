"""The transformer of Depth Anything 3: a plain ViT some of whose blocks attend to all views of a scene.

Shapes: B scenes, S views, h x w patch grid, P = 1 + h w tokens of a view, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatial_forcing.errors import DataError
from spatial_forcing.registry import unknown
from spatial_forcing.teachers.da3.config import DA3Config
from spatial_forcing.teachers.layers import Block, Rope2D, resolve_layers

Reference = Literal["first", "middle", "saddle_balanced"]
REFERENCES = ("first", "middle", "saddle_balanced")
ROPE_BASE = 100.0
GRID_OFFSET = 0.1
"""Added to the grid before the position table is scaled to it; it moves the samples, so it is arithmetic."""
NORM_EPS = 1e-6
"""Of the two norms of a block. The final norm and those of queries and keys have PyTorch's 1e-5."""


class PatchEmbed(nn.Module):
    """One strided convolution."""

    def __init__(self, config: DA3Config) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.embed_dim, config.patch_size, config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, h w, C)."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Backbone(nn.Module):
    """Images to tokens (arXiv 2511.10647, sec. 3.1); single-view models are plain DINOv2."""

    def __init__(self, config: DA3Config) -> None:
        super().__init__()
        self.config = config
        side = config.img_size // config.patch_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.embed_dim).normal_(std=1e-6))
        if config.any_view:
            # Index 0 belongs to the reference view, index 1 to all others.
            self.camera_token = nn.Parameter(torch.empty(1, 2, config.embed_dim).normal_(std=0.02))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + side**2, config.embed_dim).normal_(std=0.02))
        self.patch_embed = PatchEmbed(config)
        first = config.depth if config.start is None else config.start
        self.blocks = nn.ModuleList(
            Block(
                config.embed_dim,
                config.num_heads,
                config.mlp_ratio,
                1.0,
                qk_norm=number >= first,
                eps=NORM_EPS,
                swiglu=config.swiglu,
            )
            for number in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.embed_dim)
        self.rope = Rope2D(ROPE_BASE)

    def is_global(self, block: int) -> bool:
        """Whether a block attends to all views: those of an odd number, from `start` on."""
        return self.config.start is not None and block >= self.config.start and block % 2 == 1

    def forward(
        self,
        images: Tensor,
        layers: Sequence[int] = (-1,),
        *,
        reference: Reference = "saddle_balanced",
        cameras: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Encode the views of each scene together; blocks after the last asked one do not run.

        Args:
            images: (B, S, 3, H, W), ImageNet-normalised, H and W multiples of the patch size.
            layers: block numbers, negative from the end.
            reference: which of three or more views is the reference; of two, the first one is.
            cameras: (B, S, C) tokens of given poses, in place of the learned ones; no view is reordered then.

        Returns:
            One (B, S, P, D) tensor for each entry of `layers`, in that order, views as given. Token 0 is
            the camera's (the class's, before `start`) and is not normed. D = 2 C of any-view models: the
            state after the newest block that saw a view alone, beside this block's with the final norm.
            D = C of single-view models: this block's, with the final norm.

        Raises:
            ConfigError: a layer does not exist, or `reference` is unknown.
            DataError: the image size is not a multiple of the patch size.
        """
        wanted, start = resolve_layers(layers, self.config.depth), self.config.start
        if reference not in REFERENCES:
            raise unknown("reference view", reference, REFERENCES)
        B, S = images.shape[:2]
        tokens, grid = self._embed(images)
        order: Tensor | None = None
        alone = together = None
        local = tokens
        outputs: dict[int, Tensor] = {}
        for number in range(max(wanted) + 1):
            if start is not None and number == start - 1 and S > 2 and cameras is None:
                order = reference_order(select_reference(tokens[:, :, 0], reference), S)
                tokens = reordered(tokens, order)
            if number == start:
                given = self._camera_tokens(B, S) if cameras is None else cameras
                tokens = torch.cat([given.to(tokens.dtype)[:, :, None], tokens[:, :, 1:]], dim=2)
                alone, together = self._rope(grid, S, tokens.device)
            block = self.blocks[number]
            if self.is_global(number):
                tokens = block(tokens.flatten(1, 2), together).unflatten(1, (S, -1))
            else:
                local = tokens = block(tokens.flatten(0, 1), alone).unflatten(0, (B, S))
            if number in wanted:
                outputs[number] = self._output(local, tokens, order)
        return tuple(outputs[layer] for layer in wanted)

    def _output(self, local: Tensor, tokens: Tensor, order: Tensor | None) -> Tensor:
        normed = torch.cat([tokens[:, :, :1], self.norm(tokens[:, :, 1:]).to(tokens.dtype)], dim=2)
        result = torch.cat([local, normed], dim=-1) if self.config.any_view else normed
        return result if order is None else reordered(result, order.argsort(dim=1))

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, S, P, C) with their positions, and the patch grid."""
        patch = self.config.patch_size
        B, S, _, H, W = images.shape
        if H % patch or W % patch:
            raise DataError(
                f"DA3 images are {H} x {W} pixels, which is not a multiple of the patch size {patch}; "
                "resize them first."
            )
        grid = (H // patch, W // patch)
        patches = self.patch_embed(images.flatten(0, 1))
        tokens = torch.cat([self.cls_token.to(patches.dtype).expand(B * S, -1, -1), patches], dim=1)
        return (tokens + self.positions(grid)).unflatten(0, (B, S)), grid

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table (1, 1 + h w, C) of a patch grid, float32; the class token's row first."""
        table = self.pos_embed.float()
        side = self.config.img_size // self.config.patch_size
        if grid == (side, side):
            return table
        image = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        scale = ((grid[0] + GRID_OFFSET) / side, (grid[1] + GRID_OFFSET) / side)
        with torch.autocast(image.device.type, enabled=False):
            image = F.interpolate(image, scale_factor=scale, mode="bicubic", antialias=False)
        return torch.cat([table[:, :1], image.flatten(2).transpose(1, 2)], dim=1)

    def _camera_tokens(self, batch: int, views: int) -> Tensor:
        which = torch.ones(views, dtype=torch.long, device=self.camera_token.device)
        which[0] = 0
        return self.camera_token[:, which].expand(batch, -1, -1)

    def _rope(
        self, grid: tuple[int, int], views: int, device: torch.device
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Rotary angles of one view's tokens, and of all views' in a global block.

        Across views every patch is at (1, 1): there, only the camera tokens' position differs.
        """
        rows, columns = (torch.arange(1, n + 1, device=device) for n in grid)
        prefix = torch.zeros(1, 2, device=device)
        patches = torch.cartesian_prod(rows, columns)
        head = self.config.embed_dim // self.config.num_heads
        alone = self.rope.table(torch.cat([prefix, patches]), head)
        cos, sin = self.rope.table(torch.cat([prefix, torch.ones_like(patches)]), head)
        return alone, (cos.repeat(views, 1), sin.repeat(views, 1))

    def activation_bytes(self, views: int, height: int, width: int, layers: int = 1) -> int:
        """Upper estimate in float32 of what encoding one scene without gradients takes beyond the weights."""
        c = self.config
        tokens = views * (1 + (height // c.patch_size) * (width // c.patch_size))
        channels = c.embed_dim * (9 + 2 * c.mlp_ratio + 2 * layers)
        return int(4 * (tokens * channels + 3 * views * 3 * height * width))


def select_reference(tokens: Tensor, strategy: Reference) -> Tensor:
    """The reference view of each scene, (B,) int64.

    Args:
        tokens: (B, S, C) class tokens, un-normed.
        strategy: "first", "middle" (S // 2), or "saddle_balanced": the view whose likeness to the others,
            norm and variance are all nearest to the middle of their range over the views. It follows the
            views when they are given in another order, but may jump between frames that look alike.
    """
    B, S = tokens.shape[:2]
    if strategy == "first" or S == 1:
        return torch.zeros(B, dtype=torch.long, device=tokens.device)
    if strategy == "middle":
        return torch.full((B,), S // 2, dtype=torch.long, device=tokens.device)
    tokens = tokens.float()
    unit = F.normalize(tokens, dim=-1)
    likeness = unit @ unit.transpose(1, 2)
    others = (likeness.sum(-1) - likeness.diagonal(dim1=1, dim2=2)) / (S - 1)
    measures = torch.stack([others, tokens.norm(dim=-1), unit.var(dim=-1)])
    low, high = measures.amin(-1, keepdim=True), measures.amax(-1, keepdim=True)
    return ((measures - low) / (high - low + 1e-8) - 0.5).abs().sum(0).argmin(-1)


def reference_order(reference: Tensor, views: int) -> Tensor:
    """(B, S): the reference view first, the others in their order."""
    number = torch.arange(views, device=reference.device).expand(len(reference), -1)
    return torch.where(number == reference[:, None], -1, number).argsort(dim=1)


def reordered(tokens: Tensor, order: Tensor) -> Tensor:
    """`tokens` (B, S, ...) with the views of each scene in `order` (B, S)."""
    return tokens[torch.arange(len(tokens), device=tokens.device)[:, None], order]
