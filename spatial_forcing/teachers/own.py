"""`as_teacher`: one's own vision model as a teacher.

Shapes: N images, B scenes, V views, H x W pixels, h x w cells, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.teachers.cards import Framing
from spatial_forcing.teachers.frozen import DEFAULT_MEMORY, GridTeacher
from spatial_forcing.teachers.preprocess import ANTIALIASED_RULE, Framed, frame

Encode = Callable[[Tensor], Tensor | Sequence[Tensor]]
"""Images in [0, 1], (N, 3, H, W) or (B, S, 3, H, W), to a grid (..., h, w, C), or one for each layer."""


class OwnTeacher(GridTeacher):
    """What `as_teacher` returns. Implements `Teacher`."""

    def __init__(
        self,
        module: nn.Module,
        encode: Encode,
        *,
        dim: int,
        patch: int,
        depth: int,
        together: bool,
        version: str,
        **options: Any,
    ) -> None:
        self._function, self._dim, self._depth, self._patch = encode, dim, depth, patch
        self._together, self._version = together, version
        super().__init__(module, **options)

    @property
    def dim(self) -> int:
        """C, channels of one feature."""
        return self._dim

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self._depth

    @property
    def patch(self) -> int:
        """Pixels on a side of one patch."""
        return self._patch

    def _weights(self) -> dict[str, Tensor]:
        return dict(self._module.state_dict())

    def _facts(self) -> dict[str, Any]:
        kind = f"{type(self._module).__module__}.{type(self._module).__qualname__}"
        return {
            "kind": kind, "version": self._version, "dim": self.dim, "patch": self.patch,
            "together": self._together, "resize": ANTIALIASED_RULE,
        }  # fmt: skip

    def _bytes(self, views: int, height: int, width: int, layers: int) -> int:
        # A guess at an unknown network: a transformer of this width.
        tokens = views * (height // self.patch) * (width // self.patch)
        return 4 * tokens * self.dim * (16 + layers)

    def _frame(self, images: Tensor, valid: Tensor) -> Framed:
        return frame(images, valid, self.resolution, self.patch, self.framing, antialias=True)

    def _encode(self, images: Tensor, layers: Sequence[int]) -> Sequence[Tensor]:
        """The function's grids, checked: (n, s, h, w, C) each."""
        images = images.clamp(0, 1)
        found = self._function(images if self._together else images.flatten(0, 1))
        grids = (found,) if isinstance(found, Tensor) else tuple(found)
        cells = tuple(side // self._patch for side in images.shape[-2:])
        lead = images.shape[:2] if self._together else (images.shape[0] * images.shape[1],)
        expected = (*lead, *cells, self.dim)
        if len(grids) != self.depth or any(tuple(g.shape) != expected for g in grids):
            raise DataError(
                f"{self.name!r} gave {[tuple(g.shape) for g in grids]} for images of "
                f"{tuple(images.shape[-2:])}; expected {self.depth} of {expected}. Correct the function, or "
                "dim, patch and depth."
            )
        return [grids[layer].reshape(*images.shape[:2], *cells, self.dim) for layer in layers]


def as_teacher(
    module: nn.Module,
    encode: Encode,
    *,
    dim: int,
    patch: int,
    resolution: int,
    licence: str,
    name: str | None = None,
    depth: int = 1,
    together: bool = False,
    version: str = "1",
    dtype: torch.dtype = torch.float32,
    framing: Framing = "fit",
    memory: int = DEFAULT_MEMORY,
) -> OwnTeacher:
    """One's own vision model as a teacher, live and cached.

    Args:
        module: holds the weights; it is frozen and put in eval mode.
        encode: images in [0, 1], (N, 3, H, W) float32, to features (N, h, w, C): normalise pixels in it,
            call `module`, drop class tokens, make a grid. H and W are multiples of `patch`. With `together`,
            images are (B, S, 3, H, W), the views of B samples, and features (B, S, h, w, C). Several layers:
            a tuple.
        dim: C.
        patch: pixels on a side of a cell.
        resolution: pixels of the longer side at which views are encoded, a multiple of `patch`.
        licence: SPDX identifier of the weights, said in logs and model cards.
        name: default the module's class.
        depth: number of layers that `encode` gives.
        together: see `encode`.
        version: change it when `encode` changes: caches are bound to it, to the weights and to the settings.
        dtype: type of matrix products (autocast).
        framing, memory: see `frozen.FrozenTeacher`.

    Raises:
        ConfigError: the resolution is not a multiple of the patch size, a number below 1, a module without
            parameters.
    """
    if min(dim, patch, depth) < 1:
        raise ConfigError(f"dim is {dim}, patch {patch}, depth {depth}; expected at least 1 each.")
    if next(module.parameters(), None) is None:
        raise ConfigError(
            f"{type(module).__name__} has no parameters; give the module that holds the teacher's weights."
        )
    return OwnTeacher(
        module,
        encode,
        dim=dim,
        patch=patch,
        depth=depth,
        together=together,
        version=version,
        name=type(module).__name__ if name is None else name,
        licence=licence,
        resolution=resolution,
        dtype=dtype,
        framing=framing,
        memory=memory,
    )
