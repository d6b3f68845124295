"""Checkpoint files of our own teachers: found locally or on the hub, read lazily, keys compared.

Weights are `model.safetensors` or `model.pt` (a flat state dict); both are mapped into memory.
"""

from __future__ import annotations

import dataclasses
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.registry import did_you_mean

Shapes = Mapping[str, tuple[int, ...]]

LISTED = 12
"""How many offending keys an error message shows."""
LICENCE_KEY = "licence"
"""In a `config.json` that this package wrote: the SPDX identifier of the weights."""


def find_weights(path: Path, names: Sequence[str], kind: str) -> Path:
    """The weights file in a folder (the first of `names` that is there), or `path` where it is a file.

    Raises:
        CheckpointError: nothing there.
    """
    if path.is_dir():
        there = [path / name for name in names if (path / name).is_file()]
        if not there:
            raise CheckpointError(
                f"{path} holds neither {' nor '.join(names)}; point at a {kind} checkpoint."
            )
        return there[0]
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a checkpoint folder, a weights file or a hub id.")
    return path


def download(repo_id: str, config: str, weights: Sequence[str]) -> tuple[Path | None, Path]:
    """Download (or take from the Hugging Face cache) a repository's config, if it has one, and its weights.

    Raises:
        CheckpointError: unknown or gated repository, no connection, or none of `weights` in it.
    """
    try:
        settings = _download(repo_id, config)
        found = next((path for name in weights if (path := _download(repo_id, name))), None)
    except (OSError, ValueError) as error:  # every hub error derives from one of them
        reason = str(error).rstrip(". ")
        raise CheckpointError(
            f"cannot get {repo_id!r} from the Hugging Face hub: {reason}. Check the name and the connection, "
            "accept the licence and run `hf auth login` if it is gated, or download it elsewhere and give "
            "the folder instead."
        ) from error
    if found is None:
        raise CheckpointError(f"{repo_id!r} on the hub holds neither {' nor '.join(weights)}.")
    return settings, found


def _download(repo_id: str, name: str) -> Path | None:
    try:
        return Path(hf_hub_download(repo_id, name))
    except EntryNotFoundError as error:
        # Offline, "not in the cache" is one kind of this error: it must not read as "not in the repository".
        if isinstance(error, FileNotFoundError):
            raise
        return None


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
                raise CheckpointError(f"{path} is not a flat dictionary of tensors; expected a state dict.")
            yield {key: tuple(tensor.shape) for key, tensor in state.items()}, state.__getitem__
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}); it is truncated or of another kind. "
            "Download or copy it again."
        ) from error


def check_shapes(
    found: Shapes, expected: Shapes, required: Iterable[str], *, where: str, remedy: str
) -> None:
    """Compare a checkpoint's keys and shapes with a model's.

    Args:
        found: shape by key, as stored.
        expected: shape by key of every part that a checkpoint may hold.
        required: the keys of `expected` that must be there.
        where: the file, for the message.
        remedy: the message's last sentence.

    Raises:
        CheckpointError: listing missing keys, unexpected keys and wrong shapes.
    """
    missing = [key for key in required if key not in found]
    unexpected = [key for key in found if key not in expected]
    wrong = [
        f"{key} is {tuple(found[key])}, expected {shape}"
        for key, shape in expected.items()
        if key in found and tuple(found[key]) != shape
    ]
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:LISTED])}{', ...' if len(keys) > LISTED else ''}"
        for what, keys in (
            ("missing keys", missing),
            ("unexpected keys", unexpected),
            ("wrong shapes", wrong),
        )
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"{where} does not fit the model it is loaded as. {'; '.join(problems)}. {remedy}"
        )


def checked_settings(kind: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` of a config file with lists as tuples. Raises `ConfigError` for names that `kind` lacks."""
    known = [f.name for f in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{where} config has an unknown key {key!r}.{did_you_mean(key, known)}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
