"""Environments by task name. A new suite is one file and one `Suite` line here."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.envs import libero_tasks, robosuite_tasks
from spatial_forcing.envs.metaworld_tasks import INSTRUCTIONS
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.protocols import Env
from spatial_forcing.registry import Registry, did_you_mean, unknown

DEMONSTRATION_SEEDS = range(0, 100_000)
"""By convention demonstrations are recorded from these seeds only."""
EVALUATION_SEEDS = range(100_000, 1_000_000)
"""By convention policies are evaluated from these seeds only; `init_state` i is `EVALUATION_SEEDS[i]`."""


@dataclass(frozen=True)
class Suite:
    """A family of environments.

    Attributes:
        tasks: its task names, unique over all suites.
        entry: "module:class" of the environment; imported when first used.
        cameras: the views that are recorded unless others are named.
        horizon: steps within which an expert solves its tasks.
        marks: "module:function" whose result says what results of this suite must be marked with.
        fresh: each task needs a new process: its simulator does not give memory back.
        unsolved: tasks that its scripted expert does not solve.
    """

    tasks: tuple[str, ...]
    entry: str
    cameras: tuple[str, ...] = ("corner2", "gripperPOV")
    horizon: int = 200
    marks: str = ""
    fresh: bool = False
    unsolved: tuple[str, ...] = ()

    def load(self) -> Callable[..., Env]:
        """Import the environment's class."""
        module, _, name = self.entry.partition(":")
        factory: Callable[..., Env] = getattr(importlib.import_module(module), name)
        return factory


SUITES: Registry[Suite] = Registry("environment suite")
SUITES.add("metaworld", Suite(tuple(INSTRUCTIONS), "spatial_forcing.envs.metaworld:MetaWorldEnv"))
for _name in libero_tasks.COUNTS:
    SUITES.add(
        _name,
        Suite(
            libero_tasks.task_names(_name),
            "spatial_forcing.envs.libero:LiberoEnv",
            cameras=robosuite_tasks.CAMERAS,
            horizon=libero_tasks.HORIZONS["lerobot"][_name],
            marks="spatial_forcing.envs.libero_setup:marks",
            fresh=True,
            unsolved=tuple(task for task in libero_tasks.UNSOLVED if task.startswith(f"{_name}-")),
        ),
    )
SUITES.add(
    "robosuite",
    Suite(
        tuple(robosuite_tasks.TASKS),
        "spatial_forcing.envs.robosuite:RobosuiteEnv",
        cameras=robosuite_tasks.CAMERAS,
        horizon=400,
        fresh=True,
        unsolved=robosuite_tasks.UNSOLVED,
    ),
)
SUITES.add(
    "aloha",
    Suite(
        ("aloha-transfer-cube", "aloha-insertion"),
        "spatial_forcing.envs.aloha:AlohaEnv",
        cameras=("top", "left_wrist", "right_wrist"),
        horizon=300,
    ),
)


def list_tasks(suite: str | None = None) -> tuple[str, ...]:
    """Task names of one suite, or of all. Raises `ConfigError` for an unknown suite."""
    suites = SUITES.values() if suite is None else [SUITES[suite]]
    return tuple(task for each in suites for task in each.tasks)


def suite_name(task: str) -> str:
    """Name of the suite that `task` belongs to. Raises `ConfigError` for an unknown task (did you mean)."""
    for name, suite in SUITES.items():
        if task in suite.tasks:
            return name
    raise _unknown_task(task)


def suite_of(task: str) -> Suite:
    """The suite that `task` belongs to. Raises `ConfigError` for an unknown task (did you mean)."""
    return SUITES[suite_name(task)]


def expand_tasks(names: Iterable[str]) -> tuple[str, ...]:
    """Task names, with the name of a suite standing for all of its tasks; unknown names are kept."""
    return tuple(task for name in names for task in (SUITES[name].tasks if name in SUITES else (name,)))


def task_marks(tasks: Iterable[str]) -> dict[str, Any]:
    """What results on `tasks` must be marked with, e.g. that the scenes hold stand-in assets."""
    marks: dict[str, Any] = {}
    for entry in sorted({suite_of(task).marks for task in tasks} - {""}):
        module, _, name = entry.partition(":")
        marks |= getattr(importlib.import_module(module), name)()
    return marks


