"""Dense prediction head (DPT, arXiv 2103.13413) for depth and point maps, each with a confidence.

Shapes: N images (batch x views), h x w patch grid, H x W pixels, D aggregator channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POSITION_SCALE = 0.1
POSITION_BASE = 100.0


@dataclass(frozen=True)
class DPTConfig:
    """A dense head (DPT, arXiv 2103.13413).

    Attributes:
        features: channels in the fusion path.
        out_channels: channels of the four pyramid levels, finest first.
        layers: the four layers that feed it.
        down_ratio: input size over output size of the dense map.
        pos_embed: add a small sin-cos position embedding to each level and to the fused map.
        hidden_channels: channels of the last hidden convolution, at full resolution.
    """

    features: int = 256
    out_channels: tuple[int, int, int, int] = (256, 512, 1024, 1024)
    layers: tuple[int, int, int, int] = (4, 11, 17, 23)
    down_ratio: int = 1
    pos_embed: bool = True
    hidden_channels: int = 32


LARGEST_EXPONENT = 80.0
"""Of float32, with room for a factor. Infinity times a gradient of zero would be NaN in training."""


def bounded_exp(x: Tensor) -> Tensor:
    """exp(x), which never overflows."""
    return x.clamp(max=LARGEST_EXPONENT).exp()


def _inverse_log(x: Tensor) -> Tensor:
    """The inverse of sign(y) log(1 + |y|): linear near zero, exponential far away; it never overflows."""
    return torch.sign(x) * torch.expm1(x.abs().clamp(max=LARGEST_EXPONENT))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"exp": bounded_exp, "inv_log": _inverse_log}


def position_map(channels: int, height: int, width: int, aspect: float, device: torch.device) -> Tensor:
    """Sin-cos embedding of the image plane, (channels, height, width) float32.

    Pixel centres lie in a box of half diagonal 1 with the image's `aspect` (width / height). The first
    half of the channels encodes x, the second y; in each half sines come before cosines.
    """
    diagonal = (1 + aspect**2) ** 0.5

    def axis(n: int, half_extent: float) -> Tensor:
        edge = half_extent * (n - 1) / n
        return torch.linspace(-edge, edge, n, device=device)

    def encode(coordinate: Tensor) -> Tensor:
        pairs = channels // 4
        frequency = POSITION_BASE ** -(torch.arange(pairs, dtype=torch.float64, device=device) / pairs)
        angle = coordinate.double()[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1).float().T  # (channels / 2, n)

    x = encode(axis(width, aspect / diagonal))[:, None, :].expand(-1, height, -1)
    y = encode(axis(height, 1 / diagonal))[:, :, None].expand(-1, -1, width)
    return torch.cat([x, y])


def add_position(x: Tensor, aspect: float) -> Tensor:
    """`x` (N, channels, H, W) with a tenth of `position_map` added."""
    channels, height, width = x.shape[1:]
    return x + POSITION_SCALE * position_map(channels, height, width, aspect, x.device).to(x.dtype)


class ResidualConvUnit(nn.Module):
    """Two ReLU-first convolutions with a skip.

    Args:
        features: channels.
        relu_skip: the skip carries relu(x), not x: VGGT's weights were trained with an in-place first ReLU.
    """

    def __init__(self, features: int, relu_skip: bool = True) -> None:
        super().__init__()
        self.relu_skip = relu_skip
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, features, H, W) -> the same shape."""
        first = F.relu(x)
        return self.conv2(F.relu(self.conv1(first))) + (first if self.relu_skip else x)


class FusionBlock(nn.Module):
    """Adds a finer level to the running map, refines it and resizes it to the next level."""

    def __init__(self, features: int, has_residual: bool = True, relu_skip: bool = True) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(features, features, 1)
        if has_residual:
            self.resConfUnit1 = ResidualConvUnit(features, relu_skip)
        self.resConfUnit2 = ResidualConvUnit(features, relu_skip)

    def forward(self, x: Tensor, level: Tensor | None, size: tuple[int, int]) -> Tensor:
        """`x` and `level` (N, features, H, W); the result has `size` pixels."""
        if level is not None:
            x = x + self.resConfUnit1(level)
        x = F.interpolate(self.resConfUnit2(x), size=size, mode="bilinear", align_corners=True)
        return self.out_conv(x)


