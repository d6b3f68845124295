"""What the alignment costs in training: parameters, optimizer state, activations and arithmetic.

The teacher is not counted: it runs once for all epochs with a cache, and its own model card tells its size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from spatial_forcing.doctor.blocks import seeded
from spatial_forcing.forcing.module import SpatialForcing

OPTIMIZER_COPIES = 2
"""AdamW's moments."""


@dataclass(frozen=True)
class Cost:
    """Bare model and what the alignment adds to one training step of the batch.

    Attributes:
        parameters, projector: counts; the projector trains in float32.
        weights, projector_weights: bytes of weights, gradients of the trainable ones and AdamW's two moments.
        activations, projector_activations: bytes kept for backward, as measured in one forward.
        flops, projector_flops: multiply-adds x 2 of one forward, as counted by PyTorch.
        tokens: aligned tokens of the batch.
    """

    parameters: int
    projector: int
    weights: int
    projector_weights: int
    activations: int
    projector_activations: int
    flops: int
    projector_flops: int
    tokens: int

    def lines(self) -> list[str]:
        """The figures as lines of text."""
        return [
            f"parameters {_number(self.parameters)} + projector {_number(self.projector)}",
            f"weights, gradients and AdamW state {_bytes(self.weights)} + {_bytes(self.projector_weights)}",
            f"kept for backward, this batch {_bytes(self.activations)} + "
            f"{_bytes(self.projector_activations)}",
            f"forward {_number(self.flops)} FLOPs + {_number(self.projector_flops)} for {self.tokens} tokens "
            f"({self.projector_flops / max(self.flops, 1):.1%})",
            "deployed: nothing (export() returns the model as it is)",
        ]

    def to_plain(self) -> dict[str, int]:
        """The figures as a mapping for JSON."""
        return asdict(self)


def measure(forcing: SpatialForcing, batch: Mapping[str, Any]) -> Cost:
    """Measure on one batch; trains nothing."""
    student, projector = forcing.student, forcing.projector
    assert projector is not None
    bare = kept_bytes(forcing, lambda: student(batch)[0])
    both = kept_bytes(forcing, lambda: forcing(batch)[0])
    # Under no_grad the counter fails on views of parameters (queries that are expanded to the batch).
    with FlopCounterMode(display=False) as counter, seeded():
        student(batch)
    tokens = int(forcing.aligned_tokens(batch).sum())
    # One pair of layers, so every linear layer of the projector sees each token once.
    linear = [part for part in projector.modules() if isinstance(part, nn.Linear)]
    flops = 2 * tokens * sum(layer.weight.numel() for layer in linear)
    own = sum(p.numel() for p in projector.parameters())
    return Cost(
        parameters=sum(p.numel() for p in student.parameters()),
        projector=own,
        weights=sum(_training_bytes(p) for p in student.parameters()),
        projector_weights=sum(_training_bytes(p) for p in projector.parameters()),
        activations=bare,
        projector_activations=max(both - bare, 0),
        flops=counter.get_total_flops(),
        projector_flops=flops,
        tokens=tokens,
    )


def _training_bytes(parameter: Tensor) -> int:
    copies = 1 + (1 + OPTIMIZER_COPIES) * parameter.requires_grad
    return parameter.numel() * parameter.element_size() * copies


def kept_bytes(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward keeps for backward, each storage once, the module's weights left out."""
    weights = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}
    holding: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            holding.append(tensor)
        return tensor

    with seeded(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def _number(count: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f}"


def _bytes(count: int) -> str:
    return f"{_number(count)}B"
