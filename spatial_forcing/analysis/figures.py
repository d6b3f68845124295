"""Figures of a page, and each as a paper takes it: a vector file of its own, and its numbers.

On the page a chart's colours come from the page's CSS. A saved one stands alone: every colour, line and font
is written into it, its legend is part of it, and its background is white.
"""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spatial_forcing.analysis.charts import (
    COLOURS,
    Interval,
    Series,
    interval_chart,
    line_chart,
    scatter_chart,
    swatch,
)
from spatial_forcing.errors import EnvironmentSetupError
from spatial_forcing.storage import csv_text

Legend = tuple[tuple[int, str], ...]
"""(arm number, label) of lines or marks."""

SVG = "http://www.w3.org/2000/svg"
INK, SOFT, RULE, STRIPE, WHITE = "#1d2329", "#4a545d", "#d5dade", "#f4f6f7", "#ffffff"
FONT, PDF_FONT = "Helvetica, Arial, sans-serif", "Vera"
FONT_SIZE, LEGEND_LINE = 11.5, 18.0
STYLES: Mapping[str, Mapping[str, str]] = {
    "tick": {"fill": SOFT},
    "label": {"fill": SOFT},
    "row": {"fill": INK},
    "grid": {"stroke": RULE},
    "axis": {"stroke": SOFT},
    "stripe": {"fill": STRIPE},
    "line": {"fill": "none", "stroke": "arm", "stroke-width": "2", "stroke-linejoin": "round"},
    "band": {"fill": "arm", "fill-opacity": "0.13"},
    "whisker": {"fill": "none", "stroke": "arm", "stroke-width": "1.4"},
    "dot": {"fill": "arm", "fill-opacity": "0.55"},
    "mark": {"fill": "arm", "stroke": WHITE},
    "open": {"fill": WHITE, "stroke": "arm", "stroke-width": "1.8"},
}
"""What the page's CSS says of the classes of a chart, for one that stands alone; "arm": the colour of its
arm."""


