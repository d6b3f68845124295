"""`forcing.standardise`: targets with mean 0 and variance 1 in every channel. Not in the paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spatial_forcing.forcing.distributed import sum_over_ranks
from spatial_forcing.precision import FixedPrecision


class Standardiser(FixedPrecision):
    """Standardises each teacher channel by the mean and variance of all valid target tokens seen so far.

    Most of the norm of VGGT's features is one constant vector, which the cosine rewards before anything
    spatial is learned. The moments are cumulative, one set for each teacher layer, summed
    over ranks before use (so every rank has the same ones), include the current batch, and are saved with
    the projector.

    Args:
        layers: number of teacher layers.
        dim: C.
    """

    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, layers: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64, device="cpu"))
        self.register_buffer("total", torch.zeros(layers, dim, dtype=torch.float64, device="cpu"))
        self.register_buffer("squares", torch.zeros(layers, dim, dtype=torch.float64, device="cpu"))

    @torch.no_grad()
    def forward(self, targets: Sequence[Tensor], valid: Tensor) -> list[Tensor]:
        """Standardise one (..., C) target a layer; `valid` (...) selects the tokens that update the moments.

        Moments move in training mode only. Before the first token the targets pass unchanged.
        """
        if self.training:
            self._update(targets, valid)
        if float(self.count) == 0:
            return list(targets)
        mean = self.total / self.count
        deviation = (self.squares / self.count - mean**2).clamp(min=0).sqrt().clamp(min=1e-6)
        return [(t - m.float()) / d.float() for t, m, d in zip(targets, mean, deviation, strict=True)]

    def _update(self, targets: Sequence[Tensor], valid: Tensor) -> None:
        tokens = [t[valid].double() for t in targets]
        moments = torch.cat(
            [
                valid.sum().double()[None],
                torch.stack([t.sum(0) for t in tokens]).flatten(),
                torch.stack([t.square().sum(0) for t in tokens]).flatten(),
            ]
        )
        moments = sum_over_ranks(moments.to(self.count.device))
        self.count += moments[0]
        self.total += moments[1 : 1 + self.total.numel()].view_as(self.total)
        self.squares += moments[1 + self.total.numel() :].view_as(self.squares)
