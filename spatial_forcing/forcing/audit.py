"""The gradient audit: do action loss and alignment loss pull the student the same way, block by block?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_forcing.errors import ConfigError
from spatial_forcing.forcing.distributed import is_sharded
from spatial_forcing.forcing.module import SpatialForcing
from spatial_forcing.protocols import Batch

Gradients = Sequence[tuple[Tensor, Tensor]]


@torch.compiler.disable
def gradient_audit(forcing: SpatialForcing, batch: Batch) -> dict[str, float]:
    """Compare the gradients of the two losses (alpha not included) on `batch`.

    Returns, over the student's parameters that both losses reach, their `cosine`, norms (`action_norm`,
    `align_norm`) and the norms' `ratio`, and for each such place (`block0`, ..., and `input` for what lies
    before the blocks) `cosine/PLACE` and `ratio/PLACE`: the norm of the alignment's gradient over that of the
    action's.

    Two backward passes in eval mode; no `.grad` and no random stream changes. Not for models under reentrant
    checkpointing, which has no gradients of this kind.

    Raises:
        ConfigError: the alignment is off (alpha is 0 throughout), or FSDP holds the parameters.
    """
    if is_sharded(forcing):
        raise ConfigError(
            "gradient_audit needs whole gradients, but FSDP shards this module; audit a checkpoint in one "
            "process (`spatial-forcing analyse`)."
        )
    if not forcing.active:
        raise ConfigError("gradient_audit needs the alignment loss, but alpha is 0 throughout this run.")
    modes = [(module, module.training) for module in forcing.modules()]
    forcing.eval()
    try:
        with torch.random.fork_rng():
            loss, align_loss, _ = forcing.losses(batch)
    finally:
        for module, training in modes:
            module.training = training
    places_of = {id(p): f"block{k}" for k, block in enumerate(forcing.blocks) for p in block.parameters()}
    parameters = [p for p in forcing.student.parameters() if p.requires_grad]
    action = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    align = torch.autograd.grad(align_loss, parameters, allow_unused=True)
    places: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for parameter, a, b in zip(parameters, action, align, strict=True):
        if a is not None and b is not None:
            places.setdefault(places_of.get(id(parameter), "input"), []).append((a.flatten(), b.flatten()))
    both = [pair for pairs in places.values() for pair in pairs]
    cosine, action_norm, align_norm = _compare(both)
    audit = {"cosine": cosine, "action_norm": action_norm, "align_norm": align_norm}
    audit["ratio"] = align_norm / max(action_norm, 1e-30)
    for place, pairs in sorted(places.items()):
        cosine, action_norm, align_norm = _compare(pairs)
        audit |= {f"cosine/{place}": cosine, f"ratio/{place}": align_norm / max(action_norm, 1e-30)}
    return audit


def _compare(pairs: Gradients) -> tuple[float, float, float]:
    """Cosine and both norms, in double precision."""
    a, b = (torch.cat([pair[i] for pair in pairs]).double() for i in (0, 1))
    return float(F.cosine_similarity(a, b, dim=0)), float(a.norm()), float(b.norm())
