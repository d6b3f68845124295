"""`spatial-forcing probe`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from spatial_forcing.analysis.probe import ProbeMetrics, probe_depth
from spatial_forcing.data import Dataset
from spatial_forcing.errors import ConfigError
from spatial_forcing.storage import write_json
from spatial_forcing.students import load_student
from spatial_forcing.teachers import load_teacher


@dataclass(frozen=True)
class ProbeOptions:
    """What is probed, and on which scenes.

    Attributes:
        policies: folders of saved policies.
        dataset: LeRobot v3.0 dataset with depth (`data record --depth`).
        layers: decoder blocks before the tap; default all.
        teacher: whose features are the ceiling; "none" leaves it out.
        frames: used at most.
        output: also write the metrics here, as JSON.
    """

    policies: tuple[Path, ...]
    dataset: Path
    layers: tuple[int, ...] = ()
    teacher: str = "vggt-nano"
    frames: int = 2000
    output: Path | None = None


def probe(options: tyro.conf.OmitArgPrefixes[ProbeOptions]) -> None:
    """How much depth a linear readout finds in frozen visual tokens, on held-out episodes."""
    if not options.policies:
        raise ConfigError("--policies is empty; name at least one folder of a saved policy.")
    students = {str(folder): load_student(folder) for folder in options.policies}
    depth = min(len(student.blocks) for student in students.values())
    with Progress() as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        result = probe_depth(
            students,
            Dataset.open(options.dataset),
            layers=options.layers or range(depth + 1),
            teacher=None if options.teacher == "none" else load_teacher(options.teacher),
            frames=options.frames,
            progress=show,
        )
    console = Console()
    console.print(_table(result.metrics))
    if options.output is not None:
        write_json(options.output, result.to_json())
        console.print(f"metrics: {options.output}")


def _table(metrics: tuple[ProbeMetrics, ...]) -> Table:
    table = Table(title="Depth probe, held-out episodes, all cameras")
    for column in ("features", "layer", "AbsRel", "RMSE (m)", "delta < 1.25", "AbsRel where depth changes"):
        table.add_column(column, justify="left" if column == "features" else "right")
    for m in metrics:
        if m.camera != "all":
            continue
        changing = "-" if m.abs_rel_changing is None else f"{m.abs_rel_changing:.4f}"
        layer = "-" if m.layer is None else str(m.layer)
        table.add_row(m.name, layer, f"{m.abs_rel:.4f}", f"{m.rmse:.4f}", f"{m.delta:.4f}", changing)
    return table
