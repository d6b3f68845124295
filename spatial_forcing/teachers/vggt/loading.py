"""Reading and writing VGGT checkpoints in the published layout: `config.json` and one weights file.

Weights are `model.safetensors` or `model.pt` (a flat state dict); both are read lazily and mapped
into memory. A folder without a config, or a bare file, is taken for VGGT-1B.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.storage import replace_file, write_json
from spatial_forcing.teachers.vggt.config import VGGTConfig
from spatial_forcing.teachers.vggt.keys import Shapes, check_keys, from_published, key_map, to_published
from spatial_forcing.teachers.vggt.model import VGGT

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "model.pt")
LICENCE_KEY = "licence"


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
    path = Path(path)
    weights = path
    if path.is_dir():
        there = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        if not there:
            raise CheckpointError(
                f"{path} holds neither {' nor '.join(WEIGHT_FILES)}; point at a VGGT checkpoint."
            )
        weights = there[0]
    elif not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a checkpoint folder, a weights file or a hub id.")
    return _source(weights, weights.parent / CONFIG_FILE)


def find_on_hub(repo_id: str) -> Source:
    """Download (or take from the Hugging Face cache) a checkpoint's config and weights.

    Raises:
        CheckpointError: unknown or gated repository, no connection, or no weights file in it.
    """
    try:
        config = _download(repo_id, CONFIG_FILE)
        weights = next((path for name in WEIGHT_FILES if (path := _download(repo_id, name))), None)
    except (OSError, ValueError) as error:  # every hub error derives from one of them
        reason = str(error).rstrip(". ")
        raise CheckpointError(
            f"cannot get {repo_id!r} from the Hugging Face hub: {reason}. Check the name and the connection, "
            "accept the licence and run `hf auth login` if it is gated, or download it elsewhere and give "
            "the folder instead."
        ) from error
    if weights is None:
        raise CheckpointError(f"{repo_id!r} on the hub holds neither {' nor '.join(WEIGHT_FILES)}.")
    return _source(weights, config)


def _download(repo_id: str, name: str) -> Path | None:
    try:
        return Path(hf_hub_download(repo_id, name))
    except EntryNotFoundError as error:
        # Offline, "not in the cache" is one kind of this error: it must not read as "not in the repository".
        if isinstance(error, FileNotFoundError):
            raise
        return None


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


@contextmanager
def open_weights(path: Path) -> Iterator[tuple[Shapes, Callable[[str], Tensor]]]:
    """Shapes by key, and a function that reads one tensor.

    Raises:
        CheckpointError: the file is truncated, or is not a flat state dict.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
                yield shapes, file.get_tensor
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
                raise CheckpointError(
                    f"{path} is not a flat dictionary of tensors; expected a VGGT state dict."
                )
            yield {key: tuple(tensor.shape) for key, tensor in state.items()}, state.__getitem__
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}); it is truncated or of another kind. "
            "Download or copy it again."
        ) from error


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
