"""Two processes under torchrun learn what one process learns from the same samples."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spatial_forcing.errors import ConfigError
from spatial_forcing.students import NanoConfig, NanoVLA
from spatial_forcing.training.placement import hull
from tests.training import fake_run
from tests.training.fake_run import FakeBatches, curve, run, weights

ROOT = Path(__file__).parents[2]


def launched(*arguments):
    """Two processes; their exit status and what they said."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        fake_run.__file__, *map(str, arguments),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    return done.returncode, done.stderr[-3000:]


@pytest.mark.parametrize(("accumulation", "placement"), [(1, ()), (2, ()), (1, ("shard",)), (2, ("shard",))])
def test_two_processes_equal_one(tmp_path, accumulation, placement):
    status, said = launched(tmp_path / "two", 0.5, accumulation, *placement)
    assert status == 0, said
    settings = {"batch_size": 8, "gradient_accumulation": accumulation, "steps": 4, "optim": fake_run.STEADY}
    run(tmp_path / "one", batches=FakeBatches(8 // accumulation), **settings)
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(one) == len(two) == 4
    for name in ("loss", "action_loss", "align_loss", "cosine", "grad_norm"):
        assert [row[name] for row in one] == pytest.approx([row[name] for row in two], abs=1e-5)
    trained = weights(tmp_path / "two/policy")
    for key, value in weights(tmp_path / "one/policy").items():
        torch.testing.assert_close(trained[key], value, atol=1e-5, rtol=0)
    last = tmp_path / "two/checkpoints/step-000000004"
    assert (last / "rng-0.pt").exists()
    assert (last / "rng-1.pt").exists()


def test_a_sharded_run_resumes_exactly(tmp_path):
    assert launched(tmp_path / "whole", 0.5, 1, "shard")[0] == 0
    assert launched(tmp_path / "broken", 0.5, 1, "shard", "interrupt")[0] != 0
    assert not (tmp_path / "broken/result.json").exists()
    status, said = launched(tmp_path / "broken", 0.5, 1, "shard")
    assert status == 0, said
    assert curve(tmp_path / "broken") == curve(tmp_path / "whole")
    for file in ("policy/model.safetensors", "checkpoints/step-000000004/projector.safetensors"):
        resumed, straight = load_file(tmp_path / "broken" / file), load_file(tmp_path / "whole" / file)
        assert resumed.keys() == straight.keys()
        assert all(torch.equal(resumed[key], straight[key]) for key in straight)


def test_one_process_has_nothing_to_shard(tmp_path):
    with pytest.raises(ConfigError, match=r"shard .*torchrun"):
        run(tmp_path, shard=True)
    with pytest.raises(ConfigError, match="audit_every is 2; expected none with shard"):
        run(tmp_path, shard=True, audit_every=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hull_has_the_structure_and_no_memory(tmp_path, dtype):
    nano = NanoVLA(NanoConfig(cameras=("front",), width=16, depth=1, heads=2)).to(dtype)
    nano.norm.requires_grad_(False)
    empty = hull(nano)
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    assert [p.requires_grad for p in empty.parameters()] == [p.requires_grad for p in nano.parameters()]
    empty.load_state_dict(nano.state_dict(), assign=True)
    empty.save_pretrained(tmp_path)
    assert all(torch.equal(value, nano.state_dict()[key]) for key, value in weights(tmp_path).items())
    assert next(nano.parameters()).device.type == "cpu"
