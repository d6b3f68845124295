"""`spatial-forcing probe`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import cast

import tyro
from rich.console import Console
from rich.progress import TaskID
from rich.table import Table
from torch import nn

from spatial_forcing.analysis.features import predicted_depth, randomised
from spatial_forcing.analysis.layers import suggest_layer
from spatial_forcing.analysis.probe import DepthSource, ProbeMetrics, probe_depth
from spatial_forcing.analysis.probe_page import metrics_csv, probe_page
from spatial_forcing.analysis.readout import Head
from spatial_forcing.analysis.report import write_report
from spatial_forcing.data import Dataset
from spatial_forcing.data.info import parse_keys
from spatial_forcing.errors import ConfigError
from spatial_forcing.progress import progress_bar
from spatial_forcing.protocols import Student
from spatial_forcing.storage import write_json
from spatial_forcing.students import load_student
from spatial_forcing.teachers import load_teacher
from spatial_forcing.teachers.frozen import SceneTeacher


@dataclass(frozen=True)
class ProbeOptions:
    """The policies, the scenes and the settings of the probe.

    Attributes:
        policies: folders of saved policies.
        dataset: LeRobot v3.0 dataset with depth (`data record --depth`).
        keys: `NAME=FEATURE` where the dataset calls a feature otherwise.
        layers: decoder blocks before the tap; default all.
        teacher: whose features are the ceiling; "none" leaves it out.
        heads: readouts: `linear`, and `dpt`, which also uses neighbouring tokens and takes minutes.
        depth_from: a VGGT whose own depth is to be found, for real images; none: the dataset's depth.
        random_floor: also probe each policy's architecture with random weights.
        frames: used at most.
        clip: metres; depth beyond counts as that.
        output: also write metrics as JSON and CSV, and a page with curves and panels, into this folder.
    """

    policies: tuple[Path, ...]
    dataset: Path
    keys: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    teacher: str = "vggt-nano"
    heads: tuple[Head, ...] = ("linear",)
    depth_from: str | None = None
    random_floor: bool = True
    frames: int = 2000
    clip: float = 3.0
    output: Path | None = None


def probe(options: tyro.conf.OmitArgPrefixes[ProbeOptions]) -> None:
    """How much depth a linear readout finds in frozen visual tokens, on held-out episodes."""
    if not options.policies:
        raise ConfigError("--policies is empty; name at least one folder of a saved policy.")
    students = {str(folder): load_student(folder) for folder in options.policies}
    depth = min(len(student.blocks) for student in students.values())
    with progress_bar(console=Console()) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        dataset = Dataset.open(options.dataset, keys=parse_keys(options.keys))
        result = probe_depth(
            students,
            dataset,
            layers=options.layers or range(depth + 1),
            floors=_floors(students) if options.random_floor else None,
            teacher=None if options.teacher == "none" else load_teacher(options.teacher, dataset=dataset),
            heads=options.heads,
            depth_source=_depth_source(options.depth_from),
            frames=options.frames,
            clip=options.clip,
            progress=show,
        )
    console = Console()
    console.print(_table(result.metrics))
    suggestions = {}
    for name, student in students.items():
        suggestion = suggest_layer(result.metrics, name, len(student.blocks))
        if suggestion is None:
            text = f"no layer to align is suggested; probe some of 1..{len(student.blocks) - 1}."
        else:
            suggestions[name] = suggestion
            text = f"align layer [bold]{suggestion.layer}[/]: {suggestion.reason}"
        console.print(f"{name}: {text}", highlight=False)
    if options.output is not None:
        plain = result.to_json() | {"suggestions": {name: asdict(s) for name, s in suggestions.items()}}
        write_json(options.output / "probe.json", plain)
        page = probe_page(result, suggestions, str(options.dataset))
        (options.output / "probe.csv").write_text(metrics_csv(result.metrics), encoding="utf-8")
        console.print(f"page: {write_report(page, options.output / 'probe.html')}")


def _floors(students: Mapping[str, Student]) -> dict[str, Student]:
    """Each policy's architecture with its weights shuffled."""
    floors = {}
    for name, student in students.items():
        if isinstance(student, nn.Module):
            floors[f"random weights ({name})"] = cast(Student, randomised(student))
    return floors


def _depth_source(teacher: str | None) -> DepthSource | None:
    if teacher is None:
        return None
    loaded = load_teacher(teacher, heads=True)
    if not isinstance(loaded, SceneTeacher):
        raise ConfigError(
            f"{teacher!r} predicts no depth; name a VGGT or a Depth Anything 3 for --depth-from."
        )
    return partial(predicted_depth, loaded)


def _table(metrics: tuple[ProbeMetrics, ...]) -> Table:
    table = Table(title="Depth probe, held-out episodes, all cameras")
    for column in (
        "features",
        "readout",
        "layer",
        "AbsRel",
        "RMSE (m)",
        "delta < 1.25",
        "AbsRel where depth changes",
    ):
        table.add_column(column, justify="left" if column in ("features", "readout") else "right")
    for m in metrics:
        if m.camera != "all":
            continue
        changing = "-" if m.abs_rel_changing is None else f"{m.abs_rel_changing:.4f}"
        layer = "-" if m.layer is None else str(m.layer)
        table.add_row(m.name, m.head, layer, f"{m.abs_rel:.4f}", f"{m.rmse:.4f}", f"{m.delta:.4f}", changing)
    return table
