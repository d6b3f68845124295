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
from typing import Any, cast

from rich.console import Console

from spatial_forcing.analysis.features import Frames, student_cameras, student_features, teacher_features
from spatial_forcing.analysis.pictures import pca_pictures
from spatial_forcing.analysis.probe import MEAN_IMAGE, probe_depth
from spatial_forcing.analysis.probe import TEACHER as CEILING
from spatial_forcing.analysis.probe_page import probe_section
from spatial_forcing.analysis.report import Section, pca_rows
from spatial_forcing.data import Dataset
from spatial_forcing.data.record import RecordConfig, record
from spatial_forcing.envs.base import EVALUATION_SEEDS
from spatial_forcing.envs.gl import ensure_gl
from spatial_forcing.errors import ConfigError
from spatial_forcing.experiments.checks import check_folder
from spatial_forcing.experiments.config import CompareConfig, cells, train_config
from spatial_forcing.experiments.report import PAGE, write_page
from spatial_forcing.experiments.run import RESULT, Run, compare, reread
from spatial_forcing.experiments.statistics import Comparison
from spatial_forcing.forcing.config import resolve_pairs
from spatial_forcing.nano_teacher.tasks import check_held_out
from spatial_forcing.protocols import Student, Teacher
from spatial_forcing.storage import write_json
from spatial_forcing.students import load_student
from spatial_forcing.teachers import load_teacher
from spatial_forcing.training import QUICKSTART_TASKS
from spatial_forcing.training.fields import from_plain, to_plain
from spatial_forcing.training.parts import make_student

PRESET, TEACHER = "nano-metaworld", "vggt-nano"
CONTROL, FORCED, BLIND = "alpha0", "SF", "blind"
ARMS = (CONTROL, f"{FORCED}=sf", BLIND)
SETTINGS = "quickstart.json"
DEMONSTRATIONS, SCENES = "demonstrations", "probe-scenes"
PROBE_FIRST_SEED = 5_000
"""Scenes of the depth probe: apart from the demonstrations' seeds, which start at 0."""
RANDOM = "random weights"
PCA_FRAMES = 3
NOTES = (
    "The teacher, vggt-nano, was pretrained on rendered scenes of other tasks with other objects.",
    "On Meta-World the policies see two images, the instruction, and the hand's position and gripper; "
    "never the positions of objects or goals.",
    "See studies/quickstart for several training seeds.",
)


