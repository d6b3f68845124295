"""`forcing.gate`: several student layers mixed by learned weights. The paper's appendix calls it adaptive."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatial_forcing.forcing.projector import Projector


class GatedProjector(Projector):
    """A projector in front of which the states of several layers are mixed.

    The gate acts on states, not on losses: a gate over losses would choose the layer that is easiest to
        align.

    Args:
        student_dim, teacher_dim, norm: see `Projector`.
        layers: number of student layers that are mixed.
    """

    def __init__(self, student_dim: int, teacher_dim: int, norm: str, layers: int) -> None:
        super().__init__(student_dim, teacher_dim, norm)
        self.gate = nn.Parameter(torch.zeros(layers, dtype=torch.float32, device="cpu"))

    def mix(self, hiddens: Sequence[Tensor]) -> Tensor:
        """Mix (B, N, D) states, one for each layer, each normalised, by the softmax of the gate."""
        with torch.autocast(hiddens[0].device.type, enabled=False):
            weights = self.gate.softmax(0)
            states = [F.layer_norm(h.float(), h.shape[-1:]) for h in hiddens]
            return torch.stack([w * s for w, s in zip(weights, states, strict=True)]).sum(0)
