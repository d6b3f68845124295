"""What is wrong with a comparison, said before anything is trained."""

from __future__ import annotations

import json

from spatial_forcing.data import Dataset
from spatial_forcing.envs import make_env
from spatial_forcing.envs.base import suite_of
from spatial_forcing.envs.metaworld_tasks import INSTRUCTIONS
from spatial_forcing.errors import ConfigError
from spatial_forcing.evaluation.workers import MakeEnv
from spatial_forcing.experiments.config import RUNS, CompareConfig
from spatial_forcing.students import NanoConfig
from spatial_forcing.training import TrainConfig
from spatial_forcing.training.fields import differences, located

CONFIG, EPISODES = "compare.json", "episodes.jsonl"
GROWING = frozenset(
    {"arms", "seeds", "fractions", "controls", "parallel", "output", "threshold", "image_teacher", "store"}
)
"""Settings that an existing comparison may change: they add runs or read them again, and alter none. A run of
another 2D teacher is refused by its own folder."""
ROLLOUTS = frozenset(
    {"tasks", "episodes", "early_episodes", "videos", "first_episode", "horizon", "image_size"}
)
"""Settings of the closed-loop evaluation: they may change until an episode was run."""


def check_folder(config: CompareConfig) -> None:
    """Refuse a folder that holds a comparison with other settings. Raises `ConfigError` with both values."""
    path = config.output / CONFIG
    if not path.exists():
        return
    # Parsed, so that settings which are newer than the folder have their default there.
    there = CompareConfig.from_file(json.loads(path.read_text()), config.output)
    evaluated = any((config.output / RUNS).glob(f"*/{EPISODES}"))
    free = GROWING if evaluated else GROWING | ROLLOUTS
    compared = differences(located(there).to_plain(), located(config).to_plain())
    changed = {name: values for name, values in compared.items() if name not in free}
    if changed:
        listed = "; ".join(f"{n}: {old!r} there, {new!r} asked for" for n, (old, new) in changed.items())
        raise ConfigError(
            f"{config.output} holds a comparison with other settings ({listed}); choose another output."
        )


def check_runs(config: CompareConfig, dataset: Dataset, runs: list[TrainConfig], make: MakeEnv) -> None:
    """Refuse what would fail once the first policies are trained.

    Args:
        config: what is compared.
        dataset: opened.
        runs: every training run of it.
        make: environment factory; task names are those of this package with its own.

    Raises:
        ConfigError: cameras that the dataset lacks, an unknown task, more executed actions than a chunk, or a
            fused arm of another student than nano.
    """
    if any(arm.fused for arm in config.specs) and not isinstance(runs[0].student, NanoConfig):
        raise ConfigError(
            f"the arm 'fusion' feeds teacher features to the nano student; preset {config.preset!r} has a "
            f"{type(runs[0].student).__name__}. Leave the arm out, or compare nano presets."
        )
    for run in runs:
        missing = [camera for camera in run.student.cameras if camera not in dataset.info.cameras]
        if missing:
            raise ConfigError(
                f"preset {config.preset!r} wants the cameras {list(run.student.cameras)}; {config.dataset} "
                f"has {list(dataset.info.cameras)}. Choose another --preset, or name them: --set "
                "'student.cameras=[\"...\"]'."
            )
        chunk = run.student.chunk
        if config.tasks and config.execute > chunk:
            raise ConfigError(
                f"compare.execute is {config.execute}; the policy predicts {chunk} actions at a time. Choose "
                f"1 to {chunk}."
            )
    if make is make_env:
        for task in config.tasks:
            suite_of(task)


def untrained_tasks(config: CompareConfig, dataset: Dataset) -> list[str]:
    """A remark where tasks are evaluated that no demonstration shows; only Meta-World's are known by name."""
    shown = set(dataset.tasks.values())
    foreign = [task for task in config.tasks if task in INSTRUCTIONS and INSTRUCTIONS[task] not in shown]
    if not foreign:
        return []
    return [
        f"{config.dataset} has no demonstration of {', '.join(foreign)}: no arm was trained for "
        f"{'it' if len(foreign) == 1 else 'them'} (name others with --tasks)."
    ]
