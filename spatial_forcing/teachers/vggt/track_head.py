"""The published checkpoint's point-tracking head: never built here, but its keys and shapes are known.

Declaring them lets a loader tell "the part we leave out" from a damaged or foreign file.
"""

from __future__ import annotations

import torch

from spatial_forcing.teachers.dpt import DPTConfig, DPTHead
from spatial_forcing.teachers.vggt.config import VGGTConfig

Shapes = dict[str, tuple[int, ...]]

FEATURES = 128
HIDDEN = 384
BLOCKS = 6
VIRTUAL_TRACKS = 64
CORRELATION = 567
"""Correlation levels x window: 7 levels of a 9 x 9 neighbourhood."""
TOKEN = HIDDEN + 4


def track_head_shapes(config: VGGTConfig) -> Shapes:
    """The 394 `track_head.*` keys and their shapes."""
    parts = {"feature_extractor": _feature_extractor(config), "tracker": _tracker()}
    return {f"track_head.{part}.{key}": shape for part, keys in parts.items() for key, shape in keys.items()}


def _feature_extractor(config: VGGTConfig) -> Shapes:
    """A DPT head cut off after its first output convolution, which keeps all channels."""
    with torch.device("meta"):
        head = DPTHead(2 * config.embed_dim, config.patch_size, DPTConfig(features=FEATURES), 2, "exp")
    shapes = {
        key: tuple(tensor.shape)
        for key, tensor in head.state_dict().items()
        if not key.startswith("scratch.output_conv2")
    }
    return shapes | {
        "scratch.output_conv1.weight": (FEATURES, FEATURES, 3, 3),
        "scratch.output_conv1.bias": (FEATURES,),
    }


def _tracker() -> Shapes:
    shapes: Shapes = {
        "query_ref_token": (1, 2, TOKEN),
        "updateformer.virual_tracks": (1, VIRTUAL_TRACKS, 1, HIDDEN),  # spelled so in the checkpoint
    }
    shapes |= _linear("corr_mlp.fc1", CORRELATION, HIDDEN) | _linear("corr_mlp.fc2", HIDDEN, FEATURES)
    shapes |= _norm("updateformer.input_norm", TOKEN) | _norm("updateformer.output_norm", HIDDEN)
    shapes |= _linear("updateformer.input_transform", TOKEN, HIDDEN)
    shapes |= _linear("updateformer.flow_head", HIDDEN, FEATURES + 2)
    for index in range(BLOCKS):
        for kind in ("time_blocks", "space_virtual_blocks"):
            shapes |= _block(f"updateformer.{kind}.{index}", "attn", ("norm1", "norm2"))
        for kind in ("space_point2virtual_blocks", "space_virtual2point_blocks"):
            shapes |= _block(f"updateformer.{kind}.{index}", "cross_attn", ("norm1", "norm_context", "norm2"))
    shapes |= _norm("fmap_norm", FEATURES) | _norm("ffeat_norm", FEATURES)
    shapes |= _linear("ffeat_updater.0", FEATURES, FEATURES)
    return shapes | _linear("vis_predictor.0", FEATURES, 1) | _linear("conf_predictor.0", FEATURES, 1)


def _block(name: str, attention: str, norms: tuple[str, ...]) -> Shapes:
    shapes: Shapes = {
        f"{name}.{attention}.in_proj_weight": (3 * HIDDEN, HIDDEN),
        f"{name}.{attention}.in_proj_bias": (3 * HIDDEN,),
    }
    for norm in norms:
        shapes |= _norm(f"{name}.{norm}", HIDDEN)
    shapes |= _linear(f"{name}.{attention}.out_proj", HIDDEN, HIDDEN)
    return (
        shapes
        | _linear(f"{name}.mlp.fc1", HIDDEN, 4 * HIDDEN)
        | _linear(f"{name}.mlp.fc2", 4 * HIDDEN, HIDDEN)
    )


def _linear(name: str, fan_in: int, fan_out: int) -> Shapes:
    return {f"{name}.weight": (fan_out, fan_in), f"{name}.bias": (fan_out,)}


def _norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}
