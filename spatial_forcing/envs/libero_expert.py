"""A scripted pick-and-place controller on privileged state, so that demonstrations need no download.

It grasps the goal's first object from above and releases it over the second: position targets for the
operational-space controller, one after the other. It solves nearly all episodes of libero_spatial and
libero_object but those of `UNSOLVED`; tasks with stoves or two objects are beyond it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.envs.libero_tasks import UNSOLVED, parse_task
from spatial_forcing.errors import ConfigError

SUITES = ("libero_spatial", "libero_object")
STEP = 0.05
"""Metres that the controller moves for an action of 1."""
OPEN, CLOSED = -1.0, 1.0
HOVER, CARRY = 0.12, 0.22
"""Metres above the object while approaching, and above where it was grasped while carrying."""
FLAT = ("butter", "chocolate_pudding", "cream_cheese")
"""Boxes that lie flat: fingers that close 2 cm above their centres close on air."""
OVERSHOOT = 0.08
"""Metres below the height of release that the lowering hand makes for, to pass that height at speed.

Slowing down there would leave a resting place to a policy without memory: frames just before and after
the fingers open would differ by nothing but the fingers.
"""


class PickAndPlace:
    """One episode's controller; make a new one after every reset.

    Args:
        task: of `SUITES`.

    Raises:
        ConfigError: a task of another suite, or one of `UNSOLVED`.
    """

    def __init__(self, task: str) -> None:
        self.suite = parse_task(task)[0]
        if self.suite not in SUITES:
            raise ConfigError(f"{task} has no scripted expert; it solves tasks of {' and '.join(SUITES)}.")
        if task in UNSOLVED:
            raise ConfigError(f"{task} is not solved by the scripted expert: {UNSOLVED[task]}.")
        self._stage = 0
        self._held = 0
        self._grasp: NDArray[np.float64] | None = None

    def action(self, env: Any) -> NDArray[np.float32]:
        """(7,) float32 in [-1, 1] for the environment's present state."""
        item, goal = env.objects_of_interest()[:2]
        places = env.objects()
        hand, _ = env.hand()
        self._held += 1
        if self._grasp is None:
            self._grasp = places[item] + _grip(item)
        carried = hand - places[item]
        over = places[goal][:2] + carried[:2]
        grasp = self._grasp
        lift = grasp[2] + CARRY
        release = places[goal][2] + (0.07 if self.suite == "libero_spatial" else 0.14) + max(0.0, carried[2])
        low = np.array([*over, release - OVERSHOOT])

        def reached(target: NDArray[np.float64]) -> bool:
            return bool(np.linalg.norm(hand - target) < 0.012) or self._held > 60

        above, lifted = np.array([*grasp[:2], grasp[2] + HOVER]), np.array([*grasp[:2], lift])
        carry = np.array([*over, lift])
        stages = (  # where to, fingers, whether that is done
            (above, OPEN, reached(above)),
            (grasp, OPEN, reached(grasp)),
            (grasp, CLOSED, self._held > 12),
            (lifted, CLOSED, reached(lifted)),
            (carry, CLOSED, reached(carry)),
            (low, CLOSED, hand[2] < release or self._held > 60),
            (low, OPEN, self._held > 10),
            (np.array([*hand[:2], lift]), OPEN, False),
        )
        target, fingers, done = stages[self._stage]
        if done:
            self._stage, self._held = self._stage + 1, 0
        move = np.clip((target - hand) / STEP * 0.8, -1, 1)
        return np.array([*move, 0, 0, 0, fingers], np.float32)


def _grip(item: str) -> NDArray[np.float64]:
    """From the object's centre to where the fingers close, in metres."""
    if "bowl" in item:  # by the rim: too wide for the hand
        return np.array([0.0, 0.045, 0.03])
    if item.startswith(FLAT):
        return np.array([0.0, 0.0, -0.01])  # closing begins a centimetre above the target
    return np.array([0.0, 0.0, 0.02])
