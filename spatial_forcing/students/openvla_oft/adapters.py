"""Published LoRA adapters of OpenVLA-OFT (`lora_adapter/`, peft's layout), unmerged or merged.

They were trained on timm's modules, whose attention has one fused `qkv`; here query, key and value are apart.
The fused adapter's first matrix serves all three, and its second is cut in three: the sum stays the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spatial_forcing.errors import CheckpointError
from spatial_forcing.students.base import read_config
from spatial_forcing.students.lora import LoraSettings, LoraStudent
from spatial_forcing.students.openvla_oft import keys
from spatial_forcing.students.openvla_oft.checkpoint import (
    find_components,
    inspect_heads,
    load,
    load_film,
    load_heads,
)
from spatial_forcing.students.openvla_oft.config import (
    MODEL_TYPE,
    OpenVLAOFTConfig,
    config_from_published,
)
from spatial_forcing.students.openvla_oft.files import locate
from spatial_forcing.students.openvla_oft.model import OpenVLAOFT
from spatial_forcing.students.openvla_oft.statistics import (
    choose_statistics,
    read_statistics,
    set_from_published,
)

FOLDER = "lora_adapter"
_PREFIX = "base_model.model."


def load_adapters(
    folder: str | Path, base: str | Path, config: OpenVLAOFTConfig | None = None, *, statistics: str = ""
) -> LoraStudent:
    """The student that a run of the released code left as adapters, on its base, unmerged.

    `lora.merge` of the result gives the merged student.

    Args:
        folder: a run with `lora_adapter/`, head files and `dataset_statistics.json`.
        base: the checkpoint it was fine-tuned from (folder or hub id).
        config: settings that the files do not tell (cameras); default: the base's sizes, two LIBERO views.
        statistics: the dataset whose statistics are used.

    Raises:
        CheckpointError: a file is missing, or adapters do not fit the base; says which.
    """
    folder = Path(folder)
    rank, alpha = _settings(folder / FOLDER / "adapter_config.json")
    stored = _read(folder / FOLDER / "adapter_model.safetensors")
    components = find_components(folder)
    config = _config(base, inspect_heads(folder, components)) if config is None else config
    policy = load(OpenVLAOFT, base, config=config)
    load_heads(policy, folder, components)
    load_film(policy, folder, components)
    found = read_statistics(folder, {})
    chosen = choose_statistics(found, statistics, folder)
    for bounds, feature in ((policy.action_bounds, "action"), (policy.state_bounds, "proprio")):
        if bounds is not None:
            set_from_published(bounds, found[chosen], feature, config.norm, f"{folder}, {chosen!r}")
    policy.dataset_name = chosen
    student = LoraStudent(policy, LoraSettings(rank=rank, alpha=alpha), base=base)
    _fill(student, stored, config, folder)
    return student


def _config(base: str | Path, heads: Mapping[str, Any]) -> OpenVLAOFTConfig:
    there = config_from_published(read_config(locate(base), MODEL_TYPE), {})
    return replace(there, **heads)


@torch.no_grad()
def _fill(student: LoraStudent, stored: Mapping[str, Tensor], config: OpenVLAOFTConfig, folder: Path) -> None:
    """Put published adapters into ours; adapters of parts that never run are left out."""
    own = {name.removeprefix("policy."): value for name, value in student.state_dict().items()}
    plain = {name.replace(".base_layer.", "."): value for name, value in own.items()}
    wanted = {name for name in own if ".lora_" in name}
    unused = tuple(name.rpartition(".")[0] for name in keys.unused_shapes(config))
    by_module = {
        entry.published.removesuffix(".weight"): entry
        for entry in keys.entries(config, plain)
        if entry.published.endswith(".weight")
    }
    unexpected = []
    for key, value in stored.items():
        module, _, part = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
        entry = by_module.get(module)
        if entry is None:
            unexpected += [] if module in unused else [key]
            continue
        pieces = value.chunk(len(entry.ours)) if part == "B" else [value] * len(entry.ours)
        for name, piece in zip(entry.ours, pieces, strict=True):
            target = f"{name.removesuffix('.weight')}.lora_{part}.default.weight"
            if target not in own or own[target].shape != piece.shape:
                raise CheckpointError(f"{folder / FOLDER}: {key} {tuple(piece.shape)} does not fit {target}.")
            own[target].copy_(piece)
            wanted.discard(target)
    if unexpected or wanted:
        raise CheckpointError(
            f"{folder / FOLDER} does not fit: {len(wanted)} adapters missing {sorted(wanted)[:3]}, "
            f"{len(unexpected)} unexpected {sorted(unexpected)[:3]}."
        )


def _settings(path: Path) -> tuple[int, float]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return int(stored["r"]), float(stored["lora_alpha"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is missing or unreadable ({error!r}); it names rank and scale."
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing, damaged or truncated ({error}); copy it again.") from error
