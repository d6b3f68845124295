"""A controller that grasps an object from above and releases it over a place, for scripted demonstrations.

Position targets for robosuite's operational-space controller, one after the other, on privileged state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STEP = 0.05
"""Metres that the controller moves for an action of 1."""
OPEN, CLOSED = -1.0, 1.0


@dataclass(frozen=True)
class Motion:
    """Metres and steps of the motion.

    Attributes:
        grip: from the object's centre to where the fingers close.
        hover: above the grasp while approaching.
        carry: above the grasp while carrying.
        overshoot: below the height of release that the lowering hand makes for, to pass that height at speed.
            Slowing down there would leave a resting place to a policy without memory: frames just before and
            after the fingers open would differ by nothing but the fingers.
        patience: steps after which a target counts as reached.
    """

    grip: tuple[float, float, float]
    hover: float = 0.12
    carry: float = 0.22
    overshoot: float = 0.08
    patience: int = 60


class PickAndPlace:
    """One episode's controller; make a new one after every reset."""

    def __init__(self, motion: Motion) -> None:
        self._motion = motion
        self._stage = 0
        self._held = 0
        self._grasp: NDArray[np.float64] | None = None

    def action(
        self, hand: NDArray[np.float64], item: NDArray[np.float64], goal: NDArray[np.float64], drop: float
    ) -> NDArray[np.float32]:
        """(7,) float32 in [-1, 1] for the present state.

        Args:
            hand, item: where they are, (3,) in metres.
            goal: over which the object is released, (3,).
            drop: metres from the goal to the object's centre at its release.
        """
        motion = self._motion
        self._held += 1
        if self._grasp is None:
            self._grasp = item + np.asarray(motion.grip)
        grasp, carried = self._grasp, hand - item
        over = goal[:2] + carried[:2]
        lift = grasp[2] + motion.carry
        release = goal[2] + drop + max(0.0, carried[2])
        low = np.array([*over, release - motion.overshoot])

        def reached(target: NDArray[np.float64]) -> bool:
            return bool(np.linalg.norm(hand - target) < 0.012) or self._held > motion.patience

        above, lifted = np.array([*grasp[:2], grasp[2] + motion.hover]), np.array([*grasp[:2], lift])
        carry = np.array([*over, lift])
        stages = (  # where to, fingers, whether that is done
            (above, OPEN, reached(above)),
            (grasp, OPEN, reached(grasp)),
            (grasp, CLOSED, self._held > 12),
            (lifted, CLOSED, reached(lifted)),
            (carry, CLOSED, reached(carry)),
            (low, CLOSED, hand[2] < release or self._held > motion.patience),
            (low, OPEN, self._held > 10),
            (np.array([*hand[:2], lift]), OPEN, False),
        )
        target, fingers, done = stages[self._stage]
        if done:
            self._stage, self._held = self._stage + 1, 0
        move = np.clip((target - hand) / STEP * 0.8, -1, 1)
        return np.array([*move, 0, 0, 0, fingers], np.float32)
