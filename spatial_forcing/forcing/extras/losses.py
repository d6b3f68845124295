"""`forcing.loss`: other distances between projected tokens and targets. The paper's is the cosine.

Shapes: B batch, V views, n tokens of a view, N = V n, C channels.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Literal["cosine", "smooth_l1", "mse", "gram"]
LOSSES: tuple[str, ...] = get_args(Loss)


def distance_loss(
    kind: Loss,
    projected: Tensor,
    target: Tensor,
    valid: Tensor,
    weight: float | Tensor | None = None,
    *,
    views: int = 1,
) -> Tensor:
    """Sum over samples with valid tokens of their mean distance, times `weight`; see `loss.alignment_loss`.

    Args:
        kind: "smooth_l1" (arXiv 1504.08083, beta 1) and "mse", the mean over channels and valid tokens: they
            also ask for the features' scale. "gram": the mean squared difference of the cosines between every
            two valid tokens of a view (arXiv 1505.07376; as DINOv3 keeps its features, arXiv 2508.10104): it
            asks which tokens are alike, not what they are.
        projected, target: (B, N, C) float32.
        valid: (B, N) bool.
        weight: default one over the number of samples with valid tokens.
        views: V, of which the tokens are made up in order; for "gram".

    Returns:
        A scalar; 0, connected to the graph, when no sample has valid tokens.
    """
    if weight is None:
        weight = 1 / max(int(valid.any(1).sum()), 1)
    if kind == "gram":
        return gram_distances(projected, target, valid, views).sum() * weight
    distance = F.smooth_l1_loss if kind == "smooth_l1" else F.mse_loss
    tokens = distance(projected, target, reduction="none").mean(-1)
    tokens = torch.where(valid, tokens, tokens.new_zeros(()))
    return (tokens.sum(1) / valid.sum(1).clamp(min=1)).sum() * weight


def gram_distances(projected: Tensor, target: Tensor, valid: Tensor, views: int) -> Tensor:
    """Mean squared difference of the cosines within each view, (B,); 0 for a sample without a pair."""
    ours, theirs = (_cosines(tokens, views) for tokens in (projected, target))
    alive = valid.unflatten(1, (views, -1))
    pairs = alive[..., :, None] & alive[..., None, :]
    gap = torch.where(pairs, (ours - theirs).square(), ours.new_zeros(()))
    return gap.flatten(1).sum(1) / pairs.flatten(1).sum(1).clamp(min=1)


def _cosines(tokens: Tensor, views: int) -> Tensor:
    unit = F.normalize(tokens, dim=-1).unflatten(1, (views, -1))
    return unit @ unit.transpose(-1, -2)
