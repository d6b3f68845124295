"""An environment of two cameras in the sizes of the builders' policies; needs no simulator."""

from __future__ import annotations

import numpy as np

from plugin.tests.builders import ACTION, CAMERAS, STATE


class Stage:
    """Success: half of the episodes, whatever one does. Every action must have the policy's size."""

    cameras, horizon = CAMERAS, 4

    def __init__(self, task: str) -> None:
        self.task = task

    def _observe(self):
        images = {c: np.full((40, 40, 3), self.seed % 200, np.uint8) for c in self.cameras}
        return {"images": images, "state": np.zeros(STATE, np.float32), "task": self.task}

    def reset(self, *, seed=None, options=None):
        self.seed, self.steps = seed, 0
        return self._observe(), {}

    def step(self, action):
        assert action.shape == (ACTION,)
        self.steps += 1
        success = self.seed % 2 == 0 and self.steps >= 2
        return self._observe(), 0.0, success, self.steps >= self.horizon, {"success": success}

    def close(self):
        pass
