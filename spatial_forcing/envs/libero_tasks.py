"""LIBERO's suites by name, without importing LIBERO. Task i of a suite is called `<suite>-<i>`."""

from __future__ import annotations

from typing import Literal

from spatial_forcing.registry import unknown

COUNTS = {"libero_spatial": 10, "libero_object": 10, "libero_goal": 10, "libero_10": 10, "libero_90": 90}
"""Tasks of each suite, numbered as in the benchmark's own list (task order 0)."""

Horizons = Literal["openvla", "lerobot"]
HORIZONS: dict[str, dict[str, int]] = {
    "openvla": {
        "libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400,
    },
    "lerobot": {
        "libero_spatial": 280, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400,
    },
}  # fmt: skip
"""Steps until truncation, settling not counted, as both evaluation scripts have them."""

INIT_STATES = 50
"""Official initial states of every task."""
UNSOLVED = {
    "libero_spatial-4": "the bowl lies in a drawer, and the hand is stopped above its rim",
    "libero_object-1": "a neighbour of the flat box stops the fingers in most placements",
}
"""Tasks of the scripted expert's suites that it does not solve, and why."""


def task_names(suite: str) -> tuple[str, ...]:
    """`<suite>-0`, `<suite>-1`, ..."""
    return tuple(f"{suite}-{i}" for i in range(COUNTS[suite]))


def parse_task(task: str) -> tuple[str, int]:
    """A task's suite and number. Raises `ConfigError` for an unknown one (did you mean)."""
    suite, _, number = task.rpartition("-")
    known = [name for each in COUNTS for name in task_names(each)]
    if task not in known:
        raise unknown("LIBERO task", task, known if suite not in COUNTS else task_names(suite))
    return suite, int(number)
