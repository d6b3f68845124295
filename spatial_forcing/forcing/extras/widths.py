"""`forcing.widths`: a pair may use a part of the projector's hidden layer (Matryoshka). Not in the paper."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_forcing.forcing.projector import Projector


def narrowed(projector: Projector, width: float) -> Callable[[Tensor, Tensor], Tensor]:
    """`projector.forward` with the first `width` of its hidden units; `width` in (0, 1]."""
    used = max(1, round(width * projector.fc1.out_features))

    def project(hidden: Tensor, valid: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            x = projector.normalise(hidden, valid)
            x = F.gelu(F.linear(x, projector.fc1.weight[:used], projector.fc1.bias[:used]))
            return F.linear(x, projector.fc2.weight[:, :used], projector.fc2.bias)

    return project
