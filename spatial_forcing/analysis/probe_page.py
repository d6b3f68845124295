"""The depth probe as a page of its own: curves over layers, panels, a table, the suggested layer."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from spatial_forcing.analysis.charts import Series, line_chart
from spatial_forcing.analysis.layers import LayerSuggestion
from spatial_forcing.analysis.probe import ProbeMetrics, ProbeResult
from spatial_forcing.analysis.report_data import ProbeReport, ReportData
from spatial_forcing.analysis.sections import Figure, Section
from spatial_forcing.errors import DataError

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
    svg = line_chart(series, title=title, x_label="blocks before the tap", y_label=title, percent=percent)
    text = "bands: 95 %, over held-out episodes" if field == "abs_rel" else ""
    return Figure(title, svg, text, tuple((s.arm, s.label) for s in series))


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
        arms=(),
        sections=(layer_section(result.metrics, suggestions),),
        probe=ProbeReport.of(result),
        commands=tuple(commands),
    )


def read_probe(folder: Path) -> tuple[ProbeReport, Section] | None:
    """What `spatial-forcing probe --output folder` left, without its panels; None where it left nothing.

    Raises:
        DataError: probe.json is not what the probe writes.
    """
    path = folder / "probe.json"
    if not path.exists():
        return None
    plain = json.loads(path.read_text(encoding="utf-8"))
    try:
        metrics = tuple(ProbeMetrics(**row) for row in plain.pop("metrics"))
        suggestions = {
            name: LayerSuggestion(**row | {"gaps": {int(k): gap for k, gap in row["gaps"].items()}})
            for name, row in plain.pop("suggestions").items()
        }
        return ProbeReport.of(ProbeResult(metrics, (), **plain)), layer_section(metrics, suggestions)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no result of the probe ({error}); probe again into that folder."
        ) from error


def metrics_csv(metrics: Sequence[ProbeMetrics]) -> str:
    """One line a readout and camera."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(ProbeMetrics)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(m) for m in metrics)
    return text.getvalue()
