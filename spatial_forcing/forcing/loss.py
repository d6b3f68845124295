"""The alignment loss: one minus the cosine, over valid tokens, then over samples that have any.

Shapes: B batch, N tokens, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_cosines(projected: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Mean cosine over each sample's valid tokens (paper, section 3).

    Args:
        projected, target: (B, N, C) float32.
        valid: (B, N) bool.

    Returns:
        (B,); 0, connected to the graph, for a sample without valid tokens.
    """
    cosine = F.cosine_similarity(projected, target, dim=-1)
    cosine = torch.where(valid, cosine, cosine.new_zeros(()))
    return cosine.sum(1) / valid.sum(1).clamp(min=1)


def alignment_loss(projected: Tensor, target: Tensor, valid: Tensor, weight: float | None = None) -> Tensor:
    """Sum over samples with valid tokens of (1 - mean cosine), times `weight`.

    Args:
        projected, target, valid: see `sample_cosines`.
        weight: default one over the number of such samples (the mean); `SpatialForcing` passes the weight
            that makes ranks and accumulated micro-batches add up to the mean over all of them.

    Returns:
        A scalar; 0, connected to the graph, when no sample has valid tokens.
    """
    has_any = valid.any(1)
    if weight is None:
        weight = 1 / max(int(has_any.sum()), 1)
    return (has_any.float() - sample_cosines(projected, target, valid)).sum() * weight
