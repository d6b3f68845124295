"""Reading and writing VGGT checkpoints in the published layout: `config.json` and one weights file.

Weights are `model.safetensors` or `model.pt` (a flat state dict); both are read lazily and mapped
into memory. A folder without a config, or a bare file, is taken for VGGT-1B.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.storage import replace_file, write_json
from spatial_forcing.teachers.files import LICENCE_KEY, download, find_weights, open_weights
from spatial_forcing.teachers.vggt.config import VGGTConfig
from spatial_forcing.teachers.vggt.keys import check_keys, from_published, key_map, to_published
from spatial_forcing.teachers.vggt.model import VGGT

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "model.pt")


@dataclass(frozen=True)
class Source:
    """Where a checkpoint's parts are.

    Attributes:
        weights: `.safetensors`, `.pt` or `.pth` file.
        config: the model's sizes.
        licence: SPDX identifier named in `config.json`, or None.
    """

    weights: Path
    config: VGGTConfig
    licence: str | None


def find_local(path: str | Path) -> Source:
    """Find a checkpoint in a folder, or take a weights file and the config in the same folder.

    Raises:
        CheckpointError: nothing there, or a malformed `config.json`.
    """
    weights = find_weights(Path(path), WEIGHT_FILES, "VGGT")
    return _source(weights, weights.parent / CONFIG_FILE)


def find_on_hub(repo_id: str) -> Source:
    """Download (or take from the Hugging Face cache) a checkpoint's config and weights.

    Raises:
        CheckpointError: unknown or gated repository, no connection, or no weights file in it.
    """
    config, weights = download(repo_id, CONFIG_FILE, WEIGHT_FILES)
    return _source(weights, config)


def _source(weights: Path, config_file: Path | None) -> Source:
    values: dict[str, Any] = {}
    if config_file is not None and config_file.is_file():
        try:
            values = json.loads(config_file.read_text())
            licence = values.pop(LICENCE_KEY, None)
            return Source(weights, VGGTConfig.from_dict(values), licence)
        except (ValueError, AttributeError, TypeError) as error:  # ConfigError is a ValueError
            raise CheckpointError(f"{config_file} is not a VGGT config: {error}") from error
    return Source(weights, VGGTConfig(), None)


def load_vggt(source: Source, *, heads: bool = True, device: torch.device | str = "cpu") -> VGGT:
    """Build the model in float32 with the checkpoint's weights.

    Args:
        source: from `find_local` or `find_on_hub`.
        heads: False reads and builds the aggregator alone.
        device: where the weights go.

    Raises:
        CheckpointError: unreadable or truncated file; missing or unexpected keys, wrong shapes.
    """
    with torch.device("meta"):
        model = VGGT(source.config, heads=heads)
    names = list(model.state_dict())
    with open_weights(source.weights) as (shapes, read):
        check_keys(shapes, source.config, heads=heads, where=str(source.weights))
        weights = {key: read(key).to(device=device, dtype=torch.float32) for key in key_map(names)}
    model.load_state_dict(from_published(weights, names), assign=True)
    return model


def save_vggt(model: VGGT, folder: str | Path, *, licence: str, dtype: torch.dtype = torch.float32) -> None:
    """Write `config.json` and `model.safetensors` in the published layout.

    Each file is written beside its place and then renamed, so an interrupted save leaves the old one.

    Args:
        model: a model with all the heads its config enables.
        folder: created when missing.
        licence: SPDX identifier of the weights, kept in `config.json`.
        dtype: storage type; loading always gives float32.

    Raises:
        ConfigError: the model lacks a head that its config enables.
    """
    for head in ("camera", "depth", "point"):
        if getattr(model.config, f"enable_{head}") and getattr(model, f"{head}_head") is None:
            raise ConfigError(
                f"cannot save a VGGT without its {head} head under a config with enable_{head}=True."
            )
    folder = Path(folder)
    weights = {
        key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in to_published(model).items()
    }
    replace_file(folder / WEIGHT_FILES[0], lambda path: save_file(weights, path, metadata={"format": "pt"}))
    write_json(folder / CONFIG_FILE, {**model.config.to_dict(), LICENCE_KEY: licence})
