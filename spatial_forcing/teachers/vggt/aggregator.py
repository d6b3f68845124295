"""VGGT's aggregator: attention inside each view and across all views in turn (arXiv 2503.11651, sec. 3.2).

Shapes: B batch, S views, P tokens of one view (camera + registers + h w patches), C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from spatial_forcing.errors import DataError
from spatial_forcing.stem import PatchStem
from spatial_forcing.teachers.layers import Block, Rope2D, resolve_layers
from spatial_forcing.teachers.preprocess import IMAGENET_MEAN, IMAGENET_STD
from spatial_forcing.teachers.vggt.config import VGGTConfig


class ConvPatchEmbed(nn.Module):
    """One strided convolution; the patch embedder of small models."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.embed_dim, config.patch_size, config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised (N, 3, H, W) -> (N, h w, C)."""
        return self.proj(images).flatten(2).transpose(1, 2)


class StemPatchEmbed(nn.Module):
    """Convolutions within each patch, plus a table of position embeddings.

    Rotary embeddings only say how far apart two patches are; with a floor and a table in every image, where a
    patch is says most about its depth.
    """

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        side = config.img_size // config.patch_size
        self.proj = PatchStem(config.embed_dim, config.patch_size)
        self.position = nn.Parameter(torch.empty(1, config.embed_dim, side, side).normal_(std=0.02))

    def forward(self, images: Tensor) -> Tensor:
        """Normalised (N, 3, H, W) -> (N, h w, C); the table is resized to other grids."""
        patches = self.proj(images)
        position: Tensor = self.position
        if position.shape[2:] != patches.shape[2:]:
            position = F.interpolate(position, size=patches.shape[2:], mode="bicubic", align_corners=False)
        return (patches + position).flatten(2).transpose(1, 2)


