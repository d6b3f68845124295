"""The study behind the quickstart's default: arms x training seeds on the quickstart's tasks.

    python studies/quickstart/study.py run --work runs/study --arms alpha0 sf --seeds 0 1 2
    python studies/quickstart/study.py table

Everything resumes: finished runs and episodes are not repeated. `results.jsonl` beside this file gets a
line for every (arm, seed, step) with successes by task; `table` prints means over seeds with intervals.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from spatial_forcing.envs import make_env
from spatial_forcing.evaluation import evaluate
from spatial_forcing.evaluation.workers import WorkerPool
from spatial_forcing.quickstart.config import PRESET, TEACHER, QuickstartConfig
from spatial_forcing.quickstart.page import policy_at
from spatial_forcing.quickstart.run import Quickstart
from spatial_forcing.quickstart.stages import Stages
from spatial_forcing.students import load_student
from spatial_forcing.training import TrainConfig, preset
from spatial_forcing.training.arms import train_arms

RESULTS = Path(__file__).with_name("results.jsonl")
OFF: dict[str, Any] = {"forcing.alpha": 0.0}
ARMS: dict[str, dict[str, Any]] = {
    "alpha0": OFF,
    "blind": {**OFF, "student.blank_images": True},
    "sf": {},
    "sf-no-pe": {"forcing.pe_scale": 0.0},
    "sf-standardised": {"forcing.standardise": True},
    "sf-centred": {"forcing.subtract_cell_mean": True},
    "sf-layer1": {"forcing.pairs": [[1, -1]]},
    "sf-layer3": {"forcing.pairs": [[3, -1]]},
    "sf-alpha0.1": {"forcing.alpha": 0.1},
    "sf-alpha2": {"forcing.alpha": 2.0},
}
"""Overrides of the preset; everything else is the preset's."""
BOOTSTRAPS = 10_000


@dataclass(frozen=True)
class Run:
    """Train and evaluate arms.

    Attributes:
        work: folder of datasets, cache, runs and episodes.
        arms: names from ARMS.
        seeds: training seeds; initial weights and batches are the same in every arm of a seed.
        steps: optimizer steps.
        demos: expert demonstrations of each task.
        checkpoints: evaluated steps.
        episodes: of each task at each checkpoint; the same ones in every arm and seed.
        workers: arms trained, and simulators, side by side.
    """

    work: Path
    arms: tuple[str, ...] = ("alpha0", "sf")
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 720
    demos: int = 15
    checkpoints: tuple[int, ...] = (360, 720)
    episodes: int = 20
    workers: int = 2


def run(options: tyro.conf.OmitArgPrefixes[Run]) -> None:
    """Run what is not finished, then print the table."""
    console = Console()
    config = QuickstartConfig(output=options.work, demos=options.demos, workers=options.workers)
    job = Quickstart(config, Stages(options.work, console), console)
    demos = job.record_demonstrations()
    cache = job.cache_features(demos) if any("alpha0" != a != "blind" for a in options.arms) else None
    # Each seed's arms side by side, so that an interrupted study still compares like with like.
    runs = {
        (arm, seed): _config(options, arm, seed, demos, cache)
        for seed in options.seeds
        for arm in options.arms
    }
    train_arms({f"{a}/{s}": c for (a, s), c in runs.items()}, parallel=options.workers, console=console)
    _evaluate(options, config, runs)
    table()


def _config(options: Run, arm: str, seed: int, demos: Path, cache: Path | None) -> TrainConfig:
    stride = math.gcd(*options.checkpoints)
    overrides = {"steps": options.steps, "seed": seed, "save_every": stride, "keep": 99, "progress": False}
    output = options.work / "runs" / f"{arm}-{seed}"
    config = preset(PRESET, dataset=demos, output=output, overrides=overrides | ARMS[arm])
    forced = {"teacher": TEACHER, "cache": cache} if config.forces else {"teacher": None, "cache": None}
    return replace(config, **forced)


def _evaluate(options: Run, config: QuickstartConfig, runs: Mapping[tuple[str, int], TrainConfig]) -> None:
    done = {(r["arm"], r["seed"], r["step"]) for r in read() if r["episodes"] >= options.episodes}
    cameras = next(iter(runs.values())).student.cameras
    env = {"cameras": cameras, "horizon": config.horizon, "image_size": config.image_size}
    with WorkerPool(options.workers, make_env, env) as pool:
        for (arm, seed), trained in runs.items():
            for step in options.checkpoints:
                if (arm, seed, step) in done:
                    continue
                result = evaluate(
                    load_student(policy_at(trained, step)),
                    config.tasks,
                    episodes=options.episodes,
                    seed=config.first_evaluation_seed,
                    workers=pool,
                    out=options.work / "episodes.jsonl",
                    tags={"arm": arm, "seed": seed, "step": step},
                )
                won = {task: rate.successes for task, rate in result.per_task.items()}
                row = {"arm": arm, "seed": seed, "step": step, "episodes": options.episodes, "won": won}
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def read() -> list[dict[str, Any]]:
    """All rows of the results file."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def success(row: Mapping[str, Any]) -> float:
    """Mean over tasks, in [0, 1]."""
    return float(np.mean([won / row["episodes"] for won in row["won"].values()]))


def table() -> None:
    """Success by arm and step; the difference to alpha 0 is paired by seed, with a bootstrap interval."""
    rows = read()
    shown = Table(title="Success in %, mean over tasks; 95 % intervals over training seeds (bootstrap)")
    for column in ("arm", "step", "seeds", "success", "minus alpha 0, paired", "each seed"):
        shown.add_column(column)
    for step in sorted({r["step"] for r in rows}):
        at = {(r["arm"], r["seed"]): 100 * success(r) for r in rows if r["step"] == step}
        for arm in ARMS:
            mine = {seed: value for (name, seed), value in at.items() if name == arm}
            if not mine:
                continue
            base = {seed: at["alpha0", seed] for seed in mine if ("alpha0", seed) in at}
            paired = [mine[seed] - base[seed] for seed in base] if arm != "alpha0" else []
            each = " ".join(f"{mine[seed]:.0f}" for seed in sorted(mine))
            shown.add_row(
                arm, str(step), str(len(mine)), _interval(mine.values()), _interval(paired, "+"), each
            )
    Console(width=120).print(shown)


def _interval(values: Iterable[float], sign: str = "") -> str:
    """Mean and percentile-bootstrap interval; with fewer than three values the mean alone."""
    data = np.array(list(values))
    if not len(data):
        return "-"
    mean = f"{data.mean():{sign}.1f}"
    if len(data) < 3:
        return mean
    draws = np.random.default_rng(0).choice(data, (BOOTSTRAPS, len(data))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{mean} [{low:{sign}.1f}, {high:{sign}.1f}]"


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"run": run, "table": table})
