"""Depth Anything 3 checkpoints in the published layout: `config.json` and `model.safetensors`.

A published file leaves out six names: one LayerNorm belongs to four levels of the ray head, and is stored
under the first level's name. Every other missing or surplus key is an error; the original code would go on
with random weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.storage import replace_file, write_json
from spatial_forcing.teachers.da3.config import MODELS, OWN_SECTION, DA3Config, read_config
from spatial_forcing.teachers.da3.heads import gaussian_shapes
from spatial_forcing.teachers.da3.model import DA3
from spatial_forcing.teachers.files import (
    LICENCE_KEY,
    check_shapes,
    download,
    find_weights,
    open_weights,
)

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors",)
BACKBONE = "model.backbone."
SHARED_NORM = "model.head.scratch.output_conv2_aux.0.2."
ALIASES = tuple(f"model.head.scratch.output_conv2_aux.{level}.2." for level in (1, 2, 3))
"""Further names of the shared norm, which files leave out."""


@dataclass(frozen=True)
class DA3Source:
    """Where a checkpoint's parts are.

    Attributes:
        weights: `.safetensors` or `.pt` file.
        config: the model's sizes.
        licence: SPDX identifier that this package wrote into `config.json`, or None.
    """

    weights: Path
    config: DA3Config
    licence: str | None


def is_da3(settings: dict[str, Any]) -> bool:
    """Whether a parsed `config.json` is of a Depth Anything 3."""
    name = settings.get("model_name")
    return isinstance(name, str) and name.startswith("da3")


def find_da3(source: str | Path, on_hub: bool = False) -> DA3Source:
    """Find a checkpoint in a folder (or the folder of a weights file), or on the hub.

    Raises:
        CheckpointError: nothing there, gated, no connection, or a malformed or missing `config.json`.
    """
    if on_hub:
        config, weights = download(str(source), CONFIG_FILE, WEIGHT_FILES)
    else:
        weights = find_weights(Path(source), WEIGHT_FILES, "Depth Anything 3")
        config = weights.parent / CONFIG_FILE
    if config is None or not config.is_file():
        raise CheckpointError(
            f"{weights} has no {CONFIG_FILE} beside it, which says which Depth Anything 3 it is; put the "
            f'published one there, or write {{"model_name": NAME}} with one of {", ".join(MODELS)}.'
        )
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        return DA3Source(weights, read_config(settings), settings.get(LICENCE_KEY))
    except (ValueError, AttributeError, TypeError) as error:  # ConfigError is a ValueError
        raise CheckpointError(f"{config} is no config of a Depth Anything 3 known here: {error}") from error


def published_name(name: str) -> str:
    """The checkpoint's key of our parameter `name`."""
    if name.startswith("backbone."):
        return "model.backbone.pretrained." + name.removeprefix("backbone.")
    return f"model.{name}"


def published_shapes(config: DA3Config) -> dict[str, tuple[int, ...]]:
    """Every key of the published layout with its shape, aliases and parts never built included."""
    with torch.device("meta"):
        model = DA3(config)
    shapes = {published_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
    if config.gaussians:
        shapes |= {f"model.gs_head.{name}": shape for name, shape in gaussian_shapes(config).items()}
    return shapes


def load_da3(source: DA3Source, *, heads: bool = True, device: torch.device | str = "cpu") -> DA3:
    """Build the model in float32 with the checkpoint's weights.

    Args:
        source: from `find_da3`.
        heads: False reads and builds the backbone alone.
        device: where the weights go.

    Raises:
        CheckpointError: unreadable or truncated file; missing or unexpected keys, wrong shapes.
    """
    with torch.device("meta"):
        model = DA3(source.config, heads=heads)
    names = {published_name(name): name for name in model.state_dict()}
    with open_weights(source.weights) as (shapes, read):
        expected = published_shapes(source.config)
        groups = {_group(key) for key in shapes} | {BACKBONE}
        if heads:
            groups |= {_group(key) for key in names}
        check_shapes(
            shapes,
            expected,
            [key for key in expected if _group(key) in groups and not key.startswith(ALIASES)],
            where=str(source.weights),
            remedy="Check that the file is whole, that the config.json beside it belongs to it, and that its "
            "keys begin as the published ones do (model.backbone.pretrained. ...).",
        )
        stored = {key: key if key in shapes else _first_name(key) for key in names}
        weights = {key: read(place).to(device=device, dtype=torch.float32) for key, place in stored.items()}
    for key, value in weights.items():
        if key.startswith(ALIASES) and not torch.equal(value, weights[_first_name(key)]):
            raise CheckpointError(
                f"{source.weights}: {key} differs from {_first_name(key)}, and they are one norm. Export it "
                "again."
            )
    model.load_state_dict({names[key]: value for key, value in weights.items()}, assign=True)
    return model


def _first_name(key: str) -> str:
    return SHARED_NORM + key.rpartition(".")[2] if key.startswith(ALIASES) else key


def _group(key: str) -> str:
    return ".".join(key.split(".", 2)[:2]) + "."


def save_da3(model: DA3, folder: str | Path, *, licence: str) -> None:
    """Write `config.json` and `model.safetensors` in the published layout.

    Raises:
        ConfigError: the model was built without its heads.
    """
    if model.head is None:
        raise ConfigError("cannot save a DA3 without its heads; build it with heads=True.")
    weights: dict[str, Tensor] = {
        published_name(name): value.detach().to("cpu", torch.float32).contiguous()
        for name, value in model.state_dict().items()
        if not published_name(name).startswith(ALIASES)
    }
    known = [name for name, config in MODELS.items() if config == model.config]
    settings: dict[str, Any] = {"model_name": known[0] if known else "da3-own"}
    if not known:
        settings[OWN_SECTION] = model.config.to_dict()
    folder = Path(folder)
    replace_file(folder / WEIGHT_FILES[0], lambda path: save_file(weights, path, metadata={"format": "pt"}))
    write_json(folder / CONFIG_FILE, {**settings, LICENCE_KEY: licence})
