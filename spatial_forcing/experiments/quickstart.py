"""The quickstart: demonstrations from a simulator, and a specification of `compare` that runs on them.

Everything that takes long resumes by itself: recording, the feature cache, training, evaluation.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from rich.console import Console

from spatial_forcing.analysis.features import Frames, student_cameras, student_features, teacher_features
from spatial_forcing.analysis.pictures import pca_pictures
from spatial_forcing.analysis.probe import MEAN_IMAGE, ProbeResult, probe_depth
from spatial_forcing.analysis.probe import TEACHER as CEILING
from spatial_forcing.analysis.probe_page import probe_section
from spatial_forcing.analysis.report import Section, pca_rows
from spatial_forcing.data import Dataset
from spatial_forcing.data.record import RecordConfig, record
from spatial_forcing.envs.base import EVALUATION_SEEDS
from spatial_forcing.envs.gl import ensure_gl
from spatial_forcing.envs.libero_setup import ensure_assets
from spatial_forcing.errors import ConfigError
from spatial_forcing.evaluation.paired import Outcomes, paired_error
from spatial_forcing.experiments.checks import check_folder
from spatial_forcing.experiments.config import CompareConfig, cells, train_config
from spatial_forcing.experiments.contrasts import DEPTH, Contrast, corrected_contrasts, on_the_same_data
from spatial_forcing.experiments.report import PAGE, write_page
from spatial_forcing.experiments.run import RESULT, Run, compare, one_thread, reread
from spatial_forcing.experiments.statistics import Comparison
from spatial_forcing.forcing.config import resolve_pairs
from spatial_forcing.protocols import Student, Teacher
from spatial_forcing.storage import write_json
from spatial_forcing.students import load_student
from spatial_forcing.teachers import load_teacher
from spatial_forcing.training.fields import from_file, to_file, to_plain
from spatial_forcing.training.parts import hold_out, make_student

PRESET, TEACHER = "openvla-oft-tiny-libero", "vggt-nano"
FIRST_STATE = 20
"""First of LIBERO's official initial states that is played: the search used those before."""
SETTINGS = "quickstart.json"
DEMONSTRATIONS = "demonstrations"
RANDOM = "random weights"
PROBE_FRAMES, PCA_FRAMES, PCA_SHOWN = 640, 24, 2
NOTES = (
    "The teacher, vggt-nano, was pretrained on rendered Meta-World scenes: other robots, objects and rooms.",
    "The policies see two images, the instruction, and the hand's pose and fingers; no object's position.",
    "A tiny policy learns from scratch here. That a pretrained one gains as much is not said.",
    "studies/quickstart/FINDINGS.md has the confirmation of this setting on fresh training seeds.",
)


@dataclass(frozen=True)
class QuickstartConfig:
    """What the quickstart does; the defaults take ten minutes on two idle cores.

    Attributes:
        output: folder of everything that is made; run again with it to resume or to reuse.
        task: a LIBERO task.
        arms: what is compared, as `CompareConfig.arms` takes them; the first one is the control.
        seeds: training seeds: of initial weights and batches, the same in every arm.
        demos: demonstrations of the scripted expert, with depth.
        held_out: share of them that no policy is trained on.
        noise: disturbance of the demonstrations (`RecordConfig.noise`).
        alpha: weight of the alignment loss, of arms that have one.
        batch_size: samples of a step.
        steps: optimizer steps of each run.
        checkpoints: evaluations over training, evenly spaced, the last step included.
        episodes: evaluation episodes of each policy.
        horizon: steps after which an evaluation episode has failed.
        image_size: pixels on a side of an image; the student's own, so nothing is resized.
        workers: simulator processes while demonstrations are recorded.
    """

    output: Path = Path("quickstart")
    task: str = "libero_spatial-0"
    arms: tuple[str, ...] = ("alpha0", "sf")
    seeds: tuple[int, ...] = (200, 201, 202)
    demos: int = 20
    held_out: float = 0.2
    noise: float = 0.3
    alpha: float = 1.0
    batch_size: int = 8
    steps: int = 1000
    checkpoints: int = 1
    episodes: int = 2
    horizon: int = 220
    image_size: int = 56
    workers: int = os.cpu_count() or 1

    def __post_init__(self) -> None:
        for name in (
            "demos",
            "batch_size",
            "steps",
            "checkpoints",
            "episodes",
            "horizon",
            "image_size",
            "workers",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"quickstart.{name} is {getattr(self, name)}; expected at least 1.")
        if self.steps % self.checkpoints:
            raise ConfigError(
                f"quickstart.steps is {self.steps}, which is not a multiple of checkpoints "
                f"({self.checkpoints}); change one of them."
            )
        if not 0 < self.held_out < 1:
            raise ConfigError(f"quickstart.held_out is {self.held_out}; expected a share between 0 and 1.")

    @property
    def demonstrations(self) -> RecordConfig:
        """What the policies are trained on, and measured on where it is held out."""
        return RecordConfig(
            root=self.output / DEMONSTRATIONS,
            tasks=(self.task,),
            episodes_per_task=self.demos,
            noise=self.noise,
            depth=True,
            image_size=self.image_size,
            workers=self.workers,
        )

    @property
    def comparison(self) -> CompareConfig:
        """The specification that `compare` runs."""
        return CompareConfig(
            dataset=self.output / DEMONSTRATIONS,
            output=self.output,
            arms=self.arms,
            controls=self.arms[:1],
            seeds=self.seeds,
            preset=PRESET,
            set=(
                f"forcing.alpha={self.alpha}",
                f"batch_size={self.batch_size}",
                f"log_every={max(1, min(10, self.steps // 10))}",
            ),
            steps=self.steps,
            checkpoints=self.checkpoints,
            tasks=(self.task,),
            held_out=self.held_out,
            episodes=self.episodes,
            videos=1,
            first_episode=EVALUATION_SEEDS[FIRST_STATE],
            horizon=self.horizon,
            image_size=self.image_size,
            teacher=TEACHER,
        )


