"""Fewer channels for a cache: an orthonormal basis of the directions in which a teacher's features vary.

A token's coordinates keep angles: what a reader delivers in k channels has the cosines that the projected
features have in the teacher's C channels, so a projector learns k channels and nothing is ever expanded.

Shapes: n tokens, C channels of the teacher, k channels stored.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.storage import replace_file

BASIS_FILE = "basis.safetensors"
SMALLEST = 1e-6
"""Standard deviation below which a channel counts as constant."""


@dataclass(frozen=True)
class Basis:
    """The directions of one layer.

    Attributes:
        mean: (C,), of the sample.
        vectors: (C, k) orthonormal; the first is the mean's direction, unless features are standardised.
        scale: (C,) standard deviations that channels are divided by before the fit, or None.
    """

    mean: Tensor
    vectors: Tensor
    scale: Tensor | None = None

    @property
    def gain(self) -> float:
        """Factor of delivered coordinates: a channel's mean square stays that of the teacher's channels.

        The positional embedding added to a target then has the same weight in k channels as in C.
        """
        return math.sqrt(self.vectors.shape[1] / self.vectors.shape[0])

    @property
    def offset(self) -> Tensor:
        """(k,): coordinates of what `project` subtracts and a reader adds again."""
        return (
            self.vectors.new_zeros(self.vectors.shape[1])
            if self.scale is not None
            else self.mean @ self.vectors
        )

    def reference(self, features: Tensor) -> Tensor:
        """The features (..., C) that the basis stands for: standardised where it is."""
        return features if self.scale is None else (features - self.mean) / self.scale

    def project(self, features: Tensor) -> Tensor:
        """(..., C) to centred coordinates (..., k), what is stored."""
        centred = features - self.mean
        return (centred if self.scale is None else centred / self.scale) @ self.vectors

    def expand(self, stored: Tensor) -> Tensor:
        """Stored coordinates (..., k) to `reference` features (..., C), as far as the basis reaches."""
        return (stored + self.offset) @ self.vectors.T

    def to(self, device: torch.device | str) -> Basis:
        """The same on another device."""
        scale = None if self.scale is None else self.scale.to(device)
        return Basis(self.mean.to(device), self.vectors.to(device), scale)


class Moments:
    """Mean and covariance of tokens that come in parts; products in float32 about the first part's mean."""

    def __init__(self) -> None:
        self.count = 0
        self._pilot: Tensor | None = None
        self._sum: Tensor | float = 0.0
        self._products: Tensor | float = 0.0

    def add(self, tokens: Tensor) -> None:
        """Take (n, C) tokens."""
        if self._pilot is None:
            self._pilot = tokens.float().mean(0)
        centred = tokens.float() - self._pilot
        self.count += len(tokens)
        self._sum = self._sum + centred.sum(0, dtype=torch.float64)
        self._products = self._products + (centred.T @ centred).double()

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean (C,) and covariance (C, C), float64."""
        assert self._pilot is not None
        assert isinstance(self._sum, Tensor)
        shift = self._sum / self.count
        return self._pilot.double() + shift, self._products / self.count - torch.outer(shift, shift)


def fit_basis(moments: Moments, channels: int, standardise: bool) -> Basis:
    """The basis of `channels` directions that keeps most of the variance.

    Args:
        moments: of a sample of tokens.
        channels: k.
        standardise: divide every channel by its standard deviation, after subtracting its mean.

    Raises:
        DataError: fewer tokens than directions.
        ConfigError: k is not below C.
    """
    if moments.count < channels:
        raise DataError(
            f"the sample for a basis of {channels} channels has {moments.count} tokens; take more frames."
        )
    mean, covariance = moments.result()
    if not channels < len(mean):
        raise ConfigError(f"channels is {channels}; expected fewer than the teacher's {len(mean)}.")
    if standardise:
        scale = covariance.diagonal().clamp(min=0).sqrt().clamp(min=SMALLEST)
        vectors = _leading(covariance / torch.outer(scale, scale), channels)
        return Basis(mean.float(), vectors.float().contiguous(), scale.float())
    direction = torch.nn.functional.normalize(mean, dim=0)
    # Off the mean's direction, which has a vector of its own: there the variance is made the smallest, so
    # that it comes last even where nothing varies.
    along = torch.outer(direction, direction)
    across = torch.eye(len(mean), dtype=mean.dtype, device=mean.device) - along
    others = _leading(across @ covariance @ across - (1 + covariance.trace()) * along, channels - 1)
    return Basis(mean.float(), torch.cat([direction[:, None], others], 1).float().contiguous())


def _leading(covariance: Tensor, count: int) -> Tensor:
    """Eigenvectors (C, count) of the largest eigenvalues, largest first."""
    return torch.linalg.eigh(covariance).eigenvectors[:, -count:].flip(1)


def save_bases(folder: Path, bases: Mapping[int, Basis]) -> dict[str, Any]:
    """Write the vectors and return what the header says: a digest of the file, and every layer's mean."""
    tensors = {f"vectors{layer}": basis.vectors.cpu() for layer, basis in bases.items()}
    tensors |= {f"scale{layer}": b.scale.cpu() for layer, b in bases.items() if b.scale is not None}
    replace_file(folder / BASIS_FILE, lambda path: save_file(tensors, path))
    return {
        "sha256": _digest(folder / BASIS_FILE),
        "mean": {str(layer): basis.mean.tolist() for layer, basis in bases.items()},
    }


def load_bases(folder: Path, facts: Mapping[str, Any]) -> dict[int, Basis]:
    """Read what `save_bases` wrote; `facts` is its result. Raises `DataError` on a damaged file."""
    path = folder / BASIS_FILE
    try:
        intact = _digest(path) == facts["sha256"]
        tensors = load_file(path) if intact else {}
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); build the cache again in another folder."
        ) from error
    if not intact:
        raise DataError(
            f"{path} is not the basis that the header names (its digest differs): without it no row can be "
            "read. Restore the file, or build the cache again in another folder."
        )
    return {
        int(layer): Basis(torch.tensor(mean), tensors[f"vectors{layer}"], tensors.get(f"scale{layer}"))
        for layer, mean in facts["mean"].items()
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
