"""What several processes share: sums over ranks, the weight of a sample in the mean, gathered shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spatial_forcing.errors import LayoutError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


MAX_EMPTY_STEPS = 100
"""Consecutive training steps without any valid token after which training stops."""


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` over all processes; every process must call it."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


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
