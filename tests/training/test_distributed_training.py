"""Two processes under torchrun learn what one process learns from the same samples."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training import fake_run
from tests.training.fake_run import FakeBatches, curve, run, weights

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_equal_one(tmp_path, accumulation):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        fake_run.__file__, str(tmp_path / "two"), "0.5", str(accumulation),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
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
