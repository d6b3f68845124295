"""Scripted demonstrations of libero_spatial and libero_object, so that none need be downloaded.

The goal's first object is grasped from above and released over the second. Nearly all episodes are solved,
except for `UNSOLVED`; tasks with stoves or two objects are beyond it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.envs.libero_tasks import UNSOLVED, parse_task
from spatial_forcing.envs.pick_and_place import Motion, PickAndPlace
from spatial_forcing.errors import ConfigError

DROPS = {"libero_spatial": 0.07, "libero_object": 0.14}
"""Suite -> metres above the goal at which its objects are released."""
FLAT = ("butter", "chocolate_pudding", "cream_cheese")
"""Boxes that lie flat: fingers that close 2 cm above their centres close on air."""


class LiberoExpert:
    """One episode's controller; make a new one after every reset.

    Args:
        task: of the suites in `DROPS`.

    Raises:
        ConfigError: a task of another suite, or one of `UNSOLVED`.
    """

    def __init__(self, task: str) -> None:
        suite = parse_task(task)[0]
        if suite not in DROPS:
            raise ConfigError(f"{task} has no scripted expert; it solves tasks of {' and '.join(DROPS)}.")
        if task in UNSOLVED:
            raise ConfigError(f"{task} is not solved by the scripted expert: {UNSOLVED[task]}.")
        self._drop = DROPS[suite]
        self._arm: PickAndPlace | None = None

    def action(self, env: Any) -> NDArray[np.float32]:
        """(7,) float32 in [-1, 1] for the environment's present state."""
        item, goal = env.objects_of_interest()[:2]
        if self._arm is None:
            self._arm = PickAndPlace(Motion(_grip(item)))
        places = env.objects()
        return self._arm.action(env.hand()[0], places[item], places[goal], self._drop)


def _grip(item: str) -> tuple[float, float, float]:
    """From the object's centre to where the fingers close, in metres."""
    if "bowl" in item:  # by the rim: too wide for the hand
        return 0.0, 0.045, 0.03
    if item.startswith(FLAT):
        return 0.0, 0.0, -0.01  # closing begins a centimetre above the target
    return 0.0, 0.0, 0.02
