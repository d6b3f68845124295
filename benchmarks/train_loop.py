"""Overhead of the training loop over bare forward + backward + step, on the same real dataset.

python -m benchmarks.train_loop --dataset FOLDER [--cache FOLDER]
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import tyro

from benchmarks.common import show
from spatial_forcing.forcing import SpatialForcing
from spatial_forcing.training import TrainConfig, preset, train
from spatial_forcing.training.optim import make_optimizer
from spatial_forcing.training.parts import build_parts


def main(dataset: Path, cache: Path | None = None, steps: int = 40, repeats: int = 3) -> None:
    """Alternate the loop (reading, metrics, logging, clipping) with the bare step on a batch in memory.

    Args:
        dataset: LeRobot v3.0 dataset; its decoded store is built first.
        cache: teacher features; without it alpha is 0.
        steps: per measurement.
        repeats: alternations.
    """
    torch.set_num_threads(1)
    overheads = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            config = _config(dataset, cache, Path(folder) / "run", steps)
            bare = bare_seconds(config)
            started = train(config)
            overheads.append(100 * (started.seconds / steps / bare - 1))
    show(f"loop over bare step, %, {'cached SF' if cache else 'alpha 0'}", overheads, "aim below 5")


def bare_seconds(config: TrainConfig) -> float:
    """Seconds of forward + backward + optimizer step on one batch in memory."""
    parts = build_parts(config)
    forcing = SpatialForcing(parts.student, parts.teacher, config.forcing).train()
    optimizer = make_optimizer(forcing, config.optim)
    batch = parts.batches.batch(0)
    seconds = 0.0
    for step in range(-2, config.steps):
        started = time.perf_counter()
        loss, _ = forcing(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds += (time.perf_counter() - started) * (step >= 0)
    return seconds / config.steps


def _config(dataset: Path, cache: Path | None, output: Path, steps: int) -> TrainConfig:
    overrides = {"steps": steps, "save_every": steps, "optim.warmup_steps": 1, "progress": False}
    if cache is None:
        overrides["forcing.alpha"] = 0.0
    config = preset("nano-metaworld", dataset=dataset, output=output, overrides=overrides)
    return replace(config, cache=cache, teacher=config.teacher if cache else None)


if __name__ == "__main__":
    tyro.cli(main)
