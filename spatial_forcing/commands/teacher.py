"""`spatial-forcing teacher list | pretrain | evaluate`."""

from __future__ import annotations

from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from spatial_forcing.errors import ConfigError
from spatial_forcing.nano_teacher.evaluate import evaluate_teacher, metrics_table
from spatial_forcing.nano_teacher.pretrain import pretrain as run_pretraining
from spatial_forcing.nano_teacher.pretrain import render_with_progress
from spatial_forcing.nano_teacher.recipe import PretrainConfig
from spatial_forcing.nano_teacher.scenes import SceneDataset
from spatial_forcing.progress import progress_bar
from spatial_forcing.teachers import TEACHERS, load_teacher
from spatial_forcing.teachers.vggt import VGGTTeacher


def list_teachers() -> None:
    """The teachers that can be named, with the licences of their weights."""
    table = Table(box=None)
    for column in ("name", "licence of the weights", "note", "for commercial use"):
        table.add_column(column)
    for name, card in TEACHERS.items():
        table.add_row(name, card.licence, card.note, card.commercial_alternative or "the same")
    Console().print(table)


def pretrain(config: tyro.conf.OmitArgPrefixes[PretrainConfig]) -> None:
    """Render multi-view scenes and train vggt-nano on them; the same command resumes."""
    run_pretraining(config)


def evaluate(teacher: str = "vggt-nano", scenes: Path = Path("runs/teacher-test-scenes")) -> None:
    """Depth and pose metrics on rendered scenes of tasks and cameras that pretraining never saw.

    Args:
        teacher: a name, checkpoint folder or hub id; it must have camera and depth heads.
        scenes: folder for the rendered test scenes; reused when they are there.
    """
    loaded = load_teacher(teacher, heads=True)
    if not isinstance(loaded, VGGTTeacher):
        raise ConfigError(f"{teacher!r} is not a VGGT: it has no depth and camera heads to evaluate.")
    recipe = PretrainConfig()
    for title, spec in (("random", recipe.test_spec), ("policy", recipe.policy_test_spec)):
        with progress_bar() as progress:
            render_with_progress(scenes / title, spec, progress, f"scenes, {title} cameras")
        metrics = evaluate_teacher(loaded.model, SceneDataset(scenes / title))
        Console().print(metrics_table(metrics, f"{teacher}, {title} cameras"))
