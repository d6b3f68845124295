"""SpatialForcing on several processes: what a sample counts in the global mean, and shards of FSDP.

    shard(forcing)                                  # before the optimizer is made
    optimizer = AdamW(forcing.parameters())
    loss, metrics = forcing(batch)                  # as without it

The teacher is no module of `forcing`, so every process holds all of it and no shard knows of it. The loss
needs nothing else: FSDP shards parameters, not activations, so the tap reads whole states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spatial_forcing.errors import ConfigError, LayoutError
from spatial_forcing.forcing.loss import sum_over_ranks, world_size

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor import DTensor

    from spatial_forcing.forcing.module import SpatialForcing


MAX_EMPTY_STEPS = 100
"""Consecutive training steps without any valid token after which training stops."""


def shard(
    forcing: SpatialForcing, mp_policy: MixedPrecisionPolicy | None = None, **options: Any
) -> SpatialForcing:
    """Shard student and projector over all processes with FSDP2, in place.

    Each decoder block is a unit, the rest of the student is one, and the projector is in the outermost one,
    which has no mixed precision: the projector computes in float32, and the teacher's images are not cast.

    Args:
        forcing: on its device already; attach LoRA and compile blocks before.
        mp_policy: mixed precision of the student; default none.
        options: of `fully_shard` for every unit: `mesh`, `reshard_after_forward`, `offload_policy`.

    Returns:
        `forcing`, whose parameters are `DTensor`s now; make the optimizer from them. Whole weights:
        `torch.distributed.checkpoint.state_dict.get_model_state_dict(forcing.export(), options=...)` and
        `forcing.projector_state_dict()`, both called on every process.

    Raises:
        ConfigError: there is no process group, or `forcing` is sharded already.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError("shard needs a process group; start with torchrun and call init_process_group.")
    if is_sharded(forcing):
        raise ConfigError("this SpatialForcing is sharded already; call shard once, on the plain module.")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = mp_policy or MixedPrecisionPolicy()
    for block in forcing._alignable.blocks:
        fully_shard(block, mp_policy=policy, **options)
    fully_shard(forcing.student, mp_policy=policy, **options)
    fully_shard(forcing, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **options)
    return forcing


class SampleWeights:
    """The weight of a sample's loss that makes means over ranks and micro-batches the mean over samples.

    Each optimizer step is one window of micro-batches; without `begin` every batch is a window of its own.
    """

    def __init__(self) -> None:
        self._total = self._divisor = self._left = self._empty_steps = 0

    def begin(self, samples: Tensor, batches: int, divisor: int) -> None:
        """Open a window.

        Args:
            samples: of this rank's micro-batches together, those with a valid token.
            batches: number of micro-batches.
            divisor: what the loop divides each loss by.

        Raises:
            LayoutError: no rank had a valid token for `MAX_EMPTY_STEPS` steps.
        """
        self._total, self._divisor, self._left = int(sum_over_ranks(samples)), divisor, batches
        self._count_empty(self._total)

    def next(self, samples: int, device: torch.device) -> float:
        """The weight in the next micro-batch, which has so many samples with a valid token.

        Raises:
            LayoutError: see `begin`.
        """
        if self._left:
            self._left -= 1
            total, divisor = self._total, self._divisor
        else:
            total, divisor = int(sum_over_ranks(torch.tensor(samples, device=device))), 1
            self._count_empty(total)
        return world_size() * divisor / max(total, 1)

    def _count_empty(self, samples: int) -> None:
        self._empty_steps = 0 if samples else self._empty_steps + 1
        if self._empty_steps >= MAX_EMPTY_STEPS:
            raise LayoutError(
                f"no sample had a valid visual token for {MAX_EMPTY_STEPS} consecutive steps, so nothing is "
                "aligned. Check Views.present, padding masks, the augmentation's geometry and the layout's "
                "valid."
            )


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP (1 or 2) holds this module or a part of it."""
    if not dist.is_available():  # torch built without it: the imports below do not exist
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(part, FSDPModule | FullyShardedDataParallel) for part in module.modules())


def gather(tensor: Tensor) -> Tensor:
    """The full tensor of a shard, on every process; all must call it. Anything else as it is."""
    return tensor.full_tensor() if _is_shard(tensor) else tensor


def shard_like(tensor: Tensor, own: Tensor) -> Tensor:
    """`tensor` laid out as `own` is: its shard where `own` is a `DTensor`."""
    if not _is_shard(own):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements)


def _is_shard(tensor: Tensor) -> TypeGuard[DTensor]:
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
