"""`spatial-forcing evaluate`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from spatial_forcing.envs.base import EVALUATION_SEEDS, expand_tasks, suite_name
from spatial_forcing.errors import ConfigError
from spatial_forcing.evaluation import evaluate as roll_out
from spatial_forcing.students import load_student, statistics_names
from spatial_forcing.training.presets import METAWORLD_TASKS


@dataclass(frozen=True)
class EvaluateOptions:
    """The policy, the tasks and the settings of the evaluation.

    Attributes:
        policy: folder of a saved policy (`RUN/policy`).
        output: results file (JSONL); finished episodes in it are not run again. Videos go beside it.
        tasks: environments by name; a suite's name (libero_spatial) stands for all of its tasks.
        episodes: per task.
        seed: of the first episode; demonstrations use seeds below 100000.
        workers: simulator processes.
        execute: actions of a chunk that are carried out before the policy is asked again.
        image_size: pixels on a side that the cameras render.
        videos: episodes of each task that are filmed.
        cpu: stay on the CPU even where a GPU is present.
        statistics: the dataset whose statistics the policy uses, where its checkpoint holds those of several;
            default: those of the tasks' suite.
        settings: NAME=VALUE pairs for the environment, e.g. horizons=lerobot perturbation=camera,noise.
    """

    policy: Path
    output: Path
    tasks: tuple[str, ...] = METAWORLD_TASKS
    episodes: int = 20
    seed: int = EVALUATION_SEEDS[0]
    workers: int = os.cpu_count() or 1
    execute: int = 8
    image_size: int = 128
    videos: int = 0
    cpu: bool = False
    statistics: str | None = None
    settings: tuple[str, ...] = ()

    @property
    def env_settings(self) -> dict[str, str]:
        """`settings` by name. Raises `ConfigError` for one without a value."""
        pairs = [setting.partition("=") for setting in self.settings]
        for name, equals, _ in pairs:
            if not equals:
                raise ConfigError(f"--settings {name!r}: expected NAME=VALUE.")
        return {name: value for name, _, value in pairs}


def suite_statistics(policy: Path, tasks: Sequence[str]) -> str | None:
    """The statistics of the tasks' suite, where a checkpoint holds those of several; None where of one.

    Published names begin with the suite's: `libero_spatial_no_noops`.

    Raises:
        ConfigError: no statistics of the suite, or tasks that need different ones.
    """
    names = statistics_names(policy)
    if len(names) < 2:
        return None
    suites = {suite_name(task) for task in tasks}
    found = {name for suite in suites for name in names if name == suite or name.startswith(f"{suite}_")}
    if len(found) != 1 or len(suites) != 1:
        raise ConfigError(
            f"{policy} holds the statistics of {', '.join(names)}, and the tasks are of {', '.join(suites)}; "
            "choose with --statistics NAME, and evaluate one suite at a time."
        )
    return found.pop()


def evaluate(options: tyro.conf.OmitArgPrefixes[EvaluateOptions]) -> None:
    """Closed-loop success rates with 95 % intervals; the same command resumes.

    `--stand-ins`: where LIBERO's assets are not found, plain ones are made and used.
    """
    tasks = expand_tasks(options.tasks)
    statistics = options.statistics or suite_statistics(options.policy, tasks)
    policy: Any = load_student(options.policy, statistics=statistics)
    if torch.cuda.is_available() and not options.cpu:
        policy.to("cuda")
    # A student that does not say which cameras it wants gets the environment's own.
    cameras = policy.cameras
    result = roll_out(
        policy,
        tasks,
        episodes=options.episodes,
        seed=options.seed,
        workers=options.workers,
        execute=options.execute,
        out=options.output,
        videos=options.videos,
        tags={"policy": str(options.policy)} | ({"statistics": statistics} if statistics else {}),
        env_kwargs={
            "image_size": options.image_size,
            **({"cameras": tuple(cameras)} if cameras else {}),
            **options.env_settings,
        },
    )
    console = Console()
    console.print(result.table())
    console.print(f"episodes: {options.output}")
