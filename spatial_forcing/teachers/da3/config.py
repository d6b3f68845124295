"""Configurations of Depth Anything 3 (Lin et al., arXiv 2511.10647): the published sizes, and their files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spatial_forcing.errors import ConfigError
from spatial_forcing.teachers.files import checked_settings

OWN_SECTION = "spatial_forcing"
"""Section of a `config.json` that this package wrote: the sizes of a model that is none of the published."""


@dataclass(frozen=True)
class DA3HeadConfig:
    """The dense head: depth and rays of any-view models, depth and sky of single-view ones.

    Attributes:
        layers: the four blocks that feed it.
        features: channels in the fusion path.
        out_channels: channels of the four pyramid levels, finest first.
    """

    layers: tuple[int, int, int, int] = (5, 7, 9, 11)
    features: int = 128
    out_channels: tuple[int, int, int, int] = (96, 192, 384, 768)


@dataclass(frozen=True)
class DA3Config:
    """Everything that fixes a Depth Anything 3's parameters and arithmetic. The defaults are DA3-BASE.

    Attributes:
        embed_dim: C, channels of one token. Features of any-view models have 2 C (local and global halves).
        depth: number of transformer blocks.
        num_heads, mlp_ratio, swiglu: of every block.
        start: the first block of any-view encoding: from it on, queries and keys are normalised and rotated,
            and blocks of an odd number attend to all views; None: every view alone (METRIC and MONO).
        img_size: pixels on a side that the position table was trained at.
        patch_size: pixels on a side of a patch.
        head: the dense head.
        encoder_depth, encoder_heads: of the encoder of given camera poses.
        gaussians: whether checkpoints hold a head of 3D Gaussians. It is never built here.

    Raises:
        ConfigError: sizes that do not divide, layers out of range.
    """

    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    swiglu: bool = False
    start: int | None = 4
    img_size: int = 518
    patch_size: int = 14
    head: DA3HeadConfig = field(default_factory=DA3HeadConfig)
    encoder_depth: int = 4
    encoder_heads: int = 16
    gaussians: bool = False

    def __post_init__(self) -> None:
        if self.img_size % self.patch_size:
            raise ConfigError(
                f"DA3 img_size {self.img_size} is not a multiple of patch_size {self.patch_size}."
            )
        if self.embed_dim % (4 * self.num_heads):
            raise ConfigError(
                f"DA3 embed_dim {self.embed_dim} must be a multiple of 4 x num_heads ({self.num_heads}): "
                "the 2D rotary embedding splits each head's channels in four."
            )
        if self.start is not None and not 1 <= self.start < self.depth:
            raise ConfigError(f"DA3 start is {self.start}; expected 1 to {self.depth - 1}, or none.")
        if not all(0 <= layer < self.depth for layer in self.head.layers):
            raise ConfigError(f"DA3 head.layers {self.head.layers} do not exist; the depth is {self.depth}.")

    @property
    def any_view(self) -> bool:
        """Whether the views of a scene are encoded together."""
        return self.start is not None

    @property
    def output_dim(self) -> int:
        """Channels of a layer's output."""
        return 2 * self.embed_dim if self.any_view else self.embed_dim

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DA3Config:
        """Read `to_dict`'s output; what is not named keeps DA3-BASE's value. Raises `ConfigError`."""
        values = dict(values)
        if "head" in values:
            values["head"] = DA3HeadConfig(**checked_settings(DA3HeadConfig, values["head"], "DA3 head"))
        return cls(**checked_settings(cls, values, "DA3"))


_WIDE = (256, 512, 1024, 1024)
SMALL = DA3Config(
    embed_dim=384,
    num_heads=6,
    head=DA3HeadConfig(features=64, out_channels=(48, 96, 192, 384)),
)
BASE = DA3Config()
LARGE = DA3Config(
    embed_dim=1024,
    depth=24,
    num_heads=16,
    start=8,
    head=DA3HeadConfig((11, 15, 19, 23), features=256, out_channels=_WIDE),
)
GIANT = DA3Config(
    embed_dim=1536,
    depth=40,
    num_heads=24,
    swiglu=True,
    start=13,
    head=DA3HeadConfig((19, 27, 33, 39), features=256, out_channels=_WIDE),
    gaussians=True,
)
SINGLE_VIEW = DA3Config(
    embed_dim=1024,
    depth=24,
    num_heads=16,
    start=None,
    head=DA3HeadConfig((4, 11, 17, 23), features=256, out_channels=_WIDE),
)

MODELS = {
    "da3-small": SMALL,
    "da3-base": BASE,
    "da3-large": LARGE,
    "da3-giant": GIANT,
    "da3metric-large": SINGLE_VIEW,
    "da3mono-large": SINGLE_VIEW,
}
"""By `model_name` of a published `config.json`, which alone fixes the sizes in the original code, too."""
NESTED = "da3nested-giant-large"


def read_config(settings: Mapping[str, Any]) -> DA3Config:
    """The configuration that a parsed `config.json` describes.

    Raises:
        ConfigError: no `model_name`, an unknown one, or a malformed section of ours.
    """
    if OWN_SECTION in settings:
        return DA3Config.from_dict(settings[OWN_SECTION])
    name = settings.get("model_name")
    if name == NESTED:
        raise ConfigError(
            f"{NESTED} is two networks in one file; take depth-anything/DA3-GIANT (any view) or "
            "depth-anything/DA3METRIC-LARGE (one view, metres)."
        )
    if name not in MODELS:
        raise ConfigError(
            f"model_name is {name!r}; known are {', '.join(MODELS)}. Other sizes go into a section "
            f"{OWN_SECTION!r} with DA3Config's settings."
        )
    return MODELS[name]
