"""Weights of checkpoints: read one tensor at a time, renamed without losing any, put in their place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from spatial_forcing.errors import CheckpointError

T = TypeVar("T")
SAMPLES = 64
"""Numbers read from each tensor for a fingerprint, evenly spread."""


def open_weights(path: Path) -> Any:
    """The safetensors file `path`, to be used in a `with`. Raises `CheckpointError` when it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}); copy it again.") from error


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape by name of everything in a safetensors file. Raises `CheckpointError` when it is damaged."""
    with open_weights(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file. Raises `CheckpointError` when it cannot be read.

    The file is opened again, and so mapped again: pages that were read before do not add up in memory.
    """
    with open_weights(path) as file:
        try:
            tensor: Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {name} cannot be read ({error}).") from error
    return tensor


def read_tensors(files: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """Every named tensor, file by file; no more than one is in memory. Raises as `read_tensor`."""
    for name in sorted(files, key=lambda name: (files[name].name, name)):
        yield name, read_tensor(files[name], name)


def assign(module: nn.Module, name: str, value: Tensor, dtype: torch.dtype | None = None) -> None:
    """Put a copy of `value` (as `dtype`; default its own) in the place of the parameter or buffer `name`."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    old = getattr(owner, leaf)
    # Copied, once: the tensor may be a view of the mapped file, or of a larger tensor that it was cut from.
    own = value.to(dtype or value.dtype, copy=True, memory_format=torch.contiguous_format)
    setattr(owner, leaf, nn.Parameter(own, old.requires_grad) if isinstance(old, nn.Parameter) else own)


def renamed(
    stored: Mapping[str, T], rename: Callable[[str], str], place: object, same: Callable[[T, T], bool]
) -> dict[str, T]:
    """`stored` under new names.

    Args:
        stored: by the names in the file.
        rename: the new name of each.
        place: the file, for the message.
        same: whether two entries that get one name are equal, so that one of them may go.

    Raises:
        CheckpointError: two that differ get one name; both are named.
    """
    result: dict[str, T] = {}
    origin: dict[str, str] = {}
    for name, value in stored.items():
        new = rename(name)
        if new in result and not same(result[new], value):
            raise CheckpointError(
                f"{place} holds {origin[new]!r} and {name!r}, which are one weight of the model and differ; "
                "keep the one that was trained and save the file again."
            )
        result.setdefault(new, value)
        origin.setdefault(new, name)
    return result


def weights_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits over names, shapes, types and `SAMPLES` numbers of each tensor; no more is read.

    Enough to notice that a base was exchanged, retrained or merged.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].detach().reshape(-1)
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        if len(flat):
            where = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64).long()
            digest.update(flat[where.to(flat.device)].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
