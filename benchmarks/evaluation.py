"""Evaluation throughput against the simulator speed of its workers.

python -m benchmarks.evaluation --workers 2 --repeats 3
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import tyro

from benchmarks.common import show
from spatial_forcing.envs import make_env
from spatial_forcing.envs.base import EVALUATION_SEEDS
from spatial_forcing.evaluation import evaluate
from spatial_forcing.evaluation.workers import WorkerPool
from spatial_forcing.protocols import Observation
from spatial_forcing.students import NanoConfig, NanoVLA

CHUNK, ACTIONS = 8, 4


class Still:
    """A policy that costs nothing; workers still render what it would have seen."""

    def act(self, observations: Sequence[Observation], generator: Any = None) -> torch.Tensor:
        """Zeros, (B, chunk, action_dim)."""
        return torch.zeros(len(observations), CHUNK, ACTIONS)


def main(
    tasks: tuple[str, ...] = ("reach-v3", "drawer-open-v3"),
    episodes: int = 12,
    workers: int = 2,
    image_size: int = 96,
    repeats: int = 3,
) -> None:
    """Alternate the nano policy with one that costs nothing, over the same episodes and workers.

    Args:
        tasks: Meta-World tasks.
        episodes: of each task.
        workers: simulator processes.
        image_size: pixels on a side; two cameras.
        repeats: alternations after one warm-up.
    """
    torch.manual_seed(0)
    policy = NanoVLA(NanoConfig(("corner2", "gripperPOV"), image_size=image_size, chunk=CHUNK, max_text=12))
    ratios = []
    with WorkerPool(workers, make_env, {"image_size": image_size}) as pool:
        for repeat in range(repeats + 1):
            speed = {}
            for name, each in (("nothing", Still()), ("nano", policy)):
                started = time.perf_counter()
                result = evaluate(
                    each,
                    tasks,
                    episodes=episodes,
                    seed=EVALUATION_SEEDS[0],
                    workers=pool,
                    progress=False,
                )
                speed[name] = result.steps_run / (time.perf_counter() - started)
            if repeat:
                ratios.append(speed["nano"] / speed["nothing"])
    show("steps/s with the nano policy over steps/s of the simulators alone", ratios, "aim 0.8 or more")


if __name__ == "__main__":
    tyro.cli(main)
