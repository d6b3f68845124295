"""`spatial-forcing teacher list | compare | pretrain | evaluate`."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import TaskID
from rich.table import Table

from spatial_forcing.analysis.report import Cell, write_report
from spatial_forcing.analysis.teachers import (
    COSTS,
    TeacherComparison,
    compare_teachers,
    content_rows,
    cost_rows,
    teachers_page,
)
from spatial_forcing.data import Dataset
from spatial_forcing.data.info import parse_keys
from spatial_forcing.errors import ConfigError
from spatial_forcing.nano_teacher.evaluate import evaluate_teacher, metrics_table
from spatial_forcing.nano_teacher.pretrain import pretrain as run_pretraining
from spatial_forcing.nano_teacher.pretrain import render_with_progress
from spatial_forcing.nano_teacher.recipe import PretrainConfig
from spatial_forcing.nano_teacher.scenes import SceneDataset
from spatial_forcing.progress import progress_bar
from spatial_forcing.protocols import Teacher
from spatial_forcing.storage import write_json
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


@dataclass(frozen=True)
class CompareTeachersOptions:
    """The teachers and the frames that they are compared on.

    Attributes:
        dataset: LeRobot v3.0 dataset; depth, intrinsics and extrinsics are used where it has them.
        teachers: names, folders or hub ids.
        output: folder of the page and of the numbers as JSON.
        keys: `NAME=FEATURE` where the dataset calls a feature otherwise.
        cameras: which of the dataset's, in order; default: all.
        frames: used at most, spread evenly over all episodes.
        layer: of every teacher, counted as in `forcing.pairs`.
        resolution: pixels on a side at which views are encoded; default: each teacher's own.
        dtype: float32, bfloat16 or float16.
        device: where teachers run.
        batch_size: frames in one call.
    """

    dataset: Path
    teachers: tuple[str, ...]
    output: Path = Path("runs/teachers")
    keys: tuple[str, ...] = ()
    cameras: tuple[str, ...] = ()
    frames: int = 48
    layer: int = -1
    resolution: int | None = None
    dtype: str = "float32"
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    batch_size: int = 4

    def __post_init__(self) -> None:
        if not self.teachers or len(set(self.teachers)) != len(self.teachers):
            raise ConfigError(f"--teachers is {self.teachers}; name one or more, each once.")
        if self.frames < 1 or self.batch_size < 1:
            raise ConfigError(
                f"--frames is {self.frames} and --batch-size {self.batch_size}; expected at least 1 each."
            )


def compare(options: tyro.conf.OmitArgPrefixes[CompareTeachersOptions]) -> None:
    """Several teachers on frames of your own data, side by side: cost, depth, agreement of views."""
    dataset = Dataset.open(options.dataset, keys=parse_keys(options.keys))

    def load(name: str) -> Teacher:
        return load_teacher(
            name,
            resolution=options.resolution,
            dtype=options.dtype,
            device=options.device,
            dataset=dataset,
        )

    with progress_bar(console=Console()) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        found = compare_teachers(
            options.teachers,
            load,
            dataset,
            cameras=options.cameras or None,
            frames=options.frames,
            layer=options.layer,
            batch_size=options.batch_size,
            progress=show,
        )
    numbers = {
        "measures": [asdict(m) for m in found.measures],
        "floor": None if found.floor is None else asdict(found.floor),
        "failed": dict(found.failed),
        "not_measured": list(found.without),
    }
    write_json(options.output / "teachers.json", numbers)
    named = shlex.join(options.teachers)
    command = f"spatial-forcing teacher compare --dataset {options.dataset} --teachers {named}"
    page = write_report(teachers_page(found, str(options.dataset), command), options.output / "teachers.html")
    _print_comparison(found)
    print(f"numbers: {options.output / 'teachers.json'}\npage: {page}")


def _print_comparison(found: TeacherComparison) -> None:
    """A table of 80 columns; names, which may be long, stand above it by number."""
    table = Table(title=f"{found.frames} frames of {', '.join(found.cameras)}")
    for name in ("", "ms", "peak MB", "cache MB", "AbsRel", "changing", "agree", "others", "const"):
        table.add_column(name, justify="right")
    costs, content = cost_rows(found), content_rows(found)
    for number, row in enumerate(content, 1):
        cost = costs[number - 1] if number <= len(costs) else (Cell.number(None),) * len(COSTS)
        print(f"{number}  {row[0].text}")
        chosen = (cost[2], cost[3], cost[4], row[1], row[3], row[4], row[5], row[6])
        table.add_row(str(number), *(cell.text for cell in chosen))
    Console().print(table)
    for name, reason in found.failed.items():
        print(f"{name} was not measured: {reason}")
    for each in found.without:
        print(f"not measured: {each}")


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
