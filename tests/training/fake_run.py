"""A run with the fake student and teacher: what every test of the loop trains. Also a torchrun program:

torchrun --nproc-per-node 2 tests/training/fake_run.py OUTPUT ALPHA ACCUMULATION [shard] [interrupt]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from spatial_forcing.forcing import ForcingConfig
from spatial_forcing.students import NanoConfig
from spatial_forcing.training import OptimConfig, Parts, TrainConfig, read_metrics, train
from tests.fakes import CAMERAS, FakeStudent, FakeTeacher, fake_batch

BATCH = 4


class FakeBatches:
    """Micro-batch i is `fake_batch(seed=i)`, shared among ranks as the real loader shares it."""

    def __init__(self, size=BATCH, rank=0, world_size=1, edit=None):
        self.size, self.rank, self.world_size, self.edit = size, rank, world_size, edit
        self.asked = []

    def batch(self, step):
        self.asked.append(step)
        batch = fake_batch(self.size, seed=step)
        if self.edit is not None:
            self.edit(step, batch)
        share = self.size // self.world_size
        part = slice(self.rank * share, (self.rank + 1) * share)
        return {key: value[part] for key, value in batch.items()}

    def iterate(self, start, stop):
        return (self.batch(step) for step in range(start, stop))


class NoisyStudent(FakeStudent):
    """Draws noise in every forward, so that its losses depend on the random stream."""

    def predict(self, images, state):
        return super().predict(images, state + 0.1 * torch.randn_like(state))


# Gradients of an L1 loss can cancel to rounding errors, which Adam would scale up to full steps.
STEADY = OptimConfig(eps=1e-4)


def make_config(output, alpha=0.5, **settings):
    defaults = {"steps": 6, "batch_size": BATCH, "save_every": 2, "log_every": 1, "trackers": ()}
    return TrainConfig(
        dataset=Path("unused"),
        output=Path(output),
        student=NanoConfig(cameras=CAMERAS),
        forcing=ForcingConfig(alpha=alpha),
        teacher="fake",
        progress=False,
        cpu=True,
        **{**defaults, **settings},
    )


def make_parts(student=FakeStudent, batches=None, seed=0):
    torch.manual_seed(seed)
    return Parts(student(), FakeTeacher(), batches or FakeBatches())


def run(output, alpha=0.5, student=FakeStudent, batches=None, on_checkpoint=None, **settings):
    parts = make_parts(student, batches)
    return train(make_config(output, alpha, **settings), parts=parts, on_checkpoint=on_checkpoint)


def curve(folder):
    """The logged lines without what depends on the clock."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(Path(folder))]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


if __name__ == "__main__":
    from accelerate import PartialState

    process = PartialState(cpu=True)
    output, alpha, accumulation = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    shared = FakeBatches(8 // accumulation, process.process_index, process.num_processes)
    settings = {"batch_size": 8, "gradient_accumulation": accumulation, "steps": 4, "optim": STEADY}

    def broken_off(saved):
        if "interrupt" in sys.argv and saved.step == 2:
            raise KeyboardInterrupt

    run(output, alpha, batches=shared, on_checkpoint=broken_off, shard="shard" in sys.argv, **settings)
    if "shard" in sys.argv:  # gloo's threads were seen to abort while the interpreter was taken down
        os._exit(0)
    process.destroy_process_group()
