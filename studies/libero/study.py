"""Spatial forcing on LIBERO from scripted demonstrations: a tiny OpenVLA-OFT, two arms, one core.

    python studies/libero/study.py --output runs/libero-study

An hour and a half of one free core; `--demos 1 --held-out 1 --noise 0 --steps 2 --episodes 1` checks that
all stages fit together. The same command resumes. What it prints at the end is all it claims; with stand-in
assets the table says so. What was run, and what came of it: FINDINGS.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from spatial_forcing.data import Dataset
from spatial_forcing.data.record import RecordConfig, record
from spatial_forcing.envs.base import EVALUATION_SEEDS
from spatial_forcing.evaluation import evaluate
from spatial_forcing.evaluation.results import EpisodeResult, success_table
from spatial_forcing.forcing import ForcingConfig
from spatial_forcing.students import load_student
from spatial_forcing.students.base import Student
from spatial_forcing.teachers import load_teacher
from spatial_forcing.teachers.cache.build import build_cache
from spatial_forcing.teachers.cache.source import dataset_source
from spatial_forcing.training import TrainConfig, preset, train


@dataclass(frozen=True)
class Study:
    """Settings of the study.

    Attributes:
        output: folder of everything; what is in it is not made again.
        tasks: LIBERO tasks that the scripted expert solves.
        demos: demonstrations a task.
        held_out: demonstrations a task for the open-loop error, which no arm is trained on.
        noise: of the disturbances while recording; see `RecordConfig`.
        steps: optimizer steps of each arm.
        start_from: folder of an earlier study, from whose policies the arms train on; none: from scratch.
        batch_size: samples a step.
        seeds: training seeds.
        episodes: evaluated a task, arm and seed: the same official initial states for all.
        image_size: pixels that demonstrations and evaluation render.
    """

    output: Path
    tasks: tuple[str, ...] = ("libero_spatial-0",)
    demos: int = 32
    held_out: int = 4
    noise: float = 0.3
    steps: int = 5000
    start_from: Path | None = None
    batch_size: int = 16
    seeds: tuple[int, ...] = (0,)
    episodes: int = 20
    image_size: int = 56


def main(study: tyro.conf.OmitArgPrefixes[Study]) -> None:
    """Record, train and evaluate alpha 0, then spatial forcing; report open-loop and closed-loop results."""
    torch.set_num_threads(1)
    dataset = demonstrations(study, "demonstrations", study.demos, first_seed=0)
    held_out = demonstrations(study, "held-out", study.held_out, first_seed=study.demos)
    results: dict[str, list[EpisodeResult]] = {"base": [], "sf": []}
    for seed in study.seeds:
        for arm, alpha in (("base", 0.0), ("sf", 0.5)):
            tags = {"arm": arm, "seed": seed}
            run = train(
                configuration(study, dataset, alpha, seed),
                on_checkpoint=lambda saved, tags=tags: report(
                    study, held_out, {**tags, "step": saved.step}, load_student(saved.policy)
                ),
            )
            result = evaluate(
                load_student(run.policy),
                study.tasks,
                episodes=study.episodes,
                seed=EVALUATION_SEEDS[0],
                env_kwargs={"image_size": study.image_size},
                out=study.output / "results.jsonl",
                tags=tags,
            )
            results[arm].extend(result.episodes)
            Console().print(success_table(results, title="LIBERO, scripted demonstrations, tiny OpenVLA-OFT"))


def demonstrations(study: Study, name: str, count: int, first_seed: int) -> Dataset:
    """`count` demonstrations of every task, recorded unless they are there."""
    config = RecordConfig(
        study.output / name,
        study.tasks,
        episodes_per_task=count,
        image_size=study.image_size,
        first_seed=first_seed,
        noise=study.noise,
        workers=1,
    )
    return Dataset.open(record(config))


def configuration(study: Study, dataset: Dataset, alpha: float, seed: int) -> TrainConfig:
    """The preset at the study's size; the teacher's features are built when an arm first needs them."""
    arm = "sf" if alpha else "base"
    base = preset("openvla-oft-tiny-libero", dataset=dataset.root, output=study.output / f"{arm}-{seed}")
    cache = study.output / "features"
    if alpha:
        build_cache(load_teacher("vggt-nano"), dataset_source(dataset, dataset.cameras), cache)
    return replace(
        base,
        init_from=study.start_from and study.start_from / base.output.name / "policy",
        cache=cache if alpha else None,
        forcing=replace(base.forcing, alpha=alpha) if alpha else ForcingConfig(alpha=0.0),
        steps=study.steps,
        batch_size=study.batch_size,
        optim=replace(base.optim, warmup_steps=min(base.optim.warmup_steps, study.steps // 2)),
        save_every=max(1, study.steps // 4),
        seed=seed,
    )


def report(study: Study, dataset: Dataset, tags: dict[str, Any], policy: Student) -> None:
    """Append the open-loop error: mean absolute difference of the first action, by dimension.

    `constant` is the error of the best constant action, the median: what predicting nothing costs.
    """
    rows = range(0, len(dataset), max(1, len(dataset) // 200))
    errors = []
    for index in rows:
        images = {camera: dataset.image(index, camera) for camera in dataset.cameras}
        seen = {"images": images, "state": dataset.state[index], "task": dataset.episode_of(index).task}
        errors.append((policy.act([seen])[0, 0] - torch.from_numpy(dataset.action[index])).abs())
    actions = torch.from_numpy(dataset.action[list(rows)])
    constant = (actions - actions.median(0).values).abs().mean(0)
    line = {**tags, "open_loop_l1": rounded(torch.stack(errors).mean(0)), "constant": rounded(constant)}
    print(json.dumps(line), flush=True)
    with (study.output / "open_loop.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "frames": len(errors)}) + "\n")


def rounded(values: torch.Tensor) -> list[float]:
    """Four decimals are more than these errors are worth."""
    return [round(value, 4) for value in values.tolist()]


if __name__ == "__main__":
    tyro.cli(main)
