"""`spatial-forcing teacher list | pretrain | evaluate`."""

from __future__ import annotations

from dataclasses import asdict
from json import dumps
from pathlib import Path
from textwrap import wrap
from typing import Any

import tyro
from rich.console import Console

from spatial_forcing.errors import ConfigError
from spatial_forcing.nano_teacher.evaluate import evaluate_teacher, metrics_table
from spatial_forcing.nano_teacher.pretrain import pretrain as run_pretraining
from spatial_forcing.nano_teacher.pretrain import render_with_progress
from spatial_forcing.nano_teacher.recipe import PretrainConfig
from spatial_forcing.nano_teacher.scenes import SceneDataset
from spatial_forcing.progress import progress_bar
from spatial_forcing.teachers import TEACHERS, TeacherCard, load_teacher
from spatial_forcing.teachers.vggt import VGGTTeacher

WIDTH = 80


def list_teachers(json: bool = False) -> None:
    """The teachers that can be named, whether a company may use them, and what they cost.

    Args:
        json: print a list of objects instead.
    """
    if json:
        print(dumps([_plain(card) for card in TEACHERS.values()], indent=1))
        return
    for card in TEACHERS.values():
        print(card.name)  # on a line of its own, so that it can be copied
        print(f"    commercial use: {card.commercial} ({card.licence})")
        if card.facts is not None:
            f = card.facts
            views = "views together" if f.together else "each view alone"
            cost = "cost not measured" if f.cost is None else f"cost {f.cost:.2g} of VGGT-1B's"
            print(f"    {views}, {f.parameters:g} M, {f.channels} channels, {f.pixels} px, {cost}")
        for line in wrap(card.note, WIDTH - 4):
            print(f"    {line}")


def _plain(card: TeacherCard) -> dict[str, Any]:
    return {
        "name": card.name, "licence": card.licence, "commercial_use": card.commercial, "note": card.note,
        "commercial_alternative": card.commercial_alternative,
        **({} if card.facts is None else asdict(card.facts)),
    }  # fmt: skip


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
