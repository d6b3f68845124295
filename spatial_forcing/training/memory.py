"""How much memory a run will take, estimated before it starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from spatial_forcing.students.base import StudentModule

GB = 1e9
OPTIMIZER_COPIES = 2
"""AdamW's moments, in the parameter's own type."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, by what they are for.

    `activations` is None where the student does not say (`activation_bytes`).
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int | None

    @property
    def total(self) -> int:
        """The sum of the known parts."""
        return self.weights + self.gradients + self.optimizer + (self.activations or 0)

    def __str__(self) -> str:
        known = "activations unknown" if self.activations is None else f"activations {_gb(self.activations)}"
        return (
            f"memory estimate, per process: weights {_gb(self.weights)}, gradients {_gb(self.gradients)}, "
            f"optimizer {_gb(self.optimizer)}, {known}; together {_gb(self.total)}, without a live teacher"
        )


def estimate_memory(
    student: nn.Module, samples: int, projector: nn.Module | None = None, shards: int = 1
) -> MemoryEstimate:
    """Estimate the memory of one forward and backward of `samples` samples in one process.

    `shards` is the number of processes that share weights, gradients and moments. Left out are a block's
    whole weights, which each of them gathers for a moment, and the projector's own activations: a few
    tensors of one layer's visual tokens.
    """
    modules = [student] if projector is None else [student, projector]
    weights = sum(_bytes(t) for module in modules for t in (*module.parameters(), *module.buffers()))
    trained = sum(_bytes(p) for module in modules for p in module.parameters() if p.requires_grad)
    activations = student.activation_bytes(samples) if isinstance(student, StudentModule) else None
    weights, trained = weights // shards, trained // shards
    return MemoryEstimate(weights, trained, OPTIMIZER_COPIES * trained, activations)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _gb(count: int) -> str:
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{count / 1e6:.1f} MB"
