"""Scripted demonstrations of robosuite's Lift, Stack and PickPlaceCan."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.envs.pick_and_place import Motion, PickAndPlace
from spatial_forcing.errors import ConfigError

CUBE = Motion((0.0, 0.0, 0.0), hover=0.08, carry=0.12, overshoot=0.01)
CAN = Motion((0.0, 0.0, 0.02), hover=0.12, carry=0.25)


class RobosuiteExpert:
    """One episode's controller; make a new one after every reset.

    Raises:
        ConfigError: a task that it does not solve.
    """

    def __init__(self, task: str) -> None:
        motions = {"robosuite-lift": CUBE, "robosuite-stack": CUBE, "robosuite-can": CAN}
        if task not in motions:
            raise ConfigError(f"{task} has no scripted expert; it solves {', '.join(motions)}.")
        self._task = task
        self._arm = PickAndPlace(motions[task])

    def action(self, env: Any) -> NDArray[np.float32]:
        """(7,) float32 in [-1, 1] for the environment's present state."""
        places, hand = env.objects(), env.hand()[0]
        if self._task == "robosuite-lift":
            return self._arm.action(hand, places["cube"], places["cube"], 0.0)  # lifting it solves the task
        if self._task == "robosuite-stack":
            return self._arm.action(hand, places["cubeA"], places["cubeB"], 0.048)
        return self._arm.action(hand, places["Can"], env.target(), 0.12)
