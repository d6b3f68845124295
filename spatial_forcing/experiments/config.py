"""Settings of a comparison, and the runs that it consists of."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from spatial_forcing.envs.base import EVALUATION_SEEDS, expand_tasks
from spatial_forcing.errors import ConfigError
from spatial_forcing.experiments.arms import ArmSpec, parse_arm, parse_overrides
from spatial_forcing.teachers.cards import RANDOM
from spatial_forcing.teachers.controls import SHUFFLED
from spatial_forcing.training import METAWORLD_TASKS, TrainConfig, preset
from spatial_forcing.training.fields import from_file, from_plain, to_file, to_plain

RUNS = "runs"
"""Folder of the training runs in that of the comparison."""


@dataclass(frozen=True)
class CompareConfig:
    """Arms x training seeds (x parts of the data), matched in everything else.

    Attributes:
        dataset: demonstrations, a LeRobot v3.0 dataset.
        keys: `NAME=FEATURE` where the dataset calls a feature otherwise, e.g. `action=actions`.
        store: folder of the decoded frames; none: beside the dataset.
        output: folder of everything that is made; the same command resumes there.
        arms: `[label=]name [setting=value ...]` each: alpha0, sf, standardised, centred, multi, independent,
            gated, 2d, shuffled, random, blind or fusion, with any settings of the preset changed.
        controls: arms that the others are compared with; the first one also sets the threshold.
        seeds: training seeds: of weights and batches, the same in every arm.
        fractions: parts of each task's demonstrations, in (0, 1].
        preset: starting point of every arm.
        set: settings (`setting=value`) of every arm that differ from the preset.
        steps: optimizer steps; none: the preset's.
        checkpoints: evaluations over training, evenly spaced, the last step included.
        tasks: environments of the evaluation, or suites of them; empty: no simulator, `held_out` alone. A
            finished comparison without them may be given some, and then evaluates the policies that it has.
        held_out: share of each task's demonstrations that no run trains on; the error of the predicted
            actions there is reported too (see `evaluation.open_loop`), with or without a simulator. Nothing
            of them enters a run: actions and states are scaled by the statistics of the others.
        episodes: evaluation episodes of each task, the same for every run.
        early_episodes: the same at checkpoints before the last; none: as many.
        videos: of each task, filmed after the last step of every run of the first training seed and shown on
            the page.
        first_episode: seed of the first of them. Choose others to confirm what a search has found.
        execute: actions of a chunk that are carried out before the policy is asked again.
        horizon: steps after which an episode has failed; none: the environment's own.
        image_size: pixels on a side that the cameras render; none: the student's.
        teacher: 3D teacher, also of the shuffled, random and fusion arms; none: the preset's.
        image_teacher: of the arm `2d`: a registered name or a folder.
        parallel: training processes, and simulators, side by side; training processes take the GPUs in turn.
            Default: as many as there are GPUs, or cores where there is none.
        threshold: success rate of "steps to threshold"; none: the first control's final mean, or one solved
            episode where it solves none.
    """

    dataset: Path
    output: Path
    keys: tuple[str, ...] = ()
    store: Path | None = None
    arms: tuple[str, ...] = ("alpha0", "sf")
    controls: tuple[str, ...] = ("alpha0",)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    fractions: tuple[float, ...] = (1.0,)
    preset: str = "nano-metaworld"
    set: tuple[str, ...] = ()
    steps: int | None = None
    checkpoints: int = 4
    tasks: tuple[str, ...] = METAWORLD_TASKS
    held_out: float = 0.0
    episodes: int = 20
    early_episodes: int | None = None
    videos: int = 0
    first_episode: int = EVALUATION_SEEDS[0]
    execute: int = 8
    horizon: int | None = None
    image_size: int | None = None
    teacher: str | None = None
    image_teacher: str = "facebook/dinov2-base"
    parallel: int = torch.cuda.device_count() or os.cpu_count() or 1
    threshold: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", expand_tasks(self.tasks))
        for name in ("checkpoints", "episodes", "parallel", "execute"):
            if getattr(self, name) < 1:
                raise ConfigError(f"compare.{name} is {getattr(self, name)}; expected at least 1.")
        if (self.early_episodes is not None and self.early_episodes < 1) or self.videos < 0:
            raise ConfigError(
                f"compare.early_episodes is {self.early_episodes} and videos {self.videos}; expected at "
                "least 1 or none, and 0 or more."
            )
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"compare.held_out is {self.held_out}; expected a share in [0, 1).")
        for name in ("arms", "controls", "seeds", "fractions", "tasks"):
            values = getattr(self, name)
            if len(set(values)) != len(values) or not (values or (name == "tasks" and self.held_out)):
                raise ConfigError(
                    f"compare.{name} is {values}; expected one or more, each once."
                    + (" Without a simulator give compare.held_out." if name == "tasks" else "")
                )
        if any(not 0 < f <= 1 for f in self.fractions):
            raise ConfigError(f"compare.fractions is {self.fractions}; expected numbers in (0, 1].")
        names = [arm.name for arm in self.specs]
        for called in (names, [arm.title for arm in self.specs]):
            if len(set(called)) != len(called):
                raise ConfigError(
                    f"two arms have the same name: {called}; give one a label (`label=name ...`)."
                )
        if missing := [c for c in self.controls if c not in names]:
            raise ConfigError(f"the controls {missing} are no arms of this comparison; it has {names}.")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ConfigError(f"compare.threshold is {self.threshold}; expected a rate in (0, 1], or none.")

    @property
    def specs(self) -> tuple[ArmSpec, ...]:
        """The arms, parsed."""
        return tuple(parse_arm(text) for text in self.arms)

    @property
    def titles(self) -> dict[str, str]:
        """What results call the arms, by their names."""
        return {arm.name: arm.title for arm in self.specs}

    @property
    def control_titles(self) -> tuple[str, ...]:
        """What results call the controls."""
        return tuple(self.titles[name] for name in self.controls)

    @property
    def target(self) -> str:
        """Name of the 3D teacher."""
        found = self.teacher or preset(self.preset, dataset=self.dataset, output=self.output).teacher
        if found is None:
            raise ConfigError(f"preset {self.preset!r} names no teacher; give --teacher.")
        return found

    def episodes_at(self, step: int, last: int) -> int:
        """Evaluation episodes of each task after `step` of `last` steps."""
        early = self.episodes if self.early_episodes is None else self.early_episodes
        return self.episodes if step == last else early

    def to_plain(self) -> dict[str, Any]:
        """The settings as JSON can hold them; paths as they were given."""
        plain: dict[str, Any] = to_plain(self)
        return plain | {"teacher": self.target}

    def to_file(self) -> dict[str, Any]:
        """What compare.json in `output` holds: paths relative to it."""
        return to_file(self, self.output) | {"teacher": self.target}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> CompareConfig:
        """The inverse of `to_plain`. Raises `ConfigError` naming the setting that is wrong."""
        return from_plain(cls, plain)

    @classmethod
    def from_file(cls, plain: Mapping[str, Any], folder: Path) -> CompareConfig:
        """The settings of a file in `folder`. Raises `ConfigError` naming the setting that is wrong."""
        return from_file(cls, plain, folder)


@dataclass(frozen=True)
class Cell:
    """One training run: an arm on a part of the data with a training seed."""

    arm: ArmSpec
    fraction: float
    seed: int

    @property
    def name(self) -> str:
        """The name of the folder, which progress bars show too."""
        part = "" if self.fraction == 1 else f"-{100 * self.fraction:g}%"
        return f"{re.sub(r'[^A-Za-z0-9_.,=+()-]', '_', self.arm.name)}{part}-seed{self.seed}"

    @property
    def tags(self) -> dict[str, Any]:
        """The tags that its episodes get."""
        return {"arm": self.arm.name, "fraction": self.fraction, "seed": self.seed}


def cells(config: CompareConfig) -> list[Cell]:
    """All runs, seed by seed: what is finished of an interrupted comparison is matched."""
    return [
        Cell(arm, fraction, seed)
        for seed in config.seeds
        for fraction in config.fractions
        for arm in config.specs
    ]


def train_config(
    config: CompareConfig,
    cell: Cell,
    caches: Mapping[str, Path] | None = None,
    init: Path | None = None,
    episodes: Sequence[int] | None = None,
) -> TrainConfig:
    """The training run of a cell.

    Args:
        config, cell: what is compared, and which run of it.
        episodes: demonstrations that are not held out; None: all.
        caches: folders of cached features by teacher; None while they are not built.
        init: the initial student of a fused arm.

    Raises:
        ConfigError: an unknown preset or setting, or a value that it cannot take.
    """
    base = preset(config.preset, dataset=config.dataset, output=config.output / RUNS / cell.name)
    shared = parse_overrides(config.set, "compare.set")
    steps = int(cell.arm.overrides.get("steps", config.steps or shared.get("steps", base.steps)))
    overrides: dict[str, Any] = {
        "progress": False,
        "keys": config.keys,
        "store": config.store,
        "optim.warmup_steps": min(base.optim.warmup_steps, steps // 4),
        **shared,
        "steps": steps,
        "seed": cell.seed,
        "fraction": cell.fraction,
        **cell.arm.settings(base.student.depth),
    }
    points = evaluated_steps(steps, config.checkpoints)
    overrides |= {"save_every": points[0], "keep": config.checkpoints}
    teacher = target_teacher(config, cell.arm)
    try:
        found = preset(
            config.preset,
            dataset=config.dataset,
            output=base.output,
            overrides=overrides | {"teacher": teacher, "cache": None},
        )
    except ConfigError as error:
        raise ConfigError(f"arm {cell.arm.name!r} with preset {config.preset!r}: {error}") from error
    built = caches or {}
    cache = built.get((found.teacher or "").removeprefix(SHUFFLED))
    several = {label: built[name] for label, name in found.teachers.items() if name in built}
    if episodes is not None and found.episodes is not None:
        raise ConfigError("compare.held_out chooses the episodes; drop `episodes` from compare.set.")
    return replace(
        found,
        cache=cache,
        caches=several,
        init_from=init,
        episodes=found.episodes if episodes is None else tuple(episodes),
    )


def target_teacher(config: CompareConfig, arm: ArmSpec) -> str | None:
    """Name of the teacher that an arm is aligned with, as a training configuration takes it.

    An arm's own `teacher=NAME` stands before that of the comparison, and `teachers=...` in place of it.
    """
    if "teachers" in arm.overrides:
        return None
    own = arm.overrides.get("teacher")
    names = {
        "none": None,
        "teacher": own or config.target,
        "image": config.image_teacher,
        "shuffled": SHUFFLED + config.target,
        "random": RANDOM + config.target,
    }
    return names[arm.target]


def evaluated_steps(steps: int, count: int) -> tuple[int, ...]:
    """Steps at which policies are evaluated, ascending. Raises `ConfigError` when they are not even."""
    if steps % count:
        raise ConfigError(
            f"steps is {steps}, which is not a multiple of checkpoints ({count}); change one of them."
        )
    return tuple(steps // count * (i + 1) for i in range(count))


def teacher_layers(runs: Sequence[TrainConfig]) -> dict[str, tuple[int, ...]]:
    """Layers that must be cached, by teacher."""
    wanted: dict[str, set[int]] = {}
    for run in runs:
        for source in run.sources:
            if source.teacher is not None:
                name = source.teacher.removeprefix(SHUFFLED)
                wanted.setdefault(name, set()).update(run.forcing.layers_of(source.label))
    return {teacher: tuple(sorted(layers)) for teacher, layers in wanted.items()}