class DinoPatchEmbed(nn.Module):
    """DINOv2 with registers from transformers; its numbers agree with the original embedder's.

    Attention masks, drop path and SwiGLU stay off, as in the published model. Parameter names are
    transformers' own, so checkpoints go through `keys.py`.
    """

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        vit = config.dinov2
        # transformers declares an integer ratio and refuses 4.0 where it checks types.
        ratio = int(vit.mlp_ratio) if float(vit.mlp_ratio).is_integer() else vit.mlp_ratio
        self.num_prefix_tokens = 1 + vit.num_register_tokens
        self.model = Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(
                hidden_size=config.embed_dim,
                num_hidden_layers=vit.depth,
                num_attention_heads=vit.num_heads,
                mlp_ratio=ratio,
                num_register_tokens=vit.num_register_tokens,
                image_size=config.img_size,
                patch_size=config.patch_size,
                layer_norm_eps=1e-6,
                attn_implementation="sdpa",
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        """Normalised (N, 3, H, W) -> final-normed patch tokens (N, h w, C)."""
        # A CPU gains nothing from more than one image at a time, and each costs memory.
        one_by_one = images.device.type == "cpu" and not torch.is_grad_enabled()
        tokens = [
            self.model(pixel_values=part).last_hidden_state[:, self.num_prefix_tokens :]
            for part in (images.split(1) if one_by_one else (images,))
        ]
        return torch.cat(tokens) if one_by_one else tokens[0]


PATCH_EMBEDDERS: dict[str, Callable[[VGGTConfig], nn.Module]] = {
    "conv": ConvPatchEmbed,
    "dinov2": DinoPatchEmbed,
    "stem": StemPatchEmbed,
}


class Aggregator(nn.Module):
    """Images of one scene to tokens in which every view has seen all others.

    Each layer is a frame block (attention within a view) followed by a global block (across views);
    its output is both results side by side. There is no final norm.
    """

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PATCH_EMBEDDERS[config.patch_embed](config)
        self.rope = Rope2D(config.rope_freq)
        # Index 0 belongs to the first view (the reference frame of the scene), index 1 to all others.
        self.camera_token = nn.Parameter(torch.empty(1, 2, 1, config.embed_dim).normal_(std=1e-6))
        self.register_token = nn.Parameter(
            torch.empty(1, 2, config.num_register_tokens, config.embed_dim).normal_(std=1e-6)
        )
        self.frame_blocks = self._blocks()
        self.global_blocks = self._blocks()

    def _blocks(self) -> nn.ModuleList:
        c = self.config
        return nn.ModuleList(
            Block(c.embed_dim, c.num_heads, c.mlp_ratio, c.init_values, c.qk_norm) for _ in range(c.depth)
        )

    @property
    def patch_start_idx(self) -> int:
        """Index of the first patch token of a view: after the camera token and the registers."""
        return 1 + self.config.num_register_tokens

    def forward(self, images: Tensor, layers: Sequence[int] = (-1,)) -> tuple[Tensor, ...]:
        """Encode the views of each scene together; blocks after the last asked layer do not run.

        Args:
            images: (B, S, 3, H, W) in [0, 1], H and W multiples of the patch size.
            layers: 0-based layer numbers, negative from the end.

        Returns:
            One (B, S, P, 2C) tensor for each entry of `layers`, in that order: the frame block's
            output beside the global block's. Patch tokens start at `patch_start_idx`, row-major.

        Raises:
            ConfigError: a layer does not exist.
            DataError: the image size is not a multiple of the patch size.
        """
        wanted = resolve_layers(layers, self.config.depth)
        B, S = images.shape[:2]
        tokens, rope = self._embed(images)
        cos, sin = rope
        rope_all = (cos.repeat(S, 1), sin.repeat(S, 1))
        outputs: dict[int, Tensor] = {}
        for layer in range(max(wanted) + 1):
            frame = self.frame_blocks[layer](tokens.flatten(0, 1), rope).unflatten(0, (B, S))
            tokens = self.global_blocks[layer](frame.flatten(1, 2), rope_all).unflatten(1, (S, -1))
            if layer in wanted:
                outputs[layer] = torch.cat([frame, tokens], dim=-1)
        return tuple(outputs[layer] for layer in wanted)

    def activation_bytes(self, views: int, height: int, width: int, layers: int = 1) -> int:
        """Upper estimate of what encoding one scene without gradients takes beyond the weights.

        Counts float32: the images on their way in, the residual stream, a norm's output, queries, keys and
        values before and after their norms, an MLP's hidden layer, and the outputs of `layers` kept layers.
        """
        c = self.config
        tokens = views * (self.patch_start_idx + (height // c.patch_size) * (width // c.patch_size))
        channels = c.embed_dim * (8 + 2 * c.mlp_ratio + 2 * layers)
        return int(4 * (tokens * channels + 3 * views * 3 * height * width))

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Tokens (B, S, P, C) and the rotary angles of one view's P positions."""
        B, S, _, H, W = images.shape
        patch = self.config.patch_size
        if H % patch or W % patch:
            raise DataError(
                f"VGGT images are {H} x {W} pixels, which is not a multiple of the patch size {patch}; "
                "resize them first."
            )
        # Not buffers: a model built on the meta device would leave them without values.
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        images = (images - mean) / std
        patches = self.patch_embed(images.flatten(0, 1)).unflatten(0, (B, S))
        special = torch.cat([self.camera_token, self.register_token], dim=2)
        which = torch.ones(S, dtype=torch.long, device=images.device)
        which[0] = 0
        special = special[:, which].expand(B, -1, -1, -1)
        tokens = torch.cat([special, patches], dim=2)

        rows = torch.arange(1, H // patch + 1, device=images.device)
        columns = torch.arange(1, W // patch + 1, device=images.device)
        positions = torch.cat(
            [torch.zeros(self.patch_start_idx, 2, device=images.device), torch.cartesian_prod(rows, columns)]
        )
        return tokens, self.rope.table(positions, self.config.embed_dim // self.config.num_heads)
