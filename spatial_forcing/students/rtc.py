"""Real-time chunking for flow heads (arXiv 2506.07339): a new chunk that continues the running one.

While a chunk is computed the robot goes on executing the previous one. Of the actions that are left, the
first `delay` will have been executed when the new chunk arrives, so it must agree with them, and with the
rest less and less. The sampler is guided there by the gradient of a weighted squared error between the
previous actions and its own estimate of the final chunk (pseudo-inverse guidance).

Shapes: B batch, T chunk, A action_dim. Time runs from 0 (noise) to 1 (actions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spatial_forcing.errors import DataError

MAX_GUIDANCE = 5.0
"""Largest guidance weight (beta of the paper, its value for few integration steps)."""


@dataclass(frozen=True)
class Overlap:
    """The actions of the running chunk that are not executed yet.

    Attributes:
        previous: (n, A) float32 in environment units, n >= 1; row 0 is the action of the step at which the
            observation was taken. At most a chunk long.
        delay: how many of these rows will have been executed when the new chunk arrives, 0 to n. The new
            chunk begins with exactly these rows.
    """

    previous: NDArray[np.float32]
    delay: int

    def __post_init__(self) -> None:
        if self.previous.ndim != 2 or not len(self.previous) or not np.isfinite(self.previous).all():
            raise DataError(
                f"rtc.previous has shape {self.previous.shape}; expected (n, action_dim), n >= 1, finite."
            )
        if not 0 <= self.delay <= len(self.previous):
            raise DataError(
                f"rtc.delay is {self.delay}; expected 0 to {len(self.previous)} (rows of previous)."
            )

    def check(self, chunk: int, action_dim: int) -> None:
        """Raise `DataError` unless it fits a policy with these sizes."""
        rows, width = self.previous.shape
        if rows > chunk or width != action_dim:
            raise DataError(
                f"rtc.previous has shape {(rows, width)}; this policy expects at most {chunk} rows of "
                f"{action_dim} numbers."
            )


def guidance(
    overlaps: Sequence[Overlap], normalize: Callable[[Tensor], Tensor], chunk: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """What `guided_velocity` takes: previous actions (B, T, A), normalised, and weights (B, T).

    Args:
        overlaps: one a sample, checked (`Overlap.check`).
        normalize: environment units -> the policy's, over the last dimension.
        chunk: T.
        like: gives device and type.

    """
    previous, weights = [], []
    for overlap in overlaps:
        rows, width = overlap.previous.shape
        left = normalize(torch.tensor(overlap.previous).to(like))
        previous.append(torch.cat([left, left.new_zeros(chunk - rows, width)]))
        weights.append(soft_mask(chunk, overlap.delay, rows).to(like))
    return torch.stack(previous), torch.stack(weights)


def soft_mask(chunk: int, delay: int, overlap: int) -> Tensor:
    """(chunk,) guidance weights: 1 for the first `delay` rows, then decaying to 0 at row `overlap`.

    Row i in between gets c (e^c - 1) / (e - 1) with c = (overlap - i) / (overlap - delay + 1) (eq. 5).
    """
    row = torch.arange(chunk, dtype=torch.float32)
    c = ((overlap - row) / (overlap - delay + 1)).clamp(0, 1)
    decay = c * torch.expm1(c) / math.expm1(1)
    return torch.where(row < delay, 1.0, torch.where(row < overlap, decay, 0.0))


def guidance_weight(time: float, limit: float = MAX_GUIDANCE) -> float:
    """min(limit, (1 - t) / (t r^2)) with r^2 = (1 - t)^2 / (t^2 + (1 - t)^2); `limit` at t = 0."""
    left = 1 - time
    if time * left <= 0:
        return limit if time <= 0 else 0.0
    return min(limit, (time**2 + left**2) / (time * left))


def guided_velocity(
    velocity: Callable[[Tensor], Tensor], noisy: Tensor, time: float, previous: Tensor, weight: Tensor
) -> Tensor:
    """The velocity at `noisy`, corrected towards `previous` where `weight` is positive; (B, T, A).

    Args:
        velocity: (B, T, A) -> (B, T, A) at this time; differentiable. None of the tensors may have been made
            in inference mode.
        noisy: the sample so far.
        time: in [0, 1).
        previous: (B, T, A) normalised actions to agree with; what has weight 0 is ignored.
        weight: (B, T) as `soft_mask` gives.
    """
    with torch.enable_grad():
        start = noisy.detach().clone().requires_grad_()
        flow = velocity(start)
        final = start + (1 - time) * flow
        error = (previous - final).detach() * weight[..., None]
        (correction,) = torch.autograd.grad(final, start, error)
    return flow.detach() + guidance_weight(time) * correction


def freeze(actions: Tensor, previous: Tensor, delays: list[int]) -> Tensor:
    """`actions` with the first `delays[b]` rows of each sample replaced by `previous`, (B, T, A)."""
    row = torch.arange(actions.shape[1], device=actions.device)
    frozen = row[None] < torch.tensor(delays, device=actions.device)[:, None]
    return torch.where(frozen[..., None], previous, actions)
