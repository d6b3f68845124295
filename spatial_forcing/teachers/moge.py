"""MoGe-2's encoder as a teacher (arXiv 2507.02546): a plain DINOv2, on transformers' class by a key map.

A checkpoint is one `model.pt` with `model_config`, which names the backbone, and `model`, the weights; those
of the encoder's backbone have the names of DINOv2's own code. Neck and heads are not read.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from spatial_forcing.errors import CheckpointError
from spatial_forcing.registry import did_you_mean
from spatial_forcing.teachers.cards import (
    RANDOM,
    RANDOM_LICENCE,
    TEACHERS,
    UNKNOWN_LICENCE,
    TeacherCard,
    TeacherFacts,
    check_variant,
)
from spatial_forcing.teachers.files import LISTED
from spatial_forcing.teachers.frozen import random_stream
from spatial_forcing.teachers.image import FAMILIES, ImageTeacher
from spatial_forcing.teachers.preprocess import IMAGENET_MEAN, IMAGENET_STD

FILE = "model.pt"
BACKBONE = "encoder.backbone."
PATCH, SIDE = 14, 518
"""Pixels on a side of a patch, and of the images that DINOv2's position table was trained at."""
SIZES: Mapping[str, tuple[int, int, int]] = {
    "dinov2_vits14": (384, 12, 6),
    "dinov2_vitb14": (768, 12, 12),
    "dinov2_vitl14": (1024, 24, 16),
}
"""Width, blocks and heads of the backbones that MoGe-2 is published with."""
RENAMED = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "norm.": "layernorm.",
}
"""Names of DINOv2's own code, or how they begin, outside the blocks."""
RENAMED_IN_BLOCK = {
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "attn.proj.": "attention.output.dense.",
}
HEADS = ("query", "key", "value")
"""Thirds of `attn.qkv`."""


def is_moge(folder: str | Path) -> bool:
    """Whether a local folder (or file) is a MoGe-2 checkpoint."""
    path = Path(folder) / FILE if Path(folder).is_dir() else Path(folder)
    if path.suffix != ".pt" or not path.is_file():
        return False
    try:
        return "model_config" in torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, TypeError):
        return False  # whoever loads it says what is wrong


def load_moge_teacher(
    source: str,
    card: TeacherCard | None,
    *,
    resolution: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
    heads: bool,
    random_weights: bool = False,
    variant: Mapping[str, str],
    **options: Any,
) -> ImageTeacher:
    """The loader of MoGe-2 checkpoints. `heads` has no effect: none is built.

    Raises:
        CheckpointError: the checkpoint is missing, gated, damaged or of another architecture.
        ConfigError: the resolution is not a multiple of the patch size.
    """
    check_variant(source, variant, {})
    if random_weights and source in MOGE_CARDS:
        backbone, stored = MOGE_CARDS[source], None
    else:
        backbone, stored = _read(source)
    model = build(backbone, None if random_weights else stored, source)
    licence = card.licence if card is not None else UNKNOWN_LICENCE
    return ImageTeacher(
        model.to(torch.device(device)),
        FAMILIES["dinov2"],
        name=RANDOM + source if random_weights else source,
        licence=RANDOM_LICENCE if random_weights else licence,
        resolution=SIDE if resolution is None else resolution,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        dtype=dtype,
        **options,
    )


def build(backbone: str, weights: Mapping[str, Tensor] | None, source: str) -> Dinov2Model:
    """The encoder's backbone with DINOv2's own `weights` by its own names, or with random ones (seed 0).

    Raises:
        CheckpointError: a backbone that is not known, or weights that do not fit it.
    """
    if backbone not in SIZES:
        raise CheckpointError(
            f"{source!r} has the backbone {backbone!r}; known are {', '.join(SIZES)}."
            f"{did_you_mean(backbone, SIZES)}"
        )
    width, depth, attention = SIZES[backbone]
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=attention,
        image_size=SIDE,
        patch_size=PATCH,
    )
    if weights is None:
        with random_stream(0):
            return Dinov2Model(config)
    own = {name: value.float() for name, value in from_dinov2(weights).items()}
    # Its names are those of the hub's files, which every version of transformers reads as its own.
    kind: Any = Dinov2Model
    model, report = kind.from_pretrained(
        None, config=config, state_dict=own, output_loading_info=True, ignore_mismatched_sizes=True
    )
    # transformers would start with random values and only warn.
    wrong = {
        what: sorted(map(str, report[what]))
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if any(wrong.values()):
        listed = "; ".join(
            f"{len(names)} {what.replace('_', ' ')}: {', '.join(names[:LISTED])}"
            for what, names in wrong.items()
            if names
        )
        raise CheckpointError(
            f"{source!r} does not fit a {backbone}: {listed}. Check that the file is whole and that it is a "
            "MoGe-2."
        )
    return cast(Dinov2Model, model)


def from_dinov2(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of DINOv2's own code (without registers) by the names of transformers' hub files."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        if not name.startswith("blocks."):
            start = next((old for old in RENAMED if name.startswith(old)), "")
            found[RENAMED.get(start, "") + name.removeprefix(start)] = value
            continue
        _, number, rest = name.split(".", 2)
        block = f"encoder.layer.{number}."
        if rest.startswith("attn.qkv."):
            kind = rest.rpartition(".")[2]
            for head, third in zip(HEADS, value.chunk(3), strict=True):
                found[f"{block}attention.attention.{head}.{kind}"] = third
            continue
        start = next((old for old in RENAMED_IN_BLOCK if rest.startswith(old)), "")
        found[block + RENAMED_IN_BLOCK.get(start, "") + rest.removeprefix(start)] = value
    return found


def _read(source: str) -> tuple[str, dict[str, Tensor]]:
    """The backbone's name and weights."""
    path = Path(source) / FILE if Path(source).is_dir() else Path(source)
    try:
        if not path.exists():
            path = Path(hf_hub_download(source, FILE))
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        backbone = str(held["model_config"]["encoder"]["backbone"])
        weights = {
            name.removeprefix(BACKBONE): value
            for name, value in held["model"].items()
            if name.startswith(BACKBONE)
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no MoGe-2 checkpoint ({type(error).__name__}: {error}); expected model_config with "
            f"encoder.backbone, and model. Of MoGe 1 and others nothing is read."
        ) from error
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        hint = "" if source in MOGE_CARDS else did_you_mean(source, TEACHERS)
        raise CheckpointError(
            f"{FILE} of {source!r} cannot be read: {str(error).rstrip('. ')}. Check the name and the "
            f"connection, or download it elsewhere and give the folder.{hint}"
        ) from error
    return backbone, weights


MOGE_CARDS: dict[str, str] = {}
"""Backbones of the registered models, so that random weights of them need no download."""

for _name, _backbone, _facts in (
    ("vits-normal", "dinov2_vits14", TeacherFacts(22.1, 384, SIDE, cost=0.029)),
    ("vitb-normal", "dinov2_vitb14", TeacherFacts(86.6, 768, SIDE, cost=0.088)),
    ("vitl", "dinov2_vitl14", TeacherFacts(304.4, 1024, SIDE, cost=0.33)),
    ("vitl-normal", "dinov2_vitl14", TeacherFacts(304.4, 1024, SIDE, cost=0.33)),
):
    _hub = f"Ruicheng/moge-2-{_name}"
    MOGE_CARDS[_hub] = _backbone
    TEACHERS.add(
        _hub, TeacherCard(_hub, load_moge_teacher, "MIT", "MoGe-2's encoder. One view.", facts=_facts)
    )
