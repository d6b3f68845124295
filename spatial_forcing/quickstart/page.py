"""The quickstart's report: depth probe, feature pictures, videos and everything that was run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from spatial_forcing.analysis.features import Frames, student_features, teacher_features
from spatial_forcing.analysis.pictures import pca_pictures
from spatial_forcing.analysis.probe import MEAN_IMAGE, TEACHER, probe_depth
from spatial_forcing.analysis.report_data import Arm, Media, PictureRow, ProbeReport, ReportData, pca_rows
from spatial_forcing.data import Dataset
from spatial_forcing.errors import CheckpointError
from spatial_forcing.evaluation.results import EpisodeResult
from spatial_forcing.forcing.config import resolve_pairs
from spatial_forcing.protocols import Teacher
from spatial_forcing.quickstart.config import ARMS, BLIND, CONTROL, FORCED, QuickstartConfig
from spatial_forcing.quickstart.config import TEACHER as QUICKSTART_TEACHER
from spatial_forcing.students import load_student
from spatial_forcing.students.base import POLICY
from spatial_forcing.teachers import load_teacher
from spatial_forcing.training import TrainConfig, read_metrics
from spatial_forcing.training.checkpoint import checkpoint_name
from spatial_forcing.training.parts import make_student
from spatial_forcing.training.run import CHECKPOINTS, ENVIRONMENT, METRICS

RANDOM = "random weights"
PCA_FRAMES = 3


@dataclass(frozen=True)
class Evaluated:
    """All evaluated episodes by arm, and the file that holds them (videos lie beside it)."""

    file: Path
    episodes: Mapping[str, list[EpisodeResult]]

    def at(self, step: int) -> dict[str, list[EpisodeResult]]:
        """The episodes of one checkpoint."""
        return {name: [e for e in rows if e.tags["step"] == step] for name, rows in self.episodes.items()}


def policy_at(arm: TrainConfig, step: int) -> Path:
    """The policy of a run after `step` steps. Raises `CheckpointError` when it is not there."""
    folder = arm.output / CHECKPOINTS / checkpoint_name(step) / POLICY
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist; delete {arm.output} and run again.")
    return folder


def build_page(
    config: QuickstartConfig,
    arms: Mapping[str, TrainConfig],
    evaluated: Evaluated,
    scenes: Path,
    seconds: Mapping[str, float],
) -> ReportData:
    """Probe the final policies and put everything together; takes about half a minute."""
    dataset = Dataset.open(scenes)
    probed = {name: arms[name] for name in (CONTROL.name, FORCED.name)}
    students = {name: load_student(policy_at(arm, config.steps)) for name, arm in probed.items()}
    untrained = make_student(arms[FORCED.name], dataset)
    teacher = load_teacher(QUICKSTART_TEACHER)
    layer = _aligned_layer(arms[FORCED.name], untrained, teacher)
    return ReportData(
        title="Spatial Forcing quickstart",
        subtitle=f"{len(config.tasks)} Meta-World tasks, {config.demos} demonstrations each, "
        f"{config.steps} steps, training seed {config.seed}",
        arms=tuple(
            Arm.of(
                arm.name,
                arm.description,
                evaluated.episodes[arm.name],
                read_metrics(arms[arm.name].output / METRICS),
            )
            for arm in ARMS
        ),
        control=CONTROL.name,
        treated=FORCED.name,
        blind=BLIND.name,
        notes=_notes(config),
        probe=_probe(students, untrained, teacher, dataset),
        pca=_pca(students, untrained, teacher, dataset, layer),
        videos=_videos(evaluated, config.steps),
        config={"quickstart": _plain(asdict(config)), **{name: arm.to_plain() for name, arm in arms.items()}},
        environment=json.loads((arms[FORCED.name].output / ENVIRONMENT).read_text())
        | {"stage_seconds": {name: round(value, 1) for name, value in seconds.items()}},
        commands=(
            "make quickstart",
            f"spatial-forcing quickstart --output {config.output} --seed {config.seed} "
            f"--steps {config.steps} --demos {config.demos} --episodes {config.episodes}",
        ),
    )


def _notes(config: QuickstartConfig) -> tuple[str, ...]:
    return (
        "One training seed: the intervals cover the choice of evaluation episodes, not that of the training "
        "seed. See studies/quickstart for several seeds.",
        "The arms start from the same weights and see the same batches in the same order; they are evaluated "
        f"on the same {config.episodes} episodes of each task, whose seeds no demonstration has.",
        "The teacher, vggt-nano, was pretrained on rendered scenes of other tasks with other objects.",
        "On Meta-World the policies see two images, the instruction, and the hand's position and gripper; "
        "never the positions of objects or goals.",
    )


def _aligned_layer(arm: TrainConfig, student: Any, teacher: Teacher) -> int:
    """Decoder blocks before the first tap of the forced arm."""
    return resolve_pairs(arm.forcing.pairs, len(student.blocks), teacher.depth)[0][0]


def _probe(
    students: Mapping[str, Any], untrained: nn.Module, teacher: Teacher, dataset: Dataset
) -> ProbeReport:
    depth = len(next(iter(students.values())).blocks)
    result = probe_depth(
        students,
        dataset,
        layers=range(depth + 1),
        floors={RANDOM: untrained},  # type: ignore[dict-item]
        teacher=teacher,
    )
    names = {MEAN_IMAGE: "mean depth image", RANDOM: RANDOM, **{n: n for n in students}, TEACHER: "teacher"}
    return ProbeReport.of(result, names)


def _pca(
    students: Mapping[str, Any], untrained: nn.Module, teacher: Teacher, dataset: Dataset, layer: int
) -> tuple[PictureRow, ...]:
    """Tokens of the aligned layer before training, after it without and with forcing, and the teacher's."""
    cameras = next(iter(students.values())).cameras
    picked = [e.start + e.length // 2 for e in _one_of_each_task(dataset)][:PCA_FRAMES]
    frames = Frames.read(dataset, picked, cameras)
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
    return pca_rows(images, pca_pictures(features, "teacher"))


def _one_of_each_task(dataset: Dataset) -> list[Any]:
    return list({e.task: e for e in dataset.episodes}.values())


def _videos(evaluated: Evaluated, step: int) -> tuple[Media, ...]:
    return tuple(
        Media.file(
            evaluated.file.parent / e.video,
            f"{name}: {e.task}, seed {e.seed}, {'success' if e.success else 'failure'}",
        )
        for name, rows in evaluated.at(step).items()
        if name != BLIND.name
        for e in rows
        if e.video is not None
    )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
