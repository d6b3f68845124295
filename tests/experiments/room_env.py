"""An environment of two cameras that needs no simulator; half of its episodes succeed whatever one does."""

from __future__ import annotations

import numpy as np


class RoomEnv:
    def __init__(self, task, cameras=("front", "wrist"), image_size=24, horizon=4):
        self.task, self.cameras, self.size, self.horizon = task, tuple(cameras), image_size, horizon

    def _observe(self):
        images = {c: np.full((self.size, self.size, 3), self.seed % 200, np.uint8) for c in self.cameras}
        return {"images": images, "state": np.zeros(4, np.float32), "task": "measure the room"}

    def reset(self, *, seed=None, options=None):
        self.seed, self.steps = seed, 0
        return self._observe(), {}

    def step(self, action):
        assert action.shape == (3,)
        self.steps += 1
        success = self.seed % 2 == 0 and self.steps >= 2
        return self._observe(), 0.0, success, self.steps >= self.horizon, {"success": success}

    def close(self):
        pass


def make_room(task, **kwargs):
    return RoomEnv(task, **kwargs)
