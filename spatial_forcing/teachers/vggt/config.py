"""The configuration of a VGGT. Its defaults are the published VGGT-1B (Wang et al., arXiv 2503.11651)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from spatial_forcing.errors import ConfigError
from spatial_forcing.stem import fits_stem
from spatial_forcing.teachers.dpt import DPTConfig
from spatial_forcing.teachers.files import checked_settings

HUB_ONLY_KEYS = ("enable_track",)
"""Keys of published `config.json` files that describe parts this package never builds."""


@dataclass(frozen=True)
class DinoV2Config:
    """The DINOv2 ViT (with registers) that embeds patches; width, patch and image size are the VGGT's.

    Attributes:
        depth: number of transformer blocks.
        num_heads: attention heads of a block.
        mlp_ratio: hidden width of a block's MLP over the embedding width.
        num_register_tokens: DINOv2's own registers, dropped after the last block.
    """

    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_register_tokens: int = 4


@dataclass(frozen=True)
class CameraHeadConfig:
    """The iterative camera head: a small transformer over the camera tokens of all views."""

    trunk_depth: int = 4
    num_heads: int = 16
    mlp_ratio: float = 4.0
    iterations: int = 4
    init_values: float = 0.01


@dataclass(frozen=True)
class VGGTConfig:
    """Everything that fixes a VGGT's parameters and arithmetic.

    Attributes:
        img_size: pixels on a side it was trained at (DINOv2's position table has this size).
        patch_size: pixels on a side of a patch.
        embed_dim: C, channels of one token; features have 2 C (frame and global halves).
        depth: number of frame / global block pairs, that is of layers.
        num_heads, mlp_ratio, qk_norm, init_values: of every block; `init_values` starts LayerScale.
        num_register_tokens: register tokens a view, beside its camera token.
        patch_embed: "dinov2" (ViT with registers), "conv" (one strided convolution) or "stem" (a few
            convolutions and a table of positions, for models trained from scratch in little time).
        rope_freq: base of the 2D rotary embedding.
        dinov2, camera, dpt: the parts.
        enable_camera, enable_depth, enable_point: which heads exist.

    Raises:
        ConfigError: sizes that do not divide, layers out of range.
    """

    img_size: int = 518
    patch_size: int = 14
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_register_tokens: int = 4
    patch_embed: Literal["conv", "dinov2", "stem"] = "dinov2"
    rope_freq: float = 100.0
    qk_norm: bool = True
    init_values: float = 0.01
    dinov2: DinoV2Config = field(default_factory=DinoV2Config)
    camera: CameraHeadConfig = field(default_factory=CameraHeadConfig)
    dpt: DPTConfig = field(default_factory=DPTConfig)
    enable_camera: bool = True
    enable_depth: bool = True
    enable_point: bool = True

    def __post_init__(self) -> None:
        if self.patch_embed not in ("conv", "dinov2", "stem"):
            raise ConfigError(f"VGGT patch_embed is {self.patch_embed!r}; expected conv, dinov2 or stem.")
        if self.patch_embed == "stem" and not fits_stem(self.patch_size):
            raise ConfigError(
                f"VGGT patch_size is {self.patch_size}; patch_embed='stem' needs 4 times a power of two."
            )
        if self.img_size % self.patch_size:
            raise ConfigError(
                f"VGGT img_size {self.img_size} is not a multiple of patch_size {self.patch_size}."
            )
        if self.embed_dim % (4 * self.num_heads):
            raise ConfigError(
                f"VGGT embed_dim {self.embed_dim} must be a multiple of 4 x num_heads ({self.num_heads}): "
                "the 2D rotary embedding splits each head's channels in four."
            )
        if self.patch_embed == "dinov2" and self.embed_dim % self.dinov2.num_heads:
            raise ConfigError(
                f"VGGT embed_dim {self.embed_dim} is not a multiple of dinov2.num_heads "
                f"{self.dinov2.num_heads}."
            )
        dense = self.enable_depth or self.enable_point
        if dense and not all(0 <= layer < self.depth for layer in self.dpt.layers):
            raise ConfigError(f"VGGT dpt.layers {self.dpt.layers} do not exist; the depth is {self.depth}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VGGTConfig:
        """Read `to_dict`'s output or a published `config.json`; what is not named keeps VGGT-1B's value.

        Raises:
            ConfigError: unknown key.
        """
        values = {key: value for key, value in values.items() if key not in HUB_ONLY_KEYS}
        parts = {"dinov2": DinoV2Config, "camera": CameraHeadConfig, "dpt": DPTConfig}
        for name, part in parts.items():
            if name in values:
                values[name] = part(**checked_settings(part, values[name], name))
        return cls(**checked_settings(cls, values, "VGGT"))
