"""The optimizers of the nano teacher's pretraining."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from spatial_forcing.errors import ConfigError

MUON_WEIGHT_DECAY = 0.01


def make_optimizers(
    model: nn.Module, learning_rate: float, muon_learning_rate: float, weight_decay: float
) -> list[Optimizer]:
    """Muon for the matrices inside the transformer blocks, AdamW for everything else.

    Muon (Jordan et al., 2024) orthogonalises each update; for a fixed number of steps it went further here
    than AdamW. Heads, embedders, norms and tokens keep AdamW, as its authors advise.

    Args:
        model: a VGGT or a Depth Anything 3; what is frozen is left out.
        learning_rate: of AdamW, at the peak. Each group keeps its peak as `group["peak"]`.
        muon_learning_rate: of Muon, at the peak; 0 leaves every parameter to AdamW.
        weight_decay: of AdamW; biases, norms, gains and tokens are not decayed.

    Raises:
        ConfigError: this torch has no Muon.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in trained if muon_learning_rate and p.ndim == 2 and _in_block(name)]
    chosen = {id(p) for p in hidden}
    rest = [p for _, p in trained if id(p) not in chosen]
    optimizers: list[Optimizer] = [
        torch.optim.AdamW(_groups(rest, weight_decay), learning_rate, betas=(0.9, 0.98))
    ]
    if hidden:
        if not hasattr(torch.optim, "Muon"):
            raise ConfigError(
                f"torch {torch.__version__} has no Muon; install torch 2.9 or newer, "
                "or set muon_learning_rate to 0."
            )
        optimizers.append(torch.optim.Muon(hidden, muon_learning_rate, MUON_WEIGHT_DECAY))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def _in_block(name: str) -> bool:
    return any(part.endswith("blocks") or part == "trunk" for part in name.split(".")[:-1])


def _groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in parameters if p.ndim in (2, 4) and min(p.shape[:2]) > 1]
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in chosen]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
