"""Which Meta-World tasks may teach `vggt-nano`, and which are reserved for studying students.

A teacher that was pretrained on a task with exact depth would leak privileged geometry of that task's
objects into every student aligned to it. So the split is by *object*, not by task: no mesh file of a
reserved task appears in a pretraining task (the robot, the table and the floor are in all of them).
`object_meshes` reads the meshes from the simulator's own files, so the tests check the facts, not a table.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from spatial_forcing.errors import ConfigError, EnvironmentSetupError
from spatial_forcing.registry import unknown

TRAIN_TASKS: tuple[str, ...] = (
    "coffee-button-v3",
    "coffee-pull-v3",
    "coffee-push-v3",
    "hammer-v3",
    "lever-pull-v3",
    "peg-insert-side-v3",
    "peg-unplug-side-v3",
    "stick-pull-v3",
    "stick-push-v3",
)
"""Rendered for pretraining."""

VALIDATION_TASKS: tuple[str, ...] = ("dial-turn-v3", "soccer-v3")
"""Never trained on; used to choose settings, so no final number is taken on them."""

RESERVED_TASKS: tuple[str, ...] = (
    "assembly-v3",
    "basketball-v3",
    "bin-picking-v3",
    "box-close-v3",  # shares the bin with bin-picking
    "button-press-topdown-v3",
    "button-press-topdown-wall-v3",
    "button-press-v3",
    "button-press-wall-v3",
    "disassemble-v3",
    "door-close-v3",
    "door-lock-v3",
    "door-open-v3",
    "door-unlock-v3",
    "drawer-close-v3",
    "drawer-open-v3",
    "faucet-close-v3",
    "faucet-open-v3",
    "hand-insert-v3",  # shares the block with reach, push and pick-place
    "handle-press-side-v3",
    "handle-press-v3",
    "handle-pull-side-v3",
    "handle-pull-v3",
    "pick-out-of-hole-v3",
    "pick-place-v3",
    "pick-place-wall-v3",
    "plate-slide-back-side-v3",
    "plate-slide-back-v3",
    "plate-slide-side-v3",
    "plate-slide-v3",
    "push-back-v3",
    "push-v3",
    "push-wall-v3",
    "reach-v3",
    "reach-wall-v3",
    "shelf-place-v3",
    "sweep-into-v3",  # shares the block
    "sweep-v3",  # shares the block
    "window-close-v3",
    "window-open-v3",
)
"""Free for quickstarts and studies; the teacher's final numbers are measured on these."""


def check_held_out(tasks: Iterable[str]) -> None:
    """Refuse `tasks` (of a quickstart or a study) that the teacher was trained or tuned on.

    Raises:
        ConfigError: a task is in `TRAIN_TASKS` or `VALIDATION_TASKS`, is not a Meta-World task, or
            there is no task at all (an empty list would pass every check silently).
    """
    tasks = tuple(tasks)
    if not tasks:
        raise ConfigError(
            "no tasks were given to check against the teacher's pretraining set; name at least one."
        )
    known = (*TRAIN_TASKS, *VALIDATION_TASKS, *RESERVED_TASKS)
    for task in tasks:
        if task not in known:
            raise unknown("Meta-World task", task, known)
    leaked = sorted({*tasks} & {*TRAIN_TASKS, *VALIDATION_TASKS})
    if leaked:
        raise ConfigError(
            f"{', '.join(leaked)} served to pretrain `vggt-nano`, which knows the objects' exact depth; "
            f"choose from: {', '.join(RESERVED_TASKS)}."
        )


def scene_file(task: str) -> Path:
    """The MuJoCo XML file of a Meta-World task.

    Raises:
        ConfigError: the task is unknown.
        EnvironmentSetupError: Meta-World is not installed.
    """
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    except ImportError as error:
        raise EnvironmentSetupError(
            "Meta-World is not installed; run `pip install 'spatial-forcing[metaworld]'`."
        ) from error
    if task not in ALL_V3_ENVIRONMENTS:
        raise unknown("Meta-World task", task, ALL_V3_ENVIRONMENTS)
    # `model_name` is a property that does not look at its instance: no simulator needs to be built.
    return Path(str(ALL_V3_ENVIRONMENTS[task].model_name.fget(None)))


def object_meshes(task: str) -> frozenset[str]:
    """Mesh files of the task's own objects: all that its scene loads, minus robot and table."""
    import mujoco

    spec = mujoco.MjSpec.from_file(str(scene_file(task)))
    files = (str(Path(mesh.file)).replace("\\", "/") for mesh in spec.meshes)
    return frozenset(
        "/".join(Path(file).parts[-2:]) for file in files if Path(file).parts[-2] not in ("xyz_base", "table")
    )
