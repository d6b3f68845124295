"""What all teachers that run a network share: frozen, gradient-free, outside every module tree.

Shapes: B batch, V views, h x w patch grid, C channels.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor, nn

from spatial_forcing.alignment import Views, transform
from spatial_forcing.errors import ConfigError
from spatial_forcing.forcing.target import sample_grid, token_points
from spatial_forcing.teachers.cards import Framing
from spatial_forcing.teachers.layers import resolve_layers
from spatial_forcing.teachers.preprocess import Framed, frame, resized_shape

DEFAULT_MEMORY = 2 * 2**30
"""Bytes of activations that a teacher keeps below unless told otherwise."""


class FrozenTeacher(ABC):
    """Base of teachers that run a network.

    Deliberately no `nn.Module`: kept as an attribute of one, it stays out of its state dict, optimizer and
    parallel wrappers (DDP, FSDP). It refuses to be pickled, and a deep copy is itself.

    Args:
        model: the network; put in eval mode, its parameters stop requiring gradients.
        name: registry name, hub id or path.
        licence: SPDX identifier of the weights.
        resolution: pixels of the longer side at which views are encoded.
        dtype: float32, or the type of matrix products (bfloat16, float16).
        framing: of views that are not square: "fit" encodes the view alone; "pad" adds white borders to a
            square, as the released recipe does, and drops their features again.
        memory: bytes of activations to stay below; larger batches are encoded a few samples at a time.

    Raises:
        ConfigError: the resolution is not a multiple of the patch size, unknown framing, no memory.
    """

    projected = False

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        licence: str,
        resolution: int,
        dtype: torch.dtype,
        framing: Framing,
        memory: int,
    ) -> None:
        model.eval().requires_grad_(False)
        self._module = model
        self.name, self.licence = name, licence
        self.resolution, self.dtype, self.framing, self.memory = resolution, dtype, framing, memory
        resized_shape(1, 1, resolution, self.patch, "fit")
        if framing not in ("fit", "pad"):
            raise ConfigError(f"teacher framing is {framing!r}; expected 'fit' or 'pad'.")
        if memory < 1:
            raise ConfigError(f"teacher memory is {memory} bytes; expected a positive number.")
        self._fingerprint: tuple[int, str] | None = None

    @property
    @abstractmethod
    def patch(self) -> int:
        """Pixels on a side of one patch."""

    @abstractmethod
    def _weights(self) -> Mapping[str, Tensor]:
        """The weights that features depend on, by name."""

    @abstractmethod
    def _facts(self) -> Mapping[str, Any]:
        """Whatever features depend on apart from the arithmetic type and the framing."""

    @abstractmethod
    def _bytes(self, views: int, height: int, width: int, layers: int) -> int:
        """Upper estimate of the activations of one sample."""

    @property
    def device(self) -> torch.device:
        """Where the weights are, and the results."""
        return next(self._module.parameters()).device

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the weights, the config, the arithmetic type and the preprocessing."""
        version = sum(tensor._version for tensor in self._module.parameters())
        if self._fingerprint is None or self._fingerprint[0] != version:
            self._fingerprint = (version, self._digest())
        return self._fingerprint[1]

    def _digest(self) -> str:
        facts = {**self._facts(), "resolution": self.resolution, "dtype": str(self.dtype)}
        if self.framing != "fit":
            facts["framing"] = self.framing
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for key, tensor in sorted(self._weights().items()):
            digest.update(f"{key} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Pixels (H', W') that a view of this size is resized to, padding not counted."""
        return resized_shape(height, width, self.resolution, self.patch, "fit")

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches of a view of this size, padding not counted."""
        rows, columns = self._size(height, width)
        return rows // self.patch, columns // self.patch

    def _scenes(self, views: Views, layers: int) -> Iterator[tuple[Tensor, Tensor, Framed]]:
        """Samples that have the same views, as many as memory allows, and the resized images of those.

        Yields (sample indices (n,), indices of their s views, n s framed images).
        """
        patterns, which = torch.unique(views.present.to(self.device), dim=0, return_inverse=True)
        source, valid = views.images.to(self.device, torch.float32), views.valid.to(self.device)
        grid = self._grid(*source.shape[-2:])
        height, width = grid[0] * self.patch, grid[1] * self.patch
        if self.framing == "pad":
            height = width = self.resolution
        for index, pattern in enumerate(patterns):
            columns = pattern.nonzero().flatten()
            if not len(columns):
                continue
            each = self._bytes(len(columns), height, width, layers)
            for rows in (which == index).nonzero().flatten().split(max(1, self.memory // each)):
                images, mask = (part[rows[:, None], columns].flatten(0, 1) for part in (source, valid))
                yield rows, columns, self._frame(images, mask)

    def _frame(self, images: Tensor, valid: Tensor) -> Framed:
        return frame(images, valid, self.resolution, self.patch, self.framing)

    def _without_padding(self, patches: Tensor, framed: Framed, grid: tuple[int, int]) -> Tensor:
        """Features (n, h, w, C) of framed images to those of the views alone, (n, *grid, C)."""
        if patches.shape[1:3] == grid:
            return patches
        points = token_points(torch.tensor(grid, device=patches.device), grid)
        with torch.autocast(patches.device.type, enabled=False):  # bf16 cannot place a token
            inside = transform(framed.from_original, points.flatten(0, 1)).view(1, *grid, 2)
            return sample_grid(patches, inside.expand(len(patches), -1, -1, -1))

    def _precision(self) -> torch.autocast:
        """Autocast to our own type, whatever the caller's autocast says."""
        kind = self.device.type
        if self.dtype == torch.float32:
            return torch.autocast(kind, enabled=False)
        return torch.autocast(kind, dtype=self.dtype)

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, in place."""
        self._module.to(device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # frozen: copies of a student (for averaging, say) share it

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"the teacher {self.name!r} is not pickled, so that its weights end up in no checkpoint; "
            "store its name and call load_teacher again."
        )


class GridTeacher(FrozenTeacher):
    """A teacher whose network gives a grid of features for every view.

    Views are resized to `resolution` without changing what they show (see `framing`). Those present in a
    sample are encoded, in the order of `views.cameras`. Absent ones get zero rows and influence nothing.
    """

    @property
    @abstractmethod
    def dim(self) -> int:
        """C, channels of one feature."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """Number of layers that can be asked for."""

    @abstractmethod
    def _encode(self, images: Tensor, layers: Sequence[int]) -> Sequence[Tensor]:
        """Framed images (n, s, 3, H, W) to patch tokens (n, s, h, w, C) of each layer, padding included."""

    @torch.no_grad()
    def features(self, views: Views, layers: Sequence[int] = (-1,)) -> tuple[Tensor, ...]:
        """Patch features of the asked layers, one (B, V, h, w, C) float32 tensor each.

        Args:
            views: what to encode; moved to the teacher's device.
            layers: 0-based, negative from the end; later layers do not run.

        Raises:
            ConfigError: a layer does not exist.
        """
        wanted = resolve_layers(layers, self.depth)
        grid = self._grid(*views.images.shape[-2:])
        lead = (*views.present.shape, *grid)
        results: tuple[Tensor, ...] = ()
        for rows, columns, framed in self._scenes(views, len(set(wanted))):
            with self._precision():
                encoded = self._encode(framed.images.unflatten(0, (len(rows), -1)), wanted)
            # Not before the first forward, whose peak they would raise.
            results = results or self._zeros(lead, len(wanted))
            for result, layer in zip(results, encoded, strict=True):
                patches = self._without_padding(layer.flatten(0, 1).float(), framed, grid)
                result[rows[:, None], columns] = patches.unflatten(0, layer.shape[:2])
        return results or self._zeros(lead, len(wanted))

    def _zeros(self, lead: tuple[int, ...], count: int) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(*lead, self.dim, device=self.device) for _ in range(count))


class SceneTeacher(GridTeacher):
    """A teacher that encodes the views of a sample together, and may predict depth and cameras from them.

    The first of the present views is the reference view.
    """

    heads: ClassVar[tuple[str, ...]]
    """What `predict` can be asked for."""

    @property
    @abstractmethod
    def _head_layers(self) -> int:
        """Layers that the dense heads read."""

    @abstractmethod
    def _predict(self, images: Tensor, heads: Sequence[str]) -> dict[str, Tensor]:
        """Framed images (n, s, 3, H, W) to maps (n, s, ...)."""

    @torch.no_grad()
    def predict(self, views: Views, heads: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The heads' predictions; pixels are those of the resized views, absent views get zeros.

        Args:
            views: what to encode; moved to the teacher's device.
            heads: any of `heads`; None: all.

        Returns:
            For "depth": `depth` (B, V, H, W, 1) > 0 in the model's unit. The teacher's class says the others.

        Raises:
            ConfigError: a head is unknown, or the teacher was loaded without heads.
        """
        results: dict[str, Tensor] = {}
        for rows, columns, framed in self._scenes(views, self._head_layers):
            with self._precision():
                maps = self._predict(framed.images.unflatten(0, (len(rows), -1)), heads or self.heads)
            for name, values in maps.items():
                if name not in results:
                    results[name] = values.new_zeros(*views.present.shape, *values.shape[2:])
                results[name][rows[:, None], columns] = values
        return results


def lower_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of matrix products in `dtype`: autocast would convert them in every call."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.to(dtype)


@contextmanager
def random_stream(seed: int) -> Iterator[None]:
    """Use a separate random stream; the caller's random state is unchanged afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
