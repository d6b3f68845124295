"""Teachers by name: the registry, its cards with licences, and `load_teacher`."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from spatial_forcing.errors import ConfigError
from spatial_forcing.protocols import Teacher
from spatial_forcing.registry import Registry, unknown

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


class TeacherLoader(Protocol):
    """Builds a teacher from a registry name (with its card), or from a path or hub id (card None)."""

    def __call__(
        self,
        source: str,
        card: TeacherCard | None,
        *,
        resolution: int | None,
        dtype: torch.dtype,
        device: torch.device | str,
        heads: bool,
        random_weights: bool,
        **options: Any,
    ) -> Teacher:
        """Load frozen weights onto `device`, or draw them; `options` go to `frozen.FrozenTeacher`."""
        ...


@dataclass(frozen=True)
class TeacherCard:
    """One entry of the registry.

    Attributes:
        name: registry name; for weights on the hub, their id.
        loader: builds it.
        licence: SPDX identifier of the weights' licence.
        note: one line on what it is and what its licence asks.
        commercial_alternative: name of an equivalent whose licence allows commercial use, if there is one.
        folder: where weights that ship with the package are; None for others.
    """

    name: str
    loader: TeacherLoader
    licence: str
    note: str
    commercial_alternative: str | None = None
    folder: Path | None = None


TEACHERS: Registry[TeacherCard] = Registry("teacher")

RANDOM = "random:"
"""Before a teacher's name: its architecture with random weights."""
RANDOM_LICENCE = "Apache-2.0"
"""Of random weights, which are this package's own."""
Framing = Literal["fit", "pad"]

_announced: set[str] = set()


def announce_licence(name: str, licence: str) -> None:
    """Say once (in the first process of a run) under which licence a teacher's weights are used.

    Cached features fall under the licence of the weights that made them. Random weights have none.
    """
    if name in _announced or name.startswith(RANDOM) or os.environ.get("RANK", "0") != "0":
        return
    _announced.add(name)
    card = TEACHERS.get(name) if name in TEACHERS else None
    parts = [f"teacher {name!r}: weights under {licence}."]
    if card is not None:
        parts.append(card.note)
        if card.commercial_alternative is not None:
            parts.append(f"For commercial use: {card.commercial_alternative!r}.")
    logger.warning(" ".join(parts))


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
    from spatial_forcing.teachers.image import is_image_checkpoint, load_image_teacher
    from spatial_forcing.teachers.vggt import load_vggt_teacher

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
