"""The depth probe as a page of its own: curves over layers, panels, a table, the suggested layer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from spatial_forcing.analysis.charts import Series
from spatial_forcing.analysis.figures import Figure
from spatial_forcing.analysis.layers import LayerSuggestion
from spatial_forcing.analysis.pictures import depth_picture
from spatial_forcing.analysis.probe import DepthPanel, ProbeMetrics, ProbeResult
from spatial_forcing.analysis.report import Cell, Media, PictureRow, ReportData, Section, TableData
from spatial_forcing.errors import DataError
from spatial_forcing.evaluation.paired import mean_reach
from spatial_forcing.storage import csv_text

CURVES = (("abs_rel", "AbsRel", False), ("rmse", "RMSE, m", False), ("delta", "delta < 1.25", True))
KINDS = {"floor": " (floor)", "ceiling": " (ceiling)"}


def over_seeds(metrics: Sequence[ProbeMetrics], arms: Mapping[str, str]) -> tuple[ProbeMetrics, ...]:
    """The readouts of several training seeds as one of their arm: means, and their errors over the seeds.

    Args:
        metrics: of `probe_depth`.
        arms: title of the arm that a student belongs to; other readouts stay as they are.
    """
    groups: dict[tuple[Any, ...], list[ProbeMetrics]] = {}
    for m in metrics:
        groups.setdefault((arms.get(m.name, m.name), m.kind, m.layer, m.camera, m.head), []).append(m)
    return tuple(_mean(name, rows) for (name, *_), rows in groups.items())


def _mean(name: str, rows: Sequence[ProbeMetrics]) -> ProbeMetrics:
    if len(rows) == 1:
        return replace(rows[0], name=name)
    changing = [m.abs_rel_changing for m in rows if m.abs_rel_changing is not None]
    values = [m.abs_rel for m in rows]
    return replace(
        rows[0],
        name=name,
        abs_rel=float(np.mean(values)),
        abs_rel_error=float(np.std(values, ddof=1) / len(rows) ** 0.5),
        rmse=float(np.mean([m.rmse for m in rows])),
        delta=float(np.mean([m.delta for m in rows])),
        abs_rel_changing=float(np.mean(changing)) if changing else None,
        per_episode=tuple(float(np.mean(each)) for each in zip(*(m.per_episode for m in rows), strict=True)),
        seeds=len(rows),
    )


def _reach(m: ProbeMetrics) -> float:
    """Half of the 95 % interval of AbsRel, over training seeds or, of one seed, held-out episodes."""
    return 1.96 * m.abs_rel_error if m.seeds == 1 else mean_reach(m.abs_rel_error * m.seeds**0.5, m.seeds)


def _curves(metrics: Sequence[ProbeMetrics]) -> tuple[Figure, ...]:
    """Each metric over the student's layers; what has no layers is a level line."""
    return tuple(_curve(metrics, *curve) for curve in CURVES)


def _curve(metrics: Sequence[ProbeMetrics], field: str, title: str, percent: bool) -> Figure:
    rows = [m for m in metrics if m.camera == "all"]
    layers = sorted({m.layer for m in rows if m.layer is not None})
    several = len({m.head for m in rows}) > 1
    order = sorted(
        dict.fromkeys((m.name, m.kind, m.head) for m in rows),
        key=lambda key: ("student", "floor", "ceiling").index(key[1]),
    )
    series = []
    for number, (name, kind, head) in enumerate(order):
        mine = {m.layer: m for m in rows if (m.name, m.kind, m.head) == (name, kind, head)}
        level = mine.get(None)
        points = [(k, level or mine[k]) for k in layers if level is not None or k in mine]
        y = [float(getattr(m, field)) for _, m in points]
        reach = [_reach(m) if field == "abs_rel" and level is None else 0.0 for _, m in points]
        series.append(
            Series(
                f"{name}{KINDS.get(kind, '')}" + (f", {head}" if several else ""),
                number,
                [k for k, _ in points],
                y,
                [max(0.0, v - r) for v, r in zip(y, reach, strict=True)],
                [v + r for v, r in zip(y, reach, strict=True)],
            )
        )
    over = "training seeds" if any(m.seeds > 1 for m in rows) else "held-out episodes"
    text = f"lower is better; bands: 95 %, over {over}" if field == "abs_rel" else ""
    return Figure.lines(series, title, text, x_label="blocks before the tap", y_label=title, percent=percent)


