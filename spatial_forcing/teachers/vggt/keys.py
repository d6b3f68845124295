"""Parameter names: the published checkpoint's and ours.

They are the same except for the DINOv2 embedder, which is transformers' own module: there query, key
and value are three matrices where the checkpoint has one. A checkpoint's keys fall in groups by
their first part: `aggregator` is always needed, a head only when it is asked for, and `track_head`
never; but whatever is in a file must be complete and have the right shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from spatial_forcing.teachers.files import Shapes, check_shapes
from spatial_forcing.teachers.vggt.config import VGGTConfig
from spatial_forcing.teachers.vggt.model import VGGT
from spatial_forcing.teachers.vggt.track_head import track_head_shapes

_DINO = "aggregator.patch_embed.model."
# Both spellings of the attention layers: transformers renamed them between 5.4 and 5.23.
_ATTENTION_INPUT = re.compile(r"attention\.(?:attention\.)?(?:query|key|value|[qkv]_proj)\.")
_RENAMES = (
    (_ATTENTION_INPUT, "attn.qkv."),
    (re.compile(r"attention\.(?:output\.dense|o_proj)\."), "attn.proj."),
    (re.compile(r"^encoder\.layer\."), "blocks."),
    (re.compile(r"layer_scale(\d)\.lambda1"), r"ls\1.gamma"),
    (re.compile(r"^embeddings\.patch_embeddings\.projection\."), "patch_embed.proj."),
    (re.compile(r"^embeddings\.position_embeddings$"), "pos_embed"),
    (re.compile(r"^embeddings\."), ""),
    (re.compile(r"^layernorm\."), "norm."),
)


def published_name(name: str) -> str:
    """The checkpoint's name for our parameter `name`."""
    if not name.startswith(_DINO):
        return name
    inner = name.removeprefix(_DINO)
    for pattern, replacement in _RENAMES:
        inner = pattern.sub(replacement, inner)
    return f"aggregator.patch_embed.{inner}"


def key_map(names: Iterable[str]) -> dict[str, list[str]]:
    """Published key -> our keys, whose tensors stacked on dimension 0 make the published one.

    Query, key and value follow each other in the module, and so in `names`.
    """
    result: dict[str, list[str]] = {}
    for name in names:
        result.setdefault(published_name(name), []).append(name)
    return result


def to_published(model: VGGT) -> dict[str, Tensor]:
    """The model's weights by published key."""
    state = model.state_dict()
    return {
        key: state[names[0]] if len(names) == 1 else torch.cat([state[name] for name in names])
        for key, names in key_map(state).items()
    }


def from_published(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Weights by published key to a state dict with our `names`."""
    state: dict[str, Tensor] = {}
    for key, ours in key_map(names).items():
        state.update(zip(ours, weights[key].chunk(len(ours)), strict=True))
    return state


def published_shapes(config: VGGTConfig) -> dict[str, tuple[int, ...]]:
    """Every key of the published layout for `config`, `track_head.*` included, with its shape."""
    with torch.device("meta"):
        model = VGGT(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in to_published(model).items()}
    return shapes | track_head_shapes(config)


def check_keys(found: Shapes, config: VGGTConfig, *, heads: bool, where: str) -> None:
    """Compare a checkpoint's keys and shapes with what `config` asks for.

    Args:
        found: shape by published key, as stored.
        config: the model they should fit.
        heads: the configured heads are needed; else the aggregator is enough.
        where: the file, for the message.

    Raises:
        CheckpointError: listing missing keys, unexpected keys and wrong shapes.
    """
    expected = published_shapes(config)
    groups = {_group(key) for key in found} | {"aggregator"}
    if heads:
        groups |= {_group(key) for key in expected} - {"track_head"}
    check_shapes(
        found,
        expected,
        [key for key in expected if _group(key) in groups],
        where=where,
        remedy="Check that the file is whole and that the config.json beside it belongs to it (without one, "
        "VGGT-1B is assumed).",
    )


def _group(key: str) -> str:
    return key.split(".", 1)[0]
