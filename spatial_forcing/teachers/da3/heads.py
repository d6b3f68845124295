"""Dense heads of Depth Anything 3: depth and rays of any-view models, depth and sky of single-view ones.

Shapes: N images (scenes x views), h x w patch grid, H x W pixels, D channels of a layer's output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatial_forcing.teachers.da3.config import DA3Config
from spatial_forcing.teachers.dpt import (
    DPTConfig,
    FusionBlock,
    Scratch,
    add_position,
    bounded_exp,
    resize_layers,
    top_down,
)

LEVELS = 4
RAY_DIM = 7
"""Origin (3), direction (3) and confidence of a ray."""
HIDDEN = 32
GAUSSIAN_DIM = 38
SKY_THRESHOLD = 0.3
FEW_PIXELS = 10
FAR_QUANTILE = 0.99


class _Head(nn.Module):
    """What both heads share: tokens of four blocks to a pyramid.

    Args:
        config: the model's.
        norm: LayerNorm on the tokens.
    """

    def __init__(self, config: DA3Config, norm: bool) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        head = config.head
        self.norm = nn.LayerNorm(config.output_dim) if norm else nn.Identity()
        self.projects = nn.ModuleList(nn.Conv2d(config.output_dim, c, 1) for c in head.out_channels)
        self.resize_layers = resize_layers(head.out_channels)

    def pyramid(self, patches: Sequence[Tensor], image_size: tuple[int, int], position: bool) -> list[Tensor]:
        """Four maps (N, channels, H', W') of (N, h w, D) tokens each, finest first."""
        height, width = image_size
        grid = (height // self.patch_size, width // self.patch_size)
        levels = []
        for tokens, project, resize in zip(patches, self.projects, self.resize_layers, strict=True):
            x = project(self.norm(tokens).transpose(1, 2).unflatten(2, grid))
            levels.append(resize(add_position(x, width / height) if position else x))
        return levels


def _dpt(config: DA3Config) -> DPTConfig:
    return DPTConfig(config.head.features, config.head.out_channels, config.head.layers)


class _DualScratch(Scratch):
    """Two fusion paths over one pyramid; names are the checkpoint's.

    Rays are predicted at four levels in training; the last one counts. Their norms are one and the same.
    """

    def __init__(self, config: DA3Config) -> None:
        super().__init__(_dpt(config), 2, relu_skip=False)
        features = config.head.features
        half = features // 2
        self.refinenet1_aux = FusionBlock(features, relu_skip=False)
        self.refinenet2_aux = FusionBlock(features, relu_skip=False)
        self.refinenet3_aux = FusionBlock(features, relu_skip=False)
        self.refinenet4_aux = FusionBlock(features, has_residual=False, relu_skip=False)
        sizes = [(features, half), (half, features)] * 2 + [(features, half)]
        self.output_conv1_aux = nn.ModuleList(
            nn.Sequential(*(nn.Conv2d(i, o, 3, padding=1) for i, o in sizes)) for _ in range(LEVELS)
        )
        norm = nn.LayerNorm(HIDDEN)
        self.output_conv2_aux = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(half, HIDDEN, 3, padding=1),
                ChannelsLast(),
                norm,
                ChannelsFirst(),
                nn.ReLU(),
                nn.Conv2d(HIDDEN, RAY_DIM, 1),
            )
            for _ in range(LEVELS)
        )


class ChannelsLast(nn.Module):
    """(N, C, H, W) -> (N, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x.permute(0, 2, 3, 1)


class ChannelsFirst(nn.Module):
    """(N, H, W, C) -> (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x.permute(0, 3, 1, 2)


class DualDPT(_Head):
    """Depth and rays, each with a confidence (arXiv 2511.10647, sec. 3.1)."""

    def __init__(self, config: DA3Config) -> None:
        super().__init__(config, norm=True)
        self.scratch = _DualScratch(config)

    def forward(self, patches: Sequence[Tensor], image_size: tuple[int, int]) -> dict[str, Tensor]:
        """Four (N, h w, D) tensors of patch tokens to maps.

        Returns:
            `depth` (N, H, W) > 0 in the model's own scale, `depth_conf` (N, H, W) > 1, `ray`
            (N, 8 h, 8 w, 6) and `ray_conf` (N, 8 h, 8 w) > 1.
        """
        aspect = image_size[1] / image_size[0]
        s = self.scratch
        levels = s.reduce(self.pyramid(patches, image_size, position=True))
        depth = s.output_conv1(top_down(levels, (s.refinenet1, s.refinenet2, s.refinenet3, s.refinenet4)))
        depth = F.interpolate(depth, size=image_size, mode="bilinear", align_corners=True)
        depth = s.output_conv2(add_position(depth, aspect))
        blocks = (s.refinenet1_aux, s.refinenet2_aux, s.refinenet3_aux, s.refinenet4_aux)
        ray = s.output_conv1_aux[-1](top_down(levels, blocks))
        ray = s.output_conv2_aux[-1](add_position(ray, aspect)).permute(0, 2, 3, 1)
        return {
            "depth": bounded_exp(depth[:, 0]),
            "depth_conf": 1 + bounded_exp(depth[:, 1]),
            "ray": ray[..., :-1],
            "ray_conf": 1 + bounded_exp(ray[..., -1]),
        }


class _SkyScratch(Scratch):
    def __init__(self, config: DA3Config) -> None:
        super().__init__(_dpt(config), 1, relu_skip=False)
        half = config.head.features // 2
        self.sky_output_conv2 = nn.Sequential(
            nn.Conv2d(half, HIDDEN, 3, padding=1), nn.ReLU(), nn.Conv2d(HIDDEN, 1, 1)
        )


class SkyDPT(_Head):
    """Depth and sky of one image."""

    def __init__(self, config: DA3Config) -> None:
        super().__init__(config, norm=False)
        self.scratch = _SkyScratch(config)

    def forward(self, patches: Sequence[Tensor], image_size: tuple[int, int]) -> dict[str, Tensor]:
        """Four (N, h w, D) tensors of patch tokens to `depth` (N, H, W) > 0 and `sky` (N, H, W) >= 0.

        METRIC's depth times the focal length in pixels over 300 is in metres; MONO's has its own scale.
        """
        x = self.scratch.fuse(self.pyramid(patches, image_size, position=False))
        x = F.interpolate(x, size=image_size, mode="bilinear", align_corners=True)
        depth, sky = self.scratch.output_conv2(x), self.scratch.sky_output_conv2(x)
        return {"depth": bounded_exp(depth[:, 0]), "sky": F.relu(sky[:, 0])}


def without_sky(depth: Tensor, sky: Tensor) -> Tensor:
    """`depth` with the sky's pixels set to the 0.99 quantile of all others, one for the whole batch.

    Unchanged where there are 10 pixels of sky or of anything else, or fewer. Of more than 100,000 pixels the
    original draws a random sample; this takes them all.
    """
    ground = sky < SKY_THRESHOLD
    if ground.sum() <= FEW_PIXELS or (~ground).sum() <= FEW_PIXELS:
        return depth
    values = depth[ground].float().sort().values
    # torch.quantile refuses more than 16 million values.
    position = FAR_QUANTILE * (len(values) - 1)
    low = int(position)
    high = min(low + 1, len(values) - 1)
    far = values[low].lerp(values[high], position - low)
    return depth.where(ground, far.to(depth.dtype))


def gaussian_shapes(config: DA3Config) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the 3D Gaussian head of GIANT checkpoints, which is never built here.

    Declaring them lets a loader tell "the part we leave out" from a damaged or foreign file.
    """
    half = config.head.features // 2
    with torch.device("meta"):
        parts = nn.ModuleDict(
            {
                "projects": nn.ModuleList(
                    nn.Conv2d(config.output_dim, c, 1) for c in config.head.out_channels
                ),
                "resize_layers": resize_layers(config.head.out_channels),
                "scratch": Scratch(_dpt(config), GAUSSIAN_DIM),
                "images_merger": nn.Sequential(
                    nn.Conv2d(3, half // 4, 3),
                    nn.GELU(),
                    nn.Conv2d(half // 4, half // 2, 3),
                    nn.GELU(),
                    nn.Conv2d(half // 2, half, 3),
                ),
            }
        )
    return {name: tuple(value.shape) for name, value in parts.state_dict().items()}
