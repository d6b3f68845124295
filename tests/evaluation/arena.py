"""A one-dimensional world that needs no simulator: reach `goal`, seen only in the image's brightness."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from spatial_forcing.errors import ConfigError
from spatial_forcing.protocols import Observation


class LazyImages(dict):
    """Renders on read and counts how often."""

    def __init__(self, pixel: int, size: int) -> None:
        super().__init__({"front": pixel, "wrist": 255 - pixel})
        self.size = size

    def __getitem__(self, camera):
        return np.full((self.size, self.size, 3), super().__getitem__(camera), np.uint8)

    def items(self):
        return [(camera, self[camera]) for camera in self]

    def values(self):
        return [self[camera] for camera in self]


class ArenaEnv:
    """`easy` accepts 0.2 around the goal, others 0.01; `kill-*`, `raise` break on seed 1, `broken` always;
    `idle` dies a moment after its episode has begun, while nothing is asked of it.
    """

    cameras = ("front", "wrist")
    horizon = 20

    def __init__(self, task: str, size: int = 8, marker: str = "") -> None:
        if task == "refused":
            raise ConfigError("unknown task 'refused'. Known: easy, hard.")
        self.task, self.size, self.marker = task, size, marker

    def observe(self) -> Observation:
        state = np.array([self.position], np.float32)
        return {"images": LazyImages(round(self.goal * 255), self.size), "state": state, "task": self.task}

    def reset(self, *, seed=None, options=None):
        if seed == 1 and self.task.startswith("kill"):
            marker = Path(self.marker)
            if self.task == "kill-always" or not marker.exists():
                marker.touch()
                os._exit(7)
        if self.task == "broken" or (seed == 1 and self.task == "raise"):
            raise RuntimeError("the renderer is gone")
        if self.task == "idle":
            threading.Timer(0.3, os._exit, (9,)).start()
        self.goal, self.position, self.steps = float(np.random.default_rng(seed).random()), 0.0, 0
        return self.observe(), {}

    def step(self, action):
        assert action.dtype == np.float32
        assert action.shape == (1,)
        self.steps += 1
        self.position += float(action[0])
        close = abs(self.position - self.goal)
        success = close < (0.2 if self.task == "easy" else 0.01)
        return self.observe(), -close, success, self.steps >= self.horizon, {"success": success}

    def close(self) -> None:
        pass


def make_arena(task: str, **kwargs) -> ArenaEnv:
    return ArenaEnv(task, **kwargs)


class SeekingPolicy:
    """Walks towards the brightness it sees with per-row noise; remembers the sizes of its batches."""

    def __init__(self, noise: float = 0.05, chunk: int = 4, bias: float = 0.0) -> None:
        self.noise, self.chunk, self.bias, self.batches = noise, chunk, bias, []

    def act(
        self,
        observations: Sequence[Observation],
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> torch.Tensor:
        assert isinstance(generator, list)
        self.batches.append(len(observations))
        rows = []
        for observation, source in zip(observations, generator, strict=True):
            goal = float(observation["images"]["front"].mean()) / 255
            step = (goal + self.bias - float(observation["state"][0])) / (2 * self.chunk)
            rows.append(step + self.noise * torch.randn(self.chunk, 1, generator=source))
        return torch.stack(rows)
