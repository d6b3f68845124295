"""`spatial-forcing analyse`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console

from spatial_forcing.analysis.features import Frames, student_cameras
from spatial_forcing.analysis.report import ReportData, write_report
from spatial_forcing.analysis.representation import load_projector
from spatial_forcing.analysis.run_page import audit_section, represent, representation_section
from spatial_forcing.commands.train import read_config
from spatial_forcing.errors import CheckpointError
from spatial_forcing.forcing.config import resolve_pairs
from spatial_forcing.storage import write_json
from spatial_forcing.students import load_student
from spatial_forcing.teachers import load_teacher
from spatial_forcing.teachers.cache.format import CacheHeader
from spatial_forcing.teachers.controls import SHUFFLED
from spatial_forcing.training import TrainConfig, read_metrics
from spatial_forcing.training.checkpoint import latest_checkpoint
from spatial_forcing.training.config import TeacherSource
from spatial_forcing.training.parts import open_dataset
from spatial_forcing.training.run import CHECKPOINTS


@dataclass(frozen=True)
class AnalyseOptions:
    """The run and the frames that are analysed.

    Attributes:
        run: a training run (with `audit_every` its page shows the gradient audit, too).
        dataset: frames to look at; none: the run's own. Prefer frames that the run was not trained on.
        teacher: whose layers are compared; none: the run's, or vggt-nano.
        frames: evenly over the dataset.
        maps: draw t-SNE and PCA maps (t-SNE needs scikit-learn).
        output: folder of the page and its numbers; none: the run's.
    """

    run: Path
    dataset: Path | None = None
    teacher: str | None = None
    frames: int = 60
    maps: bool = True
    output: Path | None = None


def analyse(options: tyro.conf.OmitArgPrefixes[AnalyseOptions]) -> None:
    """Why a run turned out as it did: gradient audit, rank and collapse, CKA over layers, t-SNE and PCA."""
    config = TrainConfig.from_file(
        read_config(
            options.run / "config.json", "give the folder of a training run (of a comparison: runs/ARM-seedN)"
        ),
        options.run,
    )
    checkpoint, _ = latest_checkpoint(options.run / CHECKPOINTS)
    if checkpoint is None:
        raise CheckpointError(f"{options.run / CHECKPOINTS} holds no complete checkpoint; train first.")
    student = load_student(checkpoint.policy)
    used = {_name_of(source): source.label for source in config.sources}
    named = options.teacher or next(iter(used), config.teacher or "vggt-nano")
    dataset = open_dataset(replace(config, dataset=options.dataset or config.dataset))
    teacher = load_teacher(named, dataset=dataset)
    index = np.unique(np.linspace(0, len(dataset) - 1, options.frames).astype(int)).tolist()
    frames = Frames.read(dataset, index, student_cameras(student, dataset))
    label = used.get(named, next(iter(used.values()), ""))
    depths = dict.fromkeys(used.values(), teacher.depth) or {"": teacher.depth}
    pairs = resolve_pairs(config.forcing, len(student.blocks), depths)
    layer = next(pair.blocks for pair in pairs if pair.label == label)
    projector = load_projector(checkpoint.folder, label)
    found, shown = represent(student, teacher, frames, aligned=layer, projector=projector)
    audit = audit_section(read_metrics(options.run))
    sections = (representation_section(found, shown, frames, maps=options.maps),)
    folder = options.output or options.run
    page = ReportData(
        title="Analysis of a run",
        subtitle=f"{options.run}, step {checkpoint.step}; teacher {named}; {len(frames)} frames of "
        f"{dataset.root}",
        sections=((audit,) if audit is not None else ()) + sections,
        config={"run": config.to_plain()},
        commands=(f"spatial-forcing analyse --run {options.run}",),
    )
    write_json(folder / "analysis.json", asdict(found))
    console = Console()
    console.print(found.verdict, highlight=False)
    if audit is None:
        console.print(
            "no gradient audit was logged: train with --audit-every N (none at alpha 0)", highlight=False
        )
    console.print(f"page: {write_report(page, folder / 'analysis.html')}")


def _name_of(source: TeacherSource) -> str:
    if source.teacher is not None:
        return source.teacher.removeprefix(SHUFFLED)
    assert source.cache is not None
    return CacheHeader.load(source.cache).teacher.name
