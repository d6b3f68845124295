"""`load_teacher`: a frozen teacher by registered name, folder or hub id. Importing it registers them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch

from spatial_forcing.errors import ConfigError
from spatial_forcing.protocols import Teacher
from spatial_forcing.registry import unknown
from spatial_forcing.teachers.cache.format import HEADER
from spatial_forcing.teachers.cards import (
    RANDOM,
    TEACHERS,
    VARIANT,
    Framing,
    TeacherCard,
    TeacherLoader,
    announce_licence,
)
from spatial_forcing.teachers.da3 import is_da3, load_da3_teacher
from spatial_forcing.teachers.image import FAMILIES, load_image_teacher, read_settings
from spatial_forcing.teachers.moge import is_moge, load_moge_teacher
from spatial_forcing.teachers.recorded import RECORDED_DEPTH, DepthDataset
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
    dataset: DepthDataset | None = None,
) -> Teacher:
    """Load a frozen teacher.

    Args:
        name_or_path: a registered name, a local checkpoint (VGGT: folder, `.safetensors` or `.pt` file;
            MoGe-2: folder or `.pt` file; Depth Anything 3, DINOv2, SigLIP: folder as on the Hugging Face
            hub), or the hub id of one
            ("owner/name"). `random:` before it keeps the architecture and draws the weights (seed 0): the
            control for what the architecture alone gives. `?` after it begins settings that one kind of
            teacher has: "depth-anything/DA3-BASE?half=global&reference=middle", see `da3.DA3Teacher`.
        resolution: pixels on a side at which views are encoded; default the teacher's own.
        dtype: arithmetic type: float32, bfloat16 or float16 (or "fp32", "bf16", "fp16").
        device: where it runs.
        heads: also load its prediction heads (camera, depth, points), if it has any.
        framing: "fit" or "pad", of views that are not square; see `frozen.FrozenTeacher`.
        memory: bytes of activations to stay below; default 2 GiB.
        compile: True compiles it with `torch.compile`; a text names the backend.
        dataset: whose depth `recorded-depth` reads; other teachers need none.

    Raises:
        ConfigError: unknown name (the closest one is suggested), dtype, framing or resolution; a folder of
            cached features.
        CheckpointError: missing, damaged or foreign weights.
    """
    name = str(name_or_path)
    if name.startswith("shuffled:"):
        raise ConfigError(
            f"{name!r} is a control over cached features; build the teacher's cache and train with it "
            "(`cache`), or wrap it in `controls.ShuffledTeacher`."
        )
    source, _, settings = name.removeprefix(RANDOM).partition(VARIANT)
    variant = _variant(name, settings)
    precision = _resolve_dtype(dtype)
    card: TeacherCard | None = None
    loader: TeacherLoader
    if source in TEACHERS:
        card = TEACHERS[source]
        loader = card.loader
    elif (Path(source) / HEADER).is_file():
        raise ConfigError(
            f"{source} holds cached features; open them with CachedTeacher({source!r}), or name the folder "
            "as the cache (--cache)."
        )
    elif Path(source).exists() or _is_hub_id(source):
        loader = _loader_of(source)
    else:
        raise unknown("teacher", source, TEACHERS)
    options: dict[str, Any] = {"framing": framing, "compile": compile}
    if memory is not None:
        options["memory"] = memory
    if source == RECORDED_DEPTH:
        options["dataset"] = dataset
    teacher = loader(
        source,
        card,
        resolution=resolution,
        dtype=precision,
        device=device,
        heads=heads,
        random_weights=name.startswith(RANDOM),
        variant=variant,
        **options,
    )
    announce_licence(teacher.name, teacher.licence)
    return teacher


def _loader_of(source: str) -> TeacherLoader:
    """The loader of a checkpoint without a card: its `config.json` names its kind, only VGGT's does not."""
    settings = read_settings(source)
    if settings.get("model_type") in FAMILIES:
        return load_image_teacher
    if is_da3(settings):
        return load_da3_teacher
    return load_moge_teacher if not settings and is_moge(source) else load_vggt_teacher


def _variant(name: str, settings: str) -> dict[str, str]:
    """`half=global&reference=middle` by name."""
    try:
        return dict(parse_qsl(settings, strict_parsing=True)) if settings else {}
    except ValueError as error:
        raise ConfigError(
            f"the settings in {name!r} cannot be read ({error}); write `name?half=global&reference=middle`."
        ) from error


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
