"""`forcing.projection`: other maps from student tokens to teacher channels. The paper's is a trained MLP.

`frozen` keeps the MLP's initial weights (BlindVLA): only the student can move.

Shapes: B batch, V views, h x w tokens of a view, N = V h w, D student and C teacher channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from spatial_forcing.precision import FixedPrecision

Projection = Literal["mlp", "frozen", "conv"]
PROJECTIONS: tuple[str, ...] = get_args(Projection)
EPS = 1e-6


class ConvProjector(FixedPrecision):
    """A 3 x 3 convolution over a view's tokens (iREPA); targets go through `spatial_norm`.

    An MLP can leave the student's tokens without the layout that the teacher's have; this cannot.

    Args:
        student_dim, teacher_dim: D and C.
    """

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            self.conv = nn.Conv2d(student_dim, teacher_dim, 3, padding=1, dtype=torch.float32)

    def forward(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """Project (B, N, D) of any float type to (B, N, C) float32; tokens that are not valid count as zeros.

        Args:
            hidden: student tokens.
            valid: (B, V, h, w) bool.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            grid = valid.shape[2:]
            x = torch.where(valid.flatten(1)[..., None], hidden.float(), 0.0)
            x = x.unflatten(1, (-1, *grid)).flatten(0, 1).permute(0, 3, 1, 2)
            projected: Tensor = self.conv(x).flatten(2).transpose(1, 2)
            return projected.reshape(len(hidden), hidden.shape[1], -1)

    def on(self, grid: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """`forward` for tokens of `grid` (B, V, h, w), as a function of tokens and their flat validity."""
        return lambda hidden, _: self(hidden, grid.to(hidden.device))


def spatial_norm(target: Tensor, valid: Tensor) -> Tensor:
    """Every channel of a view without its mean over the view's valid tokens, over their deviation.

    What all tokens of an image share is left out of the target (iREPA).

    Args:
        target: (B, V, h, w, C).
        valid: (B, V, h, w) bool; other rows stay zero.
    """
    mask = valid[..., None]
    count = mask.sum((2, 3), keepdim=True).clamp(min=1)
    mean = torch.where(mask, target, 0.0).sum((2, 3), keepdim=True) / count
    centred = torch.where(mask, target - mean, 0.0)
    deviation = (centred.square().sum((2, 3), keepdim=True) / count).sqrt()
    return centred / (deviation + EPS)
