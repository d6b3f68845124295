"""SpatialForcing under FSDP2.

    shard(forcing)                                  # before the optimizer is made
    optimizer = AdamW(forcing.parameters())
    loss, metrics = forcing(batch)                  # as without it

The teacher is not a module of `forcing`, so every process holds all of it and no shard knows of it. The loss
needs nothing else: FSDP shards parameters, not activations, so the tap reads whole states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from spatial_forcing.errors import ConfigError
from spatial_forcing.forcing.distributed import is_sharded
from spatial_forcing.forcing.module import SpatialForcing

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy


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
        `torch.distributed.checkpoint.state_dict.get_model_state_dict(forcing.policy, options=...)` and
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
    for block in forcing.blocks:
        fully_shard(block, mp_policy=policy, **options)
    fully_shard(forcing.student, mp_policy=policy, **options)
    fully_shard(forcing, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **options)
    return forcing
