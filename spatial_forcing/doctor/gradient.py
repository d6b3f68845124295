"""The gradient path: what the alignment loss trains, and whether the actions depend on the aligned tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatial_forcing.alignment import Views
from spatial_forcing.doctor.blocks import Candidate, seeded
from spatial_forcing.errors import ConfigError
from spatial_forcing.forcing.layout import gather_tokens
from spatial_forcing.forcing.module import SpatialForcing
from spatial_forcing.forcing.tap import Tap, in_sequence


class StandIn:
    """A teacher of a given width that needs no weights: random projections of each patch's colours.

    It shows what the loss reaches and what projector and tap cost; nothing is to be learned from it.
    """

    name, licence, patch, depth, fingerprint = "stand-in", "Apache-2.0", 14, 1, "0" * 64
    resolution, projected = 14 * 16, False

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.weight = torch.randn(3, dim, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def features(self, views: Views, layers: Sequence[int] = (-1,)) -> tuple[Tensor, ...]:
        """(B, V, 16, 16, dim) for each layer."""
        pooled = F.adaptive_avg_pool2d(views.images.flatten(0, 1), self.resolution // self.patch)
        pooled = pooled.unflatten(0, views.images.shape[:2]).permute(0, 1, 3, 4, 2).float()
        present = views.present[:, :, None, None, None].float()
        return tuple((pooled - 0.5) @ self.weight * present for _ in layers)

    def to(self, device: torch.device | str) -> Self:
        """Move the weights."""
        self.weight = self.weight.to(device)
        return self


@dataclass(frozen=True)
class TapSeen:
    """What the tap read: shape (B, L, D), and how often its place was called."""

    layer: int
    shape: tuple[int, int, int]
    calls: int


def see_tap(student: Any, batch: Mapping[str, Any], layer: int, length: int) -> TapSeen:
    """Run the student once with the tap after `layer` blocks.

    Raises:
        ConfigError: it never fires, or the sequence there is another than at the first block.
    """
    blocks, calls = list(student.blocks), [0]
    tap = Tap(blocks, [layer], student.final_norm)

    def count(*_: Any) -> None:
        calls[0] += 1

    handle = (blocks[layer] if layer < len(blocks) else blocks[-1]).register_forward_pre_hook(count)
    try:
        with tap.armed() as states, torch.no_grad(), seeded():
            student(batch)
    finally:
        tap.detach()
        handle.remove()
    shape = in_sequence(states[layer], student.alignment(batch).sequence, layer).shape
    if shape[1] != length:
        raise ConfigError(
            f"the sequence has {length} tokens at the first decoder block, but {shape[1]} after {layer} "
            "blocks: tokens are dropped, merged or added on the way, so positions do not hold there. Tap an "
            "earlier layer (--layer)."
        )
    return TapSeen(layer, (shape[0], shape[1], shape[2]), calls[0])


@dataclass(frozen=True)
class GradientPath:
    """What the two losses reach.

    Attributes:
        reached: trainable parameters that the alignment loss reaches, by where they are.
        frozen: parameters of the blocks below the tap that are frozen.
        action: norm of the action loss' gradient at the aligned tokens.
        align_loss: value of the alignment loss.
    """

    reached: dict[str, int]
    frozen: int
    action: float
    align_loss: float


def follow(forcing: SpatialForcing, batch: Mapping[str, Any], blocks: Candidate) -> GradientPath:
    """Follow both losses back from the tap.

    Raises:
        ConfigError: nothing below the tap is trainable, or the alignment loss reaches none of it, or the
            action loss does not depend on the aligned tokens (after the last block it need not).
    """
    student: Any = forcing.student
    layer = forcing.pairs[0].blocks
    with seeded():
        _, align_loss, _ = forcing.losses(batch)
    named = {n: p for n, p in student.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(align_loss, list(named.values()), allow_unused=True)
    places = {
        id(p): f"in blocks 0..{layer - 1}" for block in blocks.blocks[:layer] for p in block.parameters()
    }
    reached: dict[str, int] = {}
    for parameter, gradient in zip(named.values(), gradients, strict=True):
        if gradient is not None and bool(gradient.any()):
            place = places.get(id(parameter), "before the blocks")
            reached[place] = reached.get(place, 0) + parameter.numel()
    if not reached:
        raise ConfigError(
            "the alignment loss reaches no trainable parameter of the model, although some are trainable: "
            f"the graph is cut below the tap after {layer} blocks (detach, no_grad). Remove that, or tap "
            "after it."
        )
    action = _action_gradient(forcing, batch, layer)
    if action == 0 and layer < len(blocks.blocks):
        raise ConfigError(
            f"the action loss does not depend on the aligned tokens after {layer} blocks: nothing that "
            "happens there can help the actions. The action head reads an earlier layer, or its gradient is "
            "detached; tap where it reads (--layer), or below."
        )
    below = [p for block in blocks.blocks[:layer] for p in block.parameters()]
    return GradientPath(
        reached,
        sum(p.numel() for p in below if not p.requires_grad),
        action,
        float(align_loss.detach()),
    )


def _action_gradient(forcing: SpatialForcing, batch: Mapping[str, Any], layer: int) -> float:
    """Norm of the action loss' gradient at the aligned tokens of the state after `layer` blocks."""
    student: Any = forcing.student
    tap = Tap(list(student.blocks), [layer], student.final_norm)
    try:
        with tap.armed() as states, seeded():
            loss, _ = student(batch)
    finally:
        tap.detach()
    calls, alignment = states[layer], student.alignment(batch)
    if not loss.requires_grad or not all(call.requires_grad for call in calls):
        return 0.0
    gradients = torch.autograd.grad(loss, calls, materialize_grads=True)
    return float(gather_tokens(in_sequence(gradients, alignment.sequence, layer), alignment.layout).norm())


def frozen_parts(model: nn.Module) -> list[str]:
    """The top parts of the model that are frozen entirely."""
    frozen: list[str] = []
    for path, module in model.named_modules():
        parameters = list(module.parameters())
        inside = any(path.startswith(f"{part}.") for part in frozen)
        if path and parameters and not inside and not any(p.requires_grad for p in parameters):
            frozen.append(path)
    return frozen
