"""The depth probe as a page of its own: curves over layers, panels, a table, the suggested layer."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

from spatial_forcing.analysis.charts import Interval, Series, interval_chart
from spatial_forcing.analysis.layers import LayerSuggestion
from spatial_forcing.analysis.pictures import depth_picture
from spatial_forcing.analysis.probe import DepthPanel, ProbeMetrics, ProbeResult
from spatial_forcing.analysis.report import Cell, Figure, Media, PictureRow, ReportData, Section, TableData
from spatial_forcing.errors import DataError

OTHER = 5
"""Colour of floors and ceilings."""
CURVES = (("abs_rel", "AbsRel", False), ("rmse", "RMSE, m", False), ("delta", "delta < 1.25", True))


def layer_section(
    metrics: Sequence[ProbeMetrics], suggestions: Mapping[str, LayerSuggestion] | None = None
) -> Section:
    """Each metric over the student's layers; floors and ceiling without layers are level lines."""
    said = [f"{name}: align layer {s.layer}: {s.reason}" for name, s in (suggestions or {}).items()]
    return Section(
        key="layers",
        title="Depth over layers",
        text=tuple(said),
        figures=tuple(_curve(metrics, *curve) for curve in CURVES),
    )


def _curve(metrics: Sequence[ProbeMetrics], field: str, title: str, percent: bool) -> Figure:
    rows = [m for m in metrics if m.camera == "all"]
    layers = sorted({m.layer for m in rows if m.layer is not None})
    several = len({m.head for m in rows}) > 1
    series = []
    for number, (name, head) in enumerate(dict.fromkeys((m.name, m.head) for m in rows)):
        mine = {m.layer: m for m in rows if (m.name, m.head) == (name, head)}
        level = mine.get(None)
        points = [(k, level or mine[k]) for k in layers if level is not None or k in mine]
        y = [float(getattr(m, field)) for _, m in points]
        reach = [1.96 * m.abs_rel_error if field == "abs_rel" and level is None else 0.0 for _, m in points]
        series.append(
            Series(
                f"{name} ({head})" if several else name,
                number,
                [k for k, _ in points],
                y,
                [max(0.0, v - r) for v, r in zip(y, reach, strict=True)],
                [v + r for v, r in zip(y, reach, strict=True)],
            )
        )
    text = "bands: 95 %, over held-out episodes" if field == "abs_rel" else ""
    return Figure.lines(series, title, text, x_label="blocks before the tap", y_label=title, percent=percent)


def probe_section(
    result: ProbeResult, names: Mapping[str, str] | None = None, order: Sequence[str] = ()
) -> Section:
    """Every readout as a chart and a table, and panels of predicted depth.

    Args:
        result: of `probe_depth`.
        names: renames readouts in the captions of the panels, and orders and selects them.
        order: names of the arms whose colours the students share; default: their own order.
    """
    students = list(dict.fromkeys([*order, *(m.name for m in result.metrics if m.kind == "student")]))
    depths = np.concatenate([p.truth[p.truth > 0] for p in result.panels] or [np.array([0.1, 1.0])])
    near, far = float(np.percentile(depths, 1)), float(np.percentile(depths, 99))
    far = max(far, near * 1.05)
    marks = []
    for m in result.metrics:
        if m.camera == "all":
            reach = 1.96 * m.abs_rel_error
            text = f"{_label(m)}: AbsRel {m.abs_rel:.4f} ± {reach:.4f}, delta {100 * m.delta:.1f} %"
            number = students.index(m.name) if m.name in students else OTHER
            low, high = max(0.0, m.abs_rel - reach), m.abs_rel + reach
            marks.append((_label(m), [Interval(number, m.abs_rel, low, high, text)]))
    title = "Absolute relative error, mean over cameras"
    return Section(
        key="probe",
        title="Depth probe",
        text=(
            f"{_readouts(result)} from frozen tokens to log depth, fitted on {result.train_frames} frames "
            f"and measured on {result.test_frames} frames of {result.test_episodes} held-out episodes; "
            f"depth clipped at {result.clip:g} m.",
        ),
        figures=(
            Figure(
                title,
                interval_chart(marks, title=title, x_label="AbsRel (lower is better)"),
                "whiskers: 1.96 standard errors over held-out episodes",
            ),
        ),
        tables=(_table(result.metrics),),
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
        "RMSE (m) \u2193",
         "\u03b4 < 1.25, % \u2191"),
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
        sections=(layer_section(result.metrics, suggestions), probe_section(result)),
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
        return probe_section(ProbeResult(metrics, (), **plain)), layer_section(metrics, suggestions)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a result of the probe ({error}); probe again into that folder."
        ) from error


def metrics_csv(metrics: Sequence[ProbeMetrics]) -> str:
    """One line for each readout and camera."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(ProbeMetrics)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(m) for m in metrics)
    return text.getvalue()
