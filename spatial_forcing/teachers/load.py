"""`load_teacher`: a frozen teacher by registered name, folder or hub id. Importing it registers them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spatial_forcing.errors import ConfigError
from spatial_forcing.protocols import Teacher
from spatial_forcing.registry import unknown
from spatial_forcing.teachers.cards import (
    RANDOM,
    TEACHERS,
    Framing,
    TeacherCard,
    TeacherLoader,
    announce_licence,
)
from spatial_forcing.teachers.image import is_image_checkpoint, load_image_teacher
from spatial_forcing.teachers.vggt import load_vggt_teacher

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def load_teacher(
    name_or_path: str | Path,
    *,
    resolution: int | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    heads: bool = False,
    framing: Framing = "fit",
    memory: int | None = None,
    compile: bool | str = False,
) -> Teacher:
    """Load a frozen teacher.

    Args:
        name_or_path: a registered name, a local checkpoint (VGGT: folder, `.safetensors` or `.pt` file;
            DINOv2, SigLIP, Depth Anything: folder in the Hugging Face layout), or the hub id of one
            ("owner/name"). `random:` before it keeps the architecture and draws the weights (seed 0): the
            control for what the architecture alone gives.
        resolution: pixels on a side at which views are encoded; default the teacher's own.
        dtype: arithmetic type: float32, bfloat16 or float16 (or "fp32", "bf16", "fp16").
        device: where it runs.
        heads: also load its prediction heads (camera, depth, points), if it has any.
        framing: "fit" or "pad", of views that are not square; see `frozen.FrozenTeacher`.
        memory: bytes of activations to stay below; default 2 GiB.
        compile: True compiles it with `torch.compile`; a text names the backend.

    Raises:
        ConfigError: unknown name (the closest one is suggested), dtype, framing or resolution.
        CheckpointError: missing, damaged or foreign weights.
    """
    name = str(name_or_path)
    if name.startswith("shuffled:"):
        raise ConfigError(
            f"{name!r} is a control over cached features; build the teacher's cache and train with it "
            "(`cache`), or wrap it in `controls.ShuffledTeacher`."
        )
    source = name.removeprefix(RANDOM)
    precision = _resolve_dtype(dtype)
    card: TeacherCard | None = None
    loader: TeacherLoader
    if source in TEACHERS:
        card = TEACHERS[source]
        loader = card.loader
    elif Path(source).exists() or _is_hub_id(source):
        loader = _loader_of(source)
    else:
        raise unknown("teacher", source, TEACHERS)
    options: dict[str, Any] = {"framing": framing, "compile": compile}
    if memory is not None:
        options["memory"] = memory
    teacher = loader(
        source,
        card,
        resolution=resolution,
        dtype=precision,
        device=device,
        heads=heads,
        random_weights=name != source,
        **options,
    )
    announce_licence(teacher.name, teacher.licence)
    return teacher


def _loader_of(source: str) -> TeacherLoader:
    """The loader of a checkpoint without a card: transformers' own layout names its kind, VGGT's does not."""
    return load_image_teacher if is_image_checkpoint(source) else load_vggt_teacher


def _is_hub_id(source: str) -> bool:
    owner, slash, name = source.partition("/")
    return bool(slash and owner and name) and "/" not in name and owner not in (".", "..", "~")


def _resolve_dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise unknown("teacher dtype", dtype, DTYPES)
        return DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise ConfigError(f"teacher dtype {dtype} is not supported; use float32, bfloat16 or float16.")
    return dtype