def resize_layers(channels: Sequence[int]) -> nn.ModuleList:
    """Four maps on the patch grid to a pyramid of 4, 2, 1 and half its size."""
    return nn.ModuleList(
        [
            nn.ConvTranspose2d(channels[0], channels[0], 4, stride=4),
            nn.ConvTranspose2d(channels[1], channels[1], 2, stride=2),
            nn.Identity(),
            nn.Conv2d(channels[3], channels[3], 3, stride=2, padding=1),
        ]
    )


class Scratch(nn.Module):
    """The fusion path from four pyramid levels to one map (its name is the checkpoints')."""

    def __init__(self, config: DPTConfig, output_dim: int, relu_skip: bool = True) -> None:
        super().__init__()
        features = config.features
        self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn = (
            nn.Conv2d(channels, features, 3, padding=1, bias=False) for channels in config.out_channels
        )
        self.refinenet1 = FusionBlock(features, relu_skip=relu_skip)
        self.refinenet2 = FusionBlock(features, relu_skip=relu_skip)
        self.refinenet3 = FusionBlock(features, relu_skip=relu_skip)
        self.refinenet4 = FusionBlock(features, has_residual=False, relu_skip=relu_skip)
        self.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, config.hidden_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(config.hidden_channels, output_dim, 1),
        )

    def fuse(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Four levels, finest first -> (N, features / 2, 2 H, 2 W) for a finest level of H x W."""
        blocks = (self.refinenet1, self.refinenet2, self.refinenet3, self.refinenet4)
        return self.output_conv1(top_down(self.reduce(pyramid), blocks))

    def reduce(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """Four levels to `features` channels each."""
        reducers = (self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn)
        return [reduce(level) for reduce, level in zip(reducers, pyramid, strict=True)]


def top_down(levels: Sequence[Tensor], blocks: Sequence[nn.Module]) -> Tensor:
    """Four levels of equal channels and their fusion blocks, finest first -> twice the finest size."""
    height, width = levels[0].shape[2:]
    sizes = [(2 * height, 2 * width), *(level.shape[2:] for level in levels[:-1])]
    x = blocks[3](levels[3], None, sizes[3])
    for number in (2, 1, 0):
        x = blocks[number](x, levels[number], sizes[number])
    return x


class DPTHead(nn.Module):
    """Patch tokens of four layers to a dense map and its confidence.

    Args:
        dim: D, channels of an aggregator output.
        patch_size: pixels on a side of a patch.
        output_dim: channels of the map plus one for the confidence.
        activation: "exp" (positive, depth) or "inv_log" (signed, points).
    """

    def __init__(
        self,
        dim: int,
        patch_size: int,
        config: DPTConfig,
        output_dim: int,
        activation: Literal["exp", "inv_log"],
    ) -> None:
        super().__init__()
        self.config = config
        self.patch_size = patch_size
        self.activation = ACTIVATIONS[activation]
        c = config.out_channels
        self.norm = nn.LayerNorm(dim)
        self.projects = nn.ModuleList(nn.Conv2d(dim, channels, 1) for channels in c)
        self.resize_layers = resize_layers(c)
        self.scratch = Scratch(config, output_dim)

    def forward(self, patches: Sequence[Tensor], image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Predict a map and its confidence.

        Args:
            patches: four (N, h w, D) tensors of patch tokens, in the order of `config.layers`.
            image_size: (H, W) of the images in pixels.

        Returns:
            The map (N, H / down_ratio, W / down_ratio, output_dim - 1) and its confidence
            (N, H / down_ratio, W / down_ratio), greater than 1.
        """
        height, width = image_size
        grid = (height // self.patch_size, width // self.patch_size)
        pyramid = []
        for tokens, project, resize in zip(patches, self.projects, self.resize_layers, strict=True):
            x = self.norm(tokens).transpose(1, 2).unflatten(2, grid)
            pyramid.append(resize(self._add_position(project(x), width / height)))
        x = self.scratch.fuse(pyramid)
        size = (height // self.config.down_ratio, width // self.config.down_ratio)
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
        x = self.scratch.output_conv2(self._add_position(x, width / height)).permute(0, 2, 3, 1)
        return self.activation(x[..., :-1]), 1 + bounded_exp(x[..., -1])

    def _add_position(self, x: Tensor, aspect: float) -> Tensor:
        return add_position(x, aspect) if self.config.pos_embed else x