@dataclass(frozen=True)
class QuickstartConfig:
    """What the quickstart does; the defaults take about ten minutes on two idle cores.

    Attributes:
        output: folder of everything that is made; run again with it to resume or to reuse.
        tasks: Meta-World tasks.
        demos: expert demonstrations of each task.
        noise: disturbance of the demonstrations (`RecordConfig.noise`). Without it a policy that uses its
            images drifts away from the few states that it has seen, and one that is blind does better.
        steps: optimizer steps of each arm.
        evaluations: checkpoints that are evaluated, evenly spaced, the last one included.
        episodes: evaluation episodes of each task at the last checkpoint; half as many at earlier ones.
        horizon: steps after which an evaluation episode has failed.
        image_size: pixels on a side that the cameras render; the nano student's own, so nothing is resized.
        probe_demos: episodes of each task with depth, for the depth probe.
        seed: of initial weights and batches, the same in every arm.
        workers: simulator processes while demonstrations are recorded.
    """

    output: Path = Path("quickstart")
    tasks: tuple[str, ...] = QUICKSTART_TASKS
    demos: int = 15
    noise: float = 0.5
    steps: int = 720
    evaluations: int = 2
    episodes: int = 16
    horizon: int = 200
    image_size: int = 96
    probe_demos: int = 3
    seed: int = 0
    workers: int = os.cpu_count() or 1

    def __post_init__(self) -> None:
        counts = ("demos", "steps", "evaluations", "episodes", "horizon", "image_size", "probe_demos")
        for name in (*counts, "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"quickstart.{name} is {getattr(self, name)}; expected at least 1.")
        if self.steps % self.evaluations:
            raise ConfigError(
                f"quickstart.steps is {self.steps}, which is not a multiple of evaluations "
                f"({self.evaluations}); change one of them."
            )

    @property
    def demonstrations(self) -> RecordConfig:
        """What the policies are trained on."""
        return self._recording(DEMONSTRATIONS, episodes_per_task=self.demos, noise=self.noise)

    @property
    def scenes(self) -> RecordConfig:
        """Scenes with depth that no student is trained on."""
        return self._recording(
            SCENES, episodes_per_task=self.probe_demos, first_seed=PROBE_FIRST_SEED, depth=True
        )

    def _recording(self, folder: str, **settings: Any) -> RecordConfig:
        return RecordConfig(
            root=self.output / folder,
            tasks=self.tasks,
            image_size=self.image_size,
            workers=self.workers,
            **settings,
        )

    @property
    def comparison(self) -> CompareConfig:
        """The specification that `compare` runs."""
        return CompareConfig(
            dataset=self.output / DEMONSTRATIONS,
            output=self.output,
            arms=ARMS,
            seeds=(self.seed,),
            preset=PRESET,
            set=(f"log_every={max(1, min(10, self.steps // 10))}",),
            steps=self.steps,
            checkpoints=self.evaluations,
            tasks=self.tasks,
            episodes=self.episodes,
            early_episodes=max(1, self.episodes // 2),
            videos=1,
            first_episode=EVALUATION_SEEDS[0] + 1_000 * self.seed,  # apart from other seeds' episodes
            horizon=self.horizon,
            image_size=self.image_size,
            teacher=TEACHER,
            parallel=len(ARMS),  # with one arm a core, the last of three would leave a core idle
        )


def smoke(output: Path) -> QuickstartConfig:
    """Every stage at toy size, for CI: its numbers mean nothing."""
    return QuickstartConfig(
        output=output,
        tasks=QUICKSTART_TASKS[:2],
        demos=2,
        steps=20,
        episodes=2,
        horizon=40,
        probe_demos=2,
    )


def run_quickstart(config: QuickstartConfig, console: Console | None = None) -> Path:
    """Record, compare, probe, report; returns the page.

    Interrupted at any moment, the same call resumes; a second call reuses everything.

    Raises:
        SpatialForcingError: no GL library (with the apt line), no disk space, a failed training process,
            `config.output` holds a quickstart of other settings, ...
    """
    console = console or Console()
    check_held_out(config.tasks)
    check_folder(config.comparison)
    page, result = config.output / PAGE, config.output / RESULT
    before = json.loads(result.read_text()) if page.exists() and result.exists() else None
    console.print(f"rendering with {ensure_gl()}; everything goes to {config.output}", style="dim")
    with stage("1. demonstrations and probe scenes", console):
        for recording in (config.demonstrations, config.scenes):
            dataset = Dataset.open(record(recording))
            console.print(f"   {recording.root}: {len(dataset.episodes)} episodes, {len(dataset)} frames")
        write_json(config.output / SETTINGS, to_plain(config))
    with stage("2. features, training, evaluation", console):
        found = compare(config.comparison, console)
    with stage("3. depth probe and report", console):
        if before != json.loads(result.read_text()):
            _write(config, found)
    console.print(f"Report: [bold]{page}[/]")
    return page


def rebuild_report(folder: Path) -> Path:
    """Make the page of a finished quickstart again, and nothing else; the folder may have been moved.

    Raises:
        ConfigError: `folder` is not a finished quickstart's.
    """
    settings = folder / SETTINGS
    if not settings.exists():
        raise ConfigError(f"{settings} does not exist; give the --output of a quickstart.")
    config = replace(from_plain(QuickstartConfig, json.loads(settings.read_text())), output=folder)
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
    runs = {
        cell.arm.name: Run(cell, train_config(config.comparison, cell)) for cell in cells(config.comparison)
    }
    students = {name: load_student(runs[name].policy(config.steps)) for name in (CONTROL, FORCED)}
    dataset, teacher = Dataset.open(config.scenes.root), load_teacher(TEACHER)
    forced = runs[FORCED].train
    untrained = cast(Student, make_student(forced, dataset))
    layer = resolve_pairs(forced.forcing.pairs, len(untrained.blocks), teacher.depth)[0][0]
    return write_page(
        config.comparison,
        found,
        title="Spatial Forcing quickstart",
        notes=NOTES,
        sections=(
            _probe(students, untrained, teacher, dataset),
            _features(students, untrained, teacher, dataset, layer),
        ),
        commands=(
            f"spatial-forcing quickstart --output {config.output} --seed {config.seed} "
            f"--steps {config.steps} --demos {config.demos} --episodes {config.episodes}",
        ),
        settings={"quickstart": to_plain(config)},
    )


def _probe(
    students: Mapping[str, Student], untrained: Student, teacher: Teacher, dataset: Dataset
) -> Section:
    layers = range(len(untrained.blocks) + 1)
    result = probe_depth(students, dataset, layers=layers, floors={RANDOM: untrained}, teacher=teacher)
    names = {MEAN_IMAGE: "mean depth image", RANDOM: RANDOM, **{n: n for n in students}, CEILING: "teacher"}
    return probe_section(result, names)


def _features(
    students: Mapping[str, Student], untrained: Student, teacher: Teacher, dataset: Dataset, layer: int
) -> Section:
    """Tokens of the aligned layer before training, after it without and with forcing, and the teacher's."""
    cameras = student_cameras(untrained, dataset)
    of_each_task = {e.task: e.start + e.length // 2 for e in dataset.episodes}
    frames = Frames.read(dataset, list(of_each_task.values())[:PCA_FRAMES], cameras)
    features = {
        f"{name}, after block {layer}": student_features(student, frames, [layer])[layer].flatten(0, 1)
        for name, student in {"before training": untrained, **students}.items()
    }
    features["teacher"] = teacher_features(teacher, frames).flatten(0, 1)
    images = {
        f"{frames.tasks[i]} ({camera})": frames.images[camera][i]
        for i in range(len(frames))
        for camera in cameras
    }
    return Section(
        key="features",
        title="Features",
        text=(
            "The first three principal components as red, green and blue, fitted over all pictures of a "
            "column; order and signs follow the last column's, so like structure has like colours.",
        ),
        pictures=pca_rows(images, pca_pictures(features, "teacher")),
    )
