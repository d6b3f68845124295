"""`forcing.subtract_cell_mean`: targets without the mean of each cell of a fixed camera. Not in the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spatial_forcing.errors import DataError
from spatial_forcing.forcing.distributed import sum_over_ranks
from spatial_forcing.precision import FixedPrecision


class CellMean(FixedPrecision):
    """Subtracts from every cell of the teacher's grid the mean of all frames seen so far.

    With cameras that do not move, most of what the teacher says at a cell is the same in every frame; the
    cosine is then nearly won by learning that alone. What is left is how this frame differs. Done on the
    teacher's grid, before sampling, so that it is right under crops. The moments are cumulative, one set for
    each layer and view, summed over ranks, include the current batch, and are saved with the projector; they
    take 8 bytes a channel of a cell.

    Args:
        layers: number of teacher layers.
    """

    count: Tensor
    total: Tensor

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers
        # The grid is known with the first features.
        self.register_buffer("count", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("total", torch.zeros(layers, 0, 0, 0, 0, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, features: Sequence[Tensor], present: Tensor) -> list[Tensor]:
        """Centre (B, V, H, W, C) features, one for each layer; views that are `present` (B, V) update the
        moments.

        Moments move in training mode only. Before a view's first frame it passes unchanged.

        Raises:
            DataError: the number of views or the grid is another than before.
        """
        if not self.count.numel():
            self._shape_like(features[0].shape[1:], features[0].device)
        for feature in features:
            if feature.shape[1:] != self.total.shape[1:]:
                raise DataError(
                    f"forcing.subtract_cell_mean has the means of (views, rows, columns, channels) "
                    f"{tuple(self.total.shape[1:])}, but the teacher returned {tuple(feature.shape[1:])}; it "
                    "needs the same cameras and image size in every batch. Set it to false for mixed data."
                )
        if self.training:
            self._update(features, present)
        mean = (self.total / self.count.clamp(min=1)[:, None, None, None]).float()
        return [feature.float() - layer for feature, layer in zip(features, mean, strict=True)]

    def _update(self, features: Sequence[Tensor], present: Tensor) -> None:
        shown = present[:, :, None, None, None]
        sums = torch.stack([torch.where(shown, f, 0).double().sum(0) for f in features])
        moments = torch.cat([present.sum(0).double(), sums.flatten()])
        moments = sum_over_ranks(moments.to(self.count.device))
        self.count += moments[: self.count.numel()]
        self.total += moments[self.count.numel() :].view_as(self.total)

    def _shape_like(self, shape: Sequence[int], device: torch.device) -> None:
        self.count = torch.zeros(shape[0], dtype=torch.float64, device=device)
        self.total = torch.zeros(self.layers, *shape, dtype=torch.float64, device=device)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
        stored = state_dict.get(f"{prefix}total")
        if stored is not None and not self.count.numel():
            self._shape_like(stored.shape[1:], self.count.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)