def _unknown_task(task: str) -> ConfigError:
    near = [*list_tasks(), *SUITES]
    return ConfigError(
        f"unknown task {task!r}.{did_you_mean(task, near)} There are {len(list_tasks())}, in the suites "
        f"{', '.join(SUITES)}."
    )


def make_env(task: str, **kwargs: Any) -> Env:
    """The environment of `task`; `functools.partial(make_env, task, ...)` is a picklable factory.

    Args:
        task: one of `list_tasks()`, e.g. "reach-v3".
        kwargs: the environment's own, e.g. `image_size`, `cameras`, `horizon`.

    Raises:
        ConfigError: unknown task, keyword or value.
        EnvironmentSetupError: the simulator or a graphics library is not installed.
    """
    factory = suite_of(task).load()
    known = [name for name in inspect.signature(factory).parameters if name != "task"]
    for key in kwargs:
        if key not in known:
            raise unknown(f"setting of {task}", key, known)
    return factory(task, **kwargs)


def episode_start(
    seed: int | None, options: Mapping[str, Any] | None, count: int = len(EVALUATION_SEEDS)
) -> tuple[int | None, int | None]:
    """What `reset(seed=, options={"init_state": i})` asks for: the episode's seed, and i where it is given.

    `init_state` i stands for `EVALUATION_SEEDS[i]`, whatever `seed` is; a suite has `count` of them.

    Raises:
        ConfigError: another option, or `init_state` out of range.
    """
    for key in options or {}:
        if key != "init_state":
            raise unknown("reset option", key, ["init_state"])
    if not options:
        return seed, None
    index = options["init_state"]
    if not isinstance(index, int) or not 0 <= index < count:
        raise ConfigError(f"init_state is {index!r}; expected an integer from 0 to {count - 1}.")
    return EVALUATION_SEEDS[index], index


def check_step(
    action: NDArray[Any],
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    env: Env,
    steps: int | None,
) -> NDArray[np.float32]:
    """The action as (action_dim,) float32, if `step` may take it now.

    Args:
        action: what the policy gave.
        low, high: (action_dim,), what actions are clipped to.
        env: for the messages.
        steps: of the episode so far; None before the first reset.

    Raises:
        ConfigError: the episode has not begun or is over.
        DataError: the action has another shape, or a value is not finite.
    """
    if steps is None or steps >= env.horizon:
        state = "has not begun" if steps is None else f"was truncated after {env.horizon} steps"
        raise ConfigError(f"the episode of {env.task} {state}; call reset() before step().")
    action = np.asarray(action, np.float32)
    if action.shape != low.shape or not np.isfinite(action).all():
        raise DataError(
            f"action {action.tolist()} for {env.task}; expected {low.size} finite numbers in "
            f"[{low.min():g}, {high.max():g}]."
        )
    return action


class LazyImages(Mapping[str, NDArray[np.uint8]]):
    """Camera name -> (H, W, 3) uint8, rendered at the first reading and kept.

    Pickling renders all of them. Reading one for the first time after the environment has moved on is
    an error: it would show another moment.

    Args:
        cameras: names, in order.
        render: renders one camera as the simulator is now.
        current: False once the simulator has left the moment of this observation.
    """

    def __init__(
        self,
        cameras: tuple[str, ...],
        render: Callable[[str], NDArray[np.uint8]],
        current: Callable[[], bool],
    ) -> None:
        self._cameras, self._render, self._current = cameras, render, current
        self._rendered: dict[str, NDArray[np.uint8]] = {}

    def __getitem__(self, camera: str) -> NDArray[np.uint8]:
        if camera not in self._cameras:
            raise unknown("camera", camera, self._cameras)
        if camera not in self._rendered:
            if not self._current():
                raise DataError(
                    f"image {camera!r} was read after the environment had moved on; read the images of an "
                    "observation before the next step or reset."
                )
            self._rendered[camera] = self._render(camera)
        return self._rendered[camera]

    def __contains__(self, camera: object) -> bool:
        return camera in self._cameras

    def __iter__(self) -> Iterator[str]:
        return iter(self._cameras)

    def __len__(self) -> int:
        return len(self._cameras)

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, NDArray[np.uint8]]]]:
        return dict, (dict(self),)
