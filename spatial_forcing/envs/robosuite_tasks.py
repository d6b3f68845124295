"""robosuite's own tasks by name, without importing robosuite."""

from __future__ import annotations

from dataclasses import dataclass

CAMERAS = ("agentview", "robot0_eye_in_hand")
"""Third-person view and wrist view, of LIBERO too."""


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        env: robosuite's name of it.
        instruction: in words.
        horizon: steps within which the scripted expert solves it with room to spare; robomimic gives its
            policies 400.
        expert: whether there is a scripted expert.
    """

    env: str
    instruction: str
    horizon: int = 400
    expert: bool = False


TASKS = {
    "robosuite-lift": Task("Lift", "lift the red cube", 150, True),
    "robosuite-stack": Task("Stack", "stack the red cube on the green cube", 250, True),
    "robosuite-can": Task("PickPlaceCan", "put the can into its bin", 400, True),
    "robosuite-square": Task("NutAssemblySquare", "put the square nut on the square peg"),
    "robosuite-door": Task("Door", "open the door", 300),
}
"""Task name -> task; those of robomimic, and Stack and Door."""
UNSOLVED = tuple(name for name, task in TASKS.items() if not task.expert)
"""Tasks without a scripted expert."""
