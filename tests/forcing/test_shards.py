"""FSDP on two processes gives the loss and gradients of one process, and never touches the teacher."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, ShardingStrategy
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from spatial_forcing.errors import ConfigError
from spatial_forcing.forcing import ForcingConfig, SpatialForcing, gradient_audit
from spatial_forcing.forcing.distributed import gather, is_sharded
from spatial_forcing.forcing.sharding import shard
from tests.fakes import FakeBlock, FakeStudent, fake_batch
from tests.forcing.test_distributed import (
    RANKS,
    SCENARIOS,
    assert_as_in_one_process,
    build,
    outcome,
    rows,
    spawned,
    whole_batch,
)

FULL = StateDictOptions(full_state_dict=True)


class ModuleTeacher(nn.Module):
    """A teacher whose weights a parallel wrapper would find if it were a part of the tree."""

    name, licence, patch, fingerprint, resolution = "module", "Apache-2.0", 4, "0" * 64, 20
    dim, depth, projected = 8, 3, False

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(self.depth, 3, self.dim, generator=generator))
        self.requires_grad_(False)
        self.seen: set[torch.dtype] = set()

    @torch.no_grad()
    def features(self, views, layers=(-1,)):
        self.seen.add(views.images.dtype)
        pooled = nn.functional.adaptive_avg_pool2d(views.images.flatten(0, 1), 5)
        pooled = pooled.unflatten(0, views.images.shape[:2]).permute(0, 1, 3, 4, 2)
        keep = views.present[:, :, None, None, None].float()
        return tuple((pooled @ self.weight[k] + 0.3) * keep for k in layers)


def with_teacher(teacher, config=None, student=None):
    torch.manual_seed(0)
    return SpatialForcing(student or FakeStudent(), teacher, config or ForcingConfig())


def by_shard(forcing):
    return shard(forcing)


def by_fsdp1(forcing, strategy=ShardingStrategy.FULL_SHARD):
    return FSDP1(
        forcing,
        auto_wrap_policy=ModuleWrapPolicy({FakeBlock}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
        sharding_strategy=strategy,
    )


def measure(wrap, name, share):
    """Gradients, buffers and metrics of one rank, whole, under the names of the plain module."""
    settings, steps = SCENARIOS[name]
    forcing = build(settings)
    parallel = wrap(forcing)
    size = len(share["action"]) // steps
    batches = [rows(share, i * size, (i + 1) * size) for i in range(steps)]
    if steps > 1:
        forcing.begin_accumulation(batches)
    metrics = []
    for batch in batches:
        loss, measured = parallel(batch)
        (loss / steps).backward()
        metrics.append(measured)
    if isinstance(parallel, FSDP1):
        with FSDP1.summon_full_params(parallel, with_grads=True):
            found = outcome(forcing, metrics)
            found = {k: v.clone() if v is not None else None for k, v in found.items()}
        return {k.replace("_fsdp_wrapped_module.", ""): v for k, v in found.items()}
    return {k: v if v is None else gather(v) for k, v in outcome(forcing, metrics).items()}


def check_teacher(rank):
    """What the teacher, the tap, the optimizer and the state dict see beside a sharded student."""
    teacher = ModuleTeacher()
    before = teacher.weight.clone()
    forcing = with_teacher(teacher)
    plain_keys = list(forcing.state_dict())
    plain_projector = forcing.projector_state_dict()
    shard(forcing, MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    assert all(isinstance(p, DTensor) for p in forcing.parameters())
    assert isinstance(forcing.student.layers[0], FSDPModule)
    optimizer = torch.optim.AdamW(forcing.parameters(), lr=0.1)
    seen = []
    forcing.projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    forcing(rows(whole_batch(), 4 * rank, 4 * rank + 4))[0].backward()
    (state,) = seen
    assert type(state) is torch.Tensor
    assert state.shape[::2] == (4, 16)
    assert state.dtype == torch.bfloat16
    assert teacher.seen == {torch.float32}
    assert all(type(p.grad) is DTensor and p.grad.dtype == torch.float32 for p in forcing.parameters())
    optimizer.step()
    assert type(teacher.weight) is nn.Parameter
    assert teacher.weight.grad is None
    assert torch.equal(teacher.weight, before)
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(teacher.weight) not in owned
    assert list(forcing.state_dict()) == plain_keys
    trained = forcing.projector_state_dict()
    assert {k: v.shape for k, v in trained.items()} == {k: v.shape for k, v in plain_projector.items()}
    assert not torch.equal(trained["projector.fc1.weight"], plain_projector["projector.fc1.weight"])
    forcing.load_projector_state_dict(plain_projector)
    for key, value in forcing.projector_state_dict().items():
        assert torch.equal(value, plain_projector[key]), key
    with pytest.raises(ConfigError, match="FSDP"):
        gradient_audit(forcing, rows(whole_batch(), 0, 4))
    with pytest.raises(ConfigError, match="already"):
        shard(forcing)


def train_and_export(rank):
    """Three steps, then the policy, whole."""
    forcing = shard(with_teacher(ModuleTeacher()))
    optimizer = torch.optim.SGD(forcing.parameters(), lr=0.1)
    for _ in range(3):
        forcing(rows(whole_batch(), 4 * rank, 4 * rank + 4))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return get_model_state_dict(forcing.export(), options=FULL)


def frozen_blocks(wrap, rank):
    """Only what lies before the blocks is trainable: the check must know gathered parameters."""
    forcing = with_teacher(ModuleTeacher())
    forcing.student.layers.requires_grad_(False)
    wrap(forcing)(rows(whole_batch(), 4 * rank, 4 * rank + 4))[0].backward()


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    results = {}
    share = rows(whole_batch(), 4 * rank, 4 * rank + 4)
    wraps = {
        "shard": by_shard,
        "fsdp1": by_fsdp1,
        "fsdp1_grad_op": lambda forcing: by_fsdp1(forcing, ShardingStrategy.SHARD_GRAD_OP),
    }
    for kind, wrap in wraps.items():
        for name in SCENARIOS:
            results[kind, name] = measure(wrap, name, share)
        frozen_blocks(wrap, rank)
    check_teacher(rank)
    results["policy"] = train_and_export(rank)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return spawned(worker, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("kind", ["shard", "fsdp1", "fsdp1_grad_op"])
def test_equals_one_process(ranks, kind, name):
    assert_as_in_one_process([results[kind, name] for results in ranks], name)


def test_trained_policy_equals_one_process(ranks):
    forcing = with_teacher(ModuleTeacher())
    optimizer = torch.optim.SGD(forcing.parameters(), lr=0.1)
    for _ in range(3):
        forcing(whole_batch())[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = forcing.export().state_dict()
    assert list(ranks[0]["policy"]) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(ranks[0]["policy"][key], value, atol=1e-5, rtol=0, msg=key)


def test_shard_needs_processes():
    forcing = with_teacher(ModuleTeacher())
    with pytest.raises(ConfigError, match="process group"):
        shard(forcing)
    assert not is_sharded(forcing)
    assert forcing(fake_batch(2))[0].isfinite()
