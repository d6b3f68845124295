"""A benchmark of vla-eval that needs no download: reach a point in four steps."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.specs import IMAGE_RGB, LANGUAGE, RAW


class Room(StepBenchmark):
    """Observations are drawn from the episode's number; the result says what the policy did.

    Success: the sum of the first action's numbers is positive.
    """

    seen: ClassVar[list] = []

    def __init__(
        self, send_state: bool = False, send_wrist_image: bool = False, cameras: tuple = ("front", "hand")
    ):
        super().__init__()
        self.send_state, self.send_wrist_image, self.cameras = send_state, send_wrist_image, cameras

    def get_tasks(self):
        return [{"name": "touch the cube"}, {"name": "open the door"}]

    def reset(self, task):
        self.rng = np.random.default_rng([len(task["name"]), task.get("episode_idx", 0)])
        self.count, self.first = 0, None
        return self._draw()

    def _draw(self):
        images = {c: self.rng.integers(0, 255, (32, 40, 3), dtype=np.uint8) for c in self.cameras}
        return {"images": images, "state": self.rng.normal(size=4).astype(np.float32)}

    def step(self, action):
        taken = np.asarray(action["actions"])
        self.first = taken if self.first is None else self.first
        self.count += 1
        obs = self._draw()
        Room.seen.append((self._task["name"], self.count, obs, taken))
        return StepResult(obs=obs, reward=0.0, done=self.count == 4, info={})

    def make_obs(self, raw_obs, task):
        images = dict(raw_obs["images"])
        if not self.send_wrist_image:
            images.pop(self.cameras[1])
        found = {"images": images, "task_description": task["name"]}
        return {**found, "states": raw_obs["state"]} if self.send_state else found

    def get_step_result(self, step_result):
        return {"success": bool(self.first.sum() > 0)}

    def get_metadata(self):
        return {"max_steps": 4}

    def get_action_spec(self):
        return {"actions": RAW}

    def get_observation_spec(self):
        return {"image": IMAGE_RGB, "state": RAW, "language": LANGUAGE}