def long(config: QuickstartConfig) -> QuickstartConfig:
    """Enough training to solve the task, and the arm that shows whether the right features matter."""
    first = config.seeds[0]
    return replace(
        config,
        arms=(*config.arms, "shuffled"),
        seeds=tuple(range(first, first + 5)),
        demos=32,
        held_out=0.25,
        steps=1600,
        episodes=20,
    )


def smoke(output: Path) -> QuickstartConfig:
    """Every stage at toy size, for CI: its numbers mean nothing."""
    return QuickstartConfig(
        output=output, seeds=(200, 201), demos=4, held_out=0.25, noise=0.0, steps=20, episodes=2, horizon=20
    )


def run_quickstart(config: QuickstartConfig, console: Console | None = None) -> Path:
    """Record, compare, probe, report; returns the page.

    Interrupted at any moment, the same call resumes; a second call reuses everything.

    Raises:
        SpatialForcingError: LIBERO or a GL library is missing (with the command that installs it), no disk
            space, a failed training process, `config.output` holds a quickstart of other settings, ...
    """
    console = console or Console()
    ensure_assets()
    check_folder(config.comparison)
    page, result = config.output / PAGE, config.output / RESULT
    before = json.loads(result.read_text()) if page.exists() and result.exists() else None
    console.print(f"rendering with {ensure_gl()}; everything goes to {config.output}", style="dim")
    started = time.monotonic()
    with stage("1. demonstrations", console):
        dataset = Dataset.open(record(config.demonstrations))
        console.print(f"   {dataset.root}: {len(dataset.episodes)} episodes, {len(dataset)} frames")
        write_json(config.output / SETTINGS, to_file(config, config.output))
    with stage("2. features, training, evaluation", console):
        found = compare(config.comparison, console)
    with stage("3. depth probe and report", console):
        if before != json.loads(result.read_text()):
            _write(config, found)
    console.print(f"Report: [bold]{page}[/] after {(time.monotonic() - started) / 60:.1f} minutes")
    return page


def rebuild_report(folder: Path) -> Path:
    """Make the page of a finished quickstart again, and nothing else; the folder may have been moved.

    Raises:
        ConfigError: `folder` is not a finished quickstart's.
    """
    settings = folder / SETTINGS
    if not settings.exists():
        raise ConfigError(f"{settings} does not exist; give the --output of a quickstart.")
    config = replace(from_file(QuickstartConfig, json.loads(settings.read_text()), folder), output=folder)
    return _write(config, reread(config.comparison))


@contextmanager
def stage(name: str, console: Console) -> Iterator[None]:
    """Print a heading, then how long the stage took."""
    console.print(f"[bold]{name}[/]")
    started = time.monotonic()
    yield
    console.print(f"   {time.monotonic() - started:.0f} s", style="dim")