def probe_section(
    result: ProbeResult,
    suggestions: Mapping[str, LayerSuggestion] | None = None,
    *,
    arms: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
) -> Section:
    """Depth over the layers, panels of predicted depth, and every readout in a table.

    Args:
        result: of `probe_depth`.
        suggestions: layers to align, by student.
        arms: title of the arm that a student belongs to; see `over_seeds`.
        names: selects, orders and renames the readouts of the panels.
    """
    metrics = over_seeds(result.metrics, arms or {})
    depths = np.concatenate([p.truth[p.truth > 0] for p in result.panels] or [np.array([0.1, 1.0])])
    near, far = float(np.percentile(depths, 1)), float(np.percentile(depths, 99))
    far = max(far, near * 1.05)
    said = [f"{name}: align layer {s.layer}: {s.reason}" for name, s in (suggestions or {}).items()]
    return Section(
        key="probe",
        title="Depth in the tokens",
        text=(
            *said,
            f"{_readouts(result)} from frozen tokens to log depth, fitted on {result.train_frames} frames "
            f"and measured on {result.test_frames} frames of {result.test_episodes} held-out episodes; "
            f"depth clipped at {result.clip:g} m. A floor knows nothing of the scene; the ceiling is the "
            "teacher's own features.",
        ),
        figures=_curves(metrics),
        tables=(_table(metrics),),
        pictures=tuple(_panel_row(panel, near, far, names) for panel in result.panels),
        depth_scale=(near, far) if result.panels else None,
    )


def _label(m: ProbeMetrics) -> str:
    name = m.name if m.head == "linear" else f"{m.name} ({m.head})"
    return name if m.layer is None else f"{name}, layer {m.layer}"


def _readouts(result: ProbeResult) -> str:
    heads = {m.head for m in result.metrics}
    if heads == {"linear", "dpt"}:
        return "A linear and a DPT readout"
    return "A DPT readout" if heads == {"dpt"} else "A linear readout"


def _table(metrics: Sequence[ProbeMetrics]) -> TableData:
    return TableData(
        "readouts",
        "All readouts",
        ("features", "kind", "camera", "AbsRel \u2193", "\u00b1 s.e.", "AbsRel, changing pixels \u2193",
         "RMSE (m) \u2193", "\u03b4 < 1.25, % \u2191"),
        tuple(
            (
                Cell(_label(m)),
                Cell(m.kind, words=True),
                Cell(m.camera, words=True),
                *(Cell.number(v) for v in (m.abs_rel, m.abs_rel_error, m.abs_rel_changing)),
                Cell.number(m.rmse, "{:.3f}"),
                Cell.number(100 * m.delta, "{:.1f}"),
            )
            for m in metrics
        ),
        strong=tuple(number for number, m in enumerate(metrics) if m.camera == "all"),
    )  # fmt: skip


def _panel_row(panel: DepthPanel, near: float, far: float, names: Mapping[str, str] | None) -> PictureRow:
    shown = names or {name: name for name in panel.predictions}
    pictures = [
        Media.picture(panel.image, f"image, camera {panel.camera}, frame {panel.index}"),
        Media.picture(depth_picture(panel.truth, near, far), "true depth"),
        *(
            Media.picture(depth_picture(panel.predictions[name], near, far), caption)
            for name, caption in shown.items()
        ),
    ]
    return PictureRow(f"{panel.camera}, frame {panel.index}", tuple(pictures))


def probe_page(
    result: ProbeResult,
    suggestions: Mapping[str, LayerSuggestion],
    dataset: str,
    commands: Sequence[str] = (),
) -> ReportData:
    """Everything that `probe_depth` found."""
    return ReportData(
        title="Depth probe",
        subtitle=f"{dataset}: {result.train_frames} frames fitted, {result.test_frames} measured",
        sections=(probe_section(result, suggestions),),
        commands=tuple(commands),
    )


def read_probe(folder: Path) -> tuple[Section, ...]:
    """What `spatial-forcing probe --output folder` left, without its panels; empty where it left nothing.

    Raises:
        DataError: probe.json is not what the probe writes.
    """
    path = folder / "probe.json"
    if not path.exists():
        return ()
    plain = json.loads(path.read_text(encoding="utf-8"))
    try:
        metrics = tuple(ProbeMetrics(**row) for row in plain.pop("metrics"))
        suggestions = {
            name: LayerSuggestion(**row | {"gaps": {int(k): gap for k, gap in row["gaps"].items()}})
            for name, row in plain.pop("suggestions").items()
        }
        return (probe_section(ProbeResult(metrics, (), **plain), suggestions),)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a result of the probe ({error}); probe again into that folder."
        ) from error


def metrics_csv(metrics: Sequence[ProbeMetrics]) -> str:
    """One line for each readout and camera."""
    names = [f.name for f in fields(ProbeMetrics) if f.name != "per_episode"]
    return csv_text(names, ([getattr(m, name) for name in names] for m in metrics))
