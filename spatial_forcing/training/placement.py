"""Where a run's parameters lie: whole in every process, or in shards over all of them (FSDP2).

Either way a checkpoint holds whole weights, written by one process, and the loop sees no difference.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spatial_forcing.forcing import SpatialForcing
from spatial_forcing.forcing.sharding import shard


class Placement(Protocol):
    """What checkpoints need of student, projector and optimizer. Every process makes each call."""

    def policy(self) -> AbstractContextManager[Any]:
        """The student with whole weights, for `save_pretrained`; on the main process at least."""

    def optimizer_state(self, optimizer: Optimizer) -> Mapping[str, Any]:
        """The whole state, on the main process at least."""

    def load_optimizer(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Restore `optimizer_state`. Raises `KeyError` or `ValueError` when it does not fit."""


class Replicated:
    """Every process holds everything."""

    def __init__(self, forcing: SpatialForcing) -> None:
        self._forcing = forcing

    @contextmanager
    def policy(self) -> Iterator[Any]:
        """See `Placement`."""
        yield self._forcing.policy

    def optimizer_state(self, optimizer: Optimizer) -> Mapping[str, Any]:
        """See `Placement`."""
        return optimizer.state_dict()

    def load_optimizer(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """See `Placement`."""
        optimizer.load_state_dict(dict(state))


class Sharded:
    """Each process holds a part of the parameters, their gradients and moments.

    Args:
        forcing: with its weights, on its device; it is sharded in place.
        main: whether this process writes checkpoints.
    """

    def __init__(self, forcing: SpatialForcing, main: bool) -> None:
        self._forcing = forcing
        self._hull = hull(forcing.export()) if main else None
        shard(forcing)  # without FSDP's own mixed precision: autocast does the same as without shards

    @contextmanager
    def policy(self) -> Iterator[Any]:
        """See `Placement`; whole weights are in host memory for as long as this lasts."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        options = _whole(cpu_offload=True)
        state = cast(dict[str, Tensor], get_model_state_dict(self._forcing.policy, options=options))
        if self._hull is None:
            yield None
            return
        self._hull.load_state_dict({name: _own(value) for name, value in state.items()}, assign=True)
        try:
            yield self._hull
        finally:
            self._hull.to("meta")

    def optimizer_state(self, optimizer: Optimizer) -> Mapping[str, Any]:
        """See `Placement`."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return get_optimizer_state_dict(self._forcing, optimizer, options=_whole(cpu_offload=True))

    def load_optimizer(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """See `Placement`."""
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        set_optimizer_state_dict(self._forcing, optimizer, dict(state), options=_whole())


def _whole(cpu_offload: bool = False) -> Any:
    """Options for states as they are without shards. Imported late: most runs have no shards."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload)


def _own(tensor: Tensor) -> Tensor:
    """The tensor in a storage of its own size; safetensors refuses longer ones, which uneven shards leave."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def hull(student: nn.Module) -> nn.Module:
    """A copy of `student` without memory for its weights: they are on the meta device."""
    empty: dict[int, Any] = {}
    for tensor in (*student.parameters(), *student.buffers()):
        bare: Tensor = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        empty[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if is_parameter else bare
    return copy.deepcopy(student, empty)