def _write(config: QuickstartConfig, found: Comparison) -> Path:
    """Probe the final policies and write the page; takes about half a minute."""
    runs = [Run(cell, train_config(config.comparison, cell)) for cell in cells(config.comparison)]
    students = {run.cell.name: load_student(run.policy(config.steps)) for run in runs}
    dataset, teacher = Dataset.open(config.demonstrations.root), load_teacher(TEACHER)
    forced = next(run.train for run in runs if run.train.forces)
    untrained = cast(Student, make_student(forced, dataset))
    layer = resolve_pairs(forced.forcing, len(untrained.blocks), {"": teacher.depth})[0].blocks
    tests = hold_out(dataset, config.held_out)[1]
    with one_thread():  # small models: a second thread gains little, and loses much beside other work
        probed = probe_depth(
            students,
            dataset,
            layers=range(len(untrained.blocks) + 1),
            floors={RANDOM: untrained},
            teacher=teacher,
            frames=PROBE_FRAMES,
            test_episodes=tests,
        )
    first = {run.cell.name: run.cell.arm.title for run in runs if run.cell.seed == config.seeds[0]}
    names = {
        MEAN_IMAGE: "mean depth image (floor)",
        RANDOM: f"{RANDOM} (floor)",
        **first,
        CEILING: "teacher (ceiling)",
    }
    shown = {"before training": untrained, **{title: students[name] for name, title in first.items()}}
    return write_page(
        config.comparison,
        replace(found, depth=depth_contrasts(probed, runs, layer, config.comparison.control_titles)),
        title="Spatial Forcing quickstart",
        notes=(*NOTES, *_more(config)),
        sections=(
            probe_section(probed, arms={run.cell.name: run.cell.arm.title for run in runs}, names=names),
            _features(shown, teacher, dataset, tests, layer),
        ),
        commands=(f"spatial-forcing quickstart --output {config.output}",),
        settings={"quickstart": to_plain(config)},
    )


def _more(config: QuickstartConfig) -> tuple[str, ...]:
    if len(config.arms) > 2:
        return ()
    return (
        "In so few steps these policies hardly solve the task, with or without alignment. With --long, an "
        "estimated three quarters of an hour, they do: in the confirmation of that setting, on eight other "
        "training seeds, 86 % of the episodes with alignment against 29 % without. It has five seeds, and an "
        "arm that is aligned with the features of other frames.",
    )


def depth_contrasts(
    probed: ProbeResult, runs: list[Run], layer: int, controls: tuple[str, ...]
) -> tuple[Contrast, ...]:
    """Depth error at the aligned layer, mean over cameras: arms against controls, paired by training seed.

    Args:
        probed: every run's policy under its cell's name.
        runs: of all arms and seeds.
        layer: blocks before the tap.
        controls: titles of the arms that the others are compared with.
    """
    rows = {m.name: m.per_episode for m in probed.metrics if m.layer == layer and m.camera == "all"}
    groups: dict[tuple[str, float], dict[int, Outcomes]] = {}
    for run in runs:
        errors = {("held out", number): value for number, value in enumerate(rows[run.cell.name])}
        groups.setdefault((run.cell.arm.title, run.cell.fraction), {})[run.cell.seed] = errors
    return corrected_contrasts(groups, on_the_same_data(groups, controls), paired_error, DEPTH)


def _features(
    students: Mapping[str, Student], teacher: Teacher, dataset: Dataset, episodes: list[int], layer: int
) -> Section:
    """Tokens of the aligned layer of students by name, and the teacher's, in a few frames of the episodes."""
    cameras = student_cameras(next(iter(students.values())), dataset)
    held = [dataset.episodes[number] for number in episodes]
    index = np.concatenate([np.arange(e.start, e.start + e.length) for e in held])
    chosen = np.unique(np.linspace(0, len(index) - 1, PCA_FRAMES).round().astype(int))
    frames = Frames.read(dataset, index[chosen].tolist(), cameras)
    features = {
        name: student_features(student, frames, [layer])[layer].flatten(0, 1)
        for name, student in students.items()
    }
    features["teacher"] = teacher_features(teacher, frames).flatten(0, 1)
    shown = np.linspace(0, len(frames) - 1, PCA_SHOWN + 2).round().astype(int)[1:-1]
    rows = [int(i) * len(cameras) + v for i in shown for v in range(len(cameras))]
    images = {
        f"{camera}, frame {int(frames.index[i])}": frames.images[camera][i]
        for i in shown
        for camera in cameras
    }
    return Section(
        key="features",
        title="Features",
        text=(
            f"Visual tokens after block {layer}, where they are aligned: their first three principal "
            f"components as red, green and blue, fitted over {len(frames)} held-out frames of all cameras, "
            "turned to agree best with the teacher's, and drawn on the teacher's grid. Like things have like "
            "colours.",
        ),
        pictures=pca_rows(images, pca_pictures(features, "teacher", rows)),
    )