@dataclass(frozen=True)
class Figure:
    """A chart: `svg` as the page shows it, `csv` its numbers, `legend` what its lines or marks are."""

    title: str
    svg: str
    text: str = ""
    legend: Legend = ()
    csv: str = ""

    @classmethod
    def lines(cls, series: Sequence[Series], title: str, text: str = "", **chart: Any) -> Figure:
        """A line chart with a legend; `chart`: see `charts.line_chart`."""
        legend = tuple((s.arm, s.label) for s in series)
        rows = (
            (s.label, x, y, s.low[i] if s.low else "", s.high[i] if s.high else "")
            for s in series
            for i, (x, y) in enumerate(zip(s.x, s.y, strict=True))
        )
        header = ("series", chart["x_label"], chart["y_label"], "low", "high")
        return cls(title, line_chart(series, title=title, **chart), text, legend, _csv(header, rows))

    @classmethod
    def intervals(
        cls, rows: Sequence[tuple[str, Sequence[Interval]]], title: str, text: str = "", **chart: Any
    ) -> Figure:
        """Points with intervals, by row; `chart`: see `charts.interval_chart`."""
        lines = ((label, m.value, m.low, m.high) for label, marks in rows for m in marks)
        table = _csv(("row", chart["x_label"], "low", "high"), lines)
        return cls(title, interval_chart(rows, title=title, **chart), text, csv=table)

    @classmethod
    def points(
        cls, groups: Sequence[tuple[str, Sequence[Sequence[float]]]], title: str, text: str = ""
    ) -> Figure:
        """A map of points in groups."""
        legend = tuple((number, name) for number, (name, _) in enumerate(groups))
        table = _csv(("group", "x", "y"), ((name, *point) for name, group in groups for point in group))
        return cls(title, scatter_chart(groups, title=title), text, legend, table)

    def _repr_svg_(self) -> str:
        """How a notebook shows it."""
        return standalone(self)

    @property
    def name(self) -> str:
        """Of its files."""
        kept = "".join(c if c.isalnum() else "-" for c in self.title.lower())
        return "-".join(filter(None, kept.split("-")))


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    return csv_text(header, ([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows))


def standalone(figure: Figure, font: str = FONT) -> str:
    """The chart as an SVG file that needs no page around it."""
    chart = _parsed(figure.svg)
    _, _, width, height = (float(v) for v in chart.attrib["viewBox"].split())
    top = LEGEND_LINE * len(figure.legend)
    sheet = ET.Element(
        f"{{{SVG}}}svg",
        {"viewBox": f"0 0 {width:g} {height + top:g}", "width": f"{width:g}", "height": f"{height + top:g}"},
    )
    ET.SubElement(sheet, f"{{{SVG}}}title").text = figure.title
    back = {"width": f"{width:g}", "height": f"{height + top:g}", "fill": WHITE}
    ET.SubElement(sheet, f"{{{SVG}}}rect", back)
    for number, (arm, label) in enumerate(figure.legend):
        at = {"transform": f"translate(8 {number * LEGEND_LINE + 4:g})"}
        entry = ET.SubElement(sheet, f"{{{SVG}}}g", at)
        sample = _parsed(swatch(arm))
        entry.extend(_styled(child, COLOURS[arm % len(COLOURS)][0], font) for child in sample)
        words = ET.SubElement(entry, f"{{{SVG}}}text", {"x": "38", "y": "10", "class": "row"})
        words.text = label
        _styled(words, INK, font)
    body = ET.SubElement(sheet, f"{{{SVG}}}g", {"transform": f"translate(0 {top:g})"})
    body.extend(_styled(child, INK, font) for child in list(chart))
    ET.register_namespace("", SVG)
    return ET.tostring(sheet, encoding="unicode")


def pdf(figure: Figure) -> bytes:
    """The chart as one page of vector PDF, its fonts embedded.

    Raises:
        EnvironmentSetupError: svglib is not installed.
    """
    try:
        import reportlab
        from reportlab.graphics import renderPDF
        from reportlab.pdfgen.canvas import Canvas
        from svglib.fonts import register_font
        from svglib.svglib import svg2rlg
    except ImportError as error:
        raise EnvironmentSetupError(
            "figures are saved as PDF with svglib: pip install 'spatial-forcing[report]'."
        ) from error
    register_font(PDF_FONT, str(Path(reportlab.__file__).parent / "fonts" / "Vera.ttf"))
    drawing = svg2rlg(io.BytesIO(standalone(figure, PDF_FONT).encode()))
    made = io.BytesIO()
    # Invariant: without the time of day, so that the same figure gives the same file.
    canvas = Canvas(made, pagesize=(drawing.width, drawing.height), invariant=1)
    canvas.setTitle(figure.title)
    renderPDF.draw(drawing, canvas, 0, 0)
    canvas.save()
    return made.getvalue()


def _parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg.replace("<svg", f'<svg xmlns="{SVG}"', 1))


def _styled(node: ET.Element, colour: str, font: str) -> ET.Element:
    """The node with what its class means written into it; what only a pointer needs is taken away."""
    kinds = node.attrib.pop("class", "").split()
    for kind in kinds:
        if kind.startswith("arm-"):
            colour = COLOURS[int(kind.removeprefix("arm-"))][0]
        wanted = "open" if kind == "mark" and node.get("fill") == "none" else kind
        node.attrib |= {k: colour if v == "arm" else v for k, v in STYLES.get(wanted, {}).items()}
    for name in [name for name in node.attrib if name.startswith("data-") or name in ("tabindex", "role")]:
        del node.attrib[name]
    if node.tag == f"{{{SVG}}}text":
        node.attrib |= {"font-family": font, "font-size": f"{FONT_SIZE:g}"}
    for child in list(node):
        if child.get("class") == "hit":
            node.remove(child)
        else:
            _styled(child, colour, font)
    return node
