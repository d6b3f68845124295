"""Charts as SVG text, drawn on the server: they show without JavaScript and in print.

Fonts and themes come from the page's CSS, colours by the classes `arm-0` to `arm-5`; every arm also has its
own dash pattern and marker, so that no chart depends on colour alone. More than six arms share the colours,
with other patterns and markers (36 pairs). What a script needs for tooltips is in `data-` attributes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 12, 40
MARK = 14
"""Height of one mark in an interval chart."""
COLOURS = (
    ("#0b63a5", "#5fb3f2"),
    ("#c44a00", "#ff9a57"),
    ("#5f6b76", "#aab5bf"),
    ("#00795a", "#3fd0a3"),
    ("#a8437f", "#ec9ac8"),
    ("#6b5a00", "#dcc54a"),
)
"""Of the arms, on a light and on a dark page."""
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4", "10 4")


@dataclass(frozen=True)
class Series:
    """One line: `x` ascending, `y`, and, where there is one, an interval `low`..`high` at every point."""

    label: str
    arm: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Interval:
    """One mark of an interval chart: `text` is what its tooltip says, `points` what its mean is over."""

    arm: int
    value: float
    low: float
    high: float
    text: str
    points: tuple[float, ...] = ()


def thinned(x: Sequence[float], y: Sequence[float], points: int = 120) -> tuple[list[list[float]], bool]:
    """Means (and extremes) over consecutive bins: ([x, y, low, high], whether points were averaged)."""
    if len(x) <= points:
        return [list(x), list(y), list(y), list(y)], False
    xs = np.array_split(np.asarray(x, float), points)
    ys = np.array_split(np.asarray(y, float), points)
    kinds = (([b.mean() for b in xs]), [b.mean() for b in ys], [b.min() for b in ys], [b.max() for b in ys])
    return [[float(v) for v in kind] for kind in kinds], True


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    percent: bool = False,
    whiskers: bool = False,
    log: bool = False,
) -> str:
    """Lines over a common x axis; intervals as bands, or as whiskers with markers.

    `percent`: y is a fraction in [0, 1], shown in %. `log`: a logarithmic axis where all values are positive;
    values that span more than a factor of 12 get one, too.
    """
    xs = [v for s in series for v in s.x]
    ys = [v for s in series for v in (*s.y, *(s.low or ()), *(s.high or ()))]
    centre = [v for s in series for v in s.y]
    log = not percent and min(ys) > 0 and (log or max(centre) > 12 * min(centre))
    inset = 12 if whiskers else 0  # room for markers on the first and last step
    x_axis = _Axis.of(min(xs), max(xs), LEFT + inset, WIDTH - RIGHT - inset, log=False)
    y_low, y_high = (0.0, 1.0) if percent else (min(ys), max(ys))
    y_axis = _Axis.of(y_low, y_high, HEIGHT - BOTTOM, TOP, log=log, padded=not percent)
    parts = [_frame(x_axis, y_axis, x_label, f"{y_label} (log scale)" if log else y_label, percent)]
    for s in series:
        px = [x_axis.at(v) + (3 * (s.arm - 0.5) if whiskers else 0) for v in s.x]
        parts.append(_line(s, px, y_axis, whiskers))
    data = {
        "x": sorted(set(xs)),
        "px": [round(x_axis.at(v), 1) for v in sorted(set(xs))],
        "series": [_tooltip_data(s, y_axis) for s in series],
        "percent": percent,
        "xLabel": x_label,
    }
    return _svg("".join(parts), title, HEIGHT, f' data-line="{escape(json.dumps(data))}"')


def interval_chart(
    rows: Sequence[tuple[str, Sequence[Interval]]],
    *,
    title: str,
    x_label: str,
    percent: bool = False,
    signed: bool = False,
) -> str:
    """Rows of points with intervals: one row of marks for every label, one mark for every arm.

    `signed`: values are differences; the axis holds them and zero, which is marked.
    """
    marks = [m for _, row in rows for m in row]
    names = 6.6 * max(len(label) for label, _ in rows)
    left = min(max(names + 12, 60), 210)
    values = [0.0, *(v for m in marks for v in (m.low, m.high, *m.points))]
    low, high = (0.0, 1.0) if percent else (0.0, 1.05 * max(values))
    if signed:
        low, high = 1.05 * min(values), 1.05 * max(values)
    x_axis = _Axis.of(low, high, left, WIDTH - RIGHT, log=False)
    stripes, grid, body, y = [], [], [], float(TOP)
    for number, (label, row) in enumerate(rows):
        size = max(1, len(row)) * MARK + 10
        if number % 2 == 0:
            stripes.append(f'<rect class="stripe" x="0" y="{y:.1f}" width="{WIDTH}" height="{size}"/>')
        body.append(_text("row", left - 8, y + size / 2 + 4, _short(label), "end"))
        body += [_whisker(mark, x_axis, y + 12 + place * MARK) for place, mark in enumerate(row)]
        y += size
    for tick in x_axis.ticks():
        at = x_axis.at(tick)
        kind = "axis" if signed and abs(tick) < 1e-12 else "grid"
        grid.append(f'<line class="{kind}" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{y:.1f}"/>')
        grid.append(_text("tick", at, y + 14, _number(tick, percent)))
    grid.append(_text("label", (left + WIDTH - RIGHT) / 2, y + 30, x_label))
    return _svg("".join([*stripes, *grid, *body]), title, int(y + 34))


def scatter_chart(groups: Sequence[tuple[str, Sequence[Sequence[float]]]], *, title: str) -> str:
    """Points (x, y) in groups, one colour and marker each; axes without numbers, since only shapes count."""
    points = [p for _, group in groups for p in group]
    (left, right), (low, high) = ((min(p[i] for p in points), max(p[i] for p in points)) for i in (0, 1))
    x_axis = _Axis.of(left, right, RIGHT, WIDTH - RIGHT, log=False, padded=True)
    y_axis = _Axis.of(low, high, HEIGHT - TOP, TOP, log=False, padded=True)
    parts = []
    for number, (name, group) in enumerate(groups):
        marks = "".join(marker(number, x_axis.at(p[0]), y_axis.at(p[1]), 2.2) for p in group)
        parts.append(f'<g class="arm-{number % 6}" aria-label="{escape(name)}">{marks}</g>')
    return _svg("".join(parts), title, HEIGHT)


def marker(arm: int, x: float, y: float, size: float = 4.0) -> str:
    """The arm's shape, centred on (x, y): circle, square, triangle, diamond, cross, ring."""
    r, w, d = size, 1.2 * size, 1.4 * size
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"',
        f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r}" height="{2 * r}"',
        f'<path d="M{x:.1f} {y - w:.1f}l{w:.1f} {2.1 * r:.1f}h{-2 * w:.1f}z"',
        f'<path d="M{x:.1f} {y - d:.1f}l{d:.1f} {d:.1f}l{-d:.1f} {d:.1f}l{-d:.1f} {-d:.1f}z"',
        f'<path d="M{x - r:.1f} {y - r:.1f}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}" fill="none"',
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" fill="none"',
    )
    return f'{shapes[_shape(arm)]} class="mark"/>'


def _shape(arm: int) -> int:
    """One of six pairs of dash pattern and marker; it changes each time the colours repeat."""
    return (arm + arm // 6) % 6


def _dash(arm: int) -> str:
    pattern = DASHES[_shape(arm)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def swatch(arm: int) -> str:
    """The legend's sample of an arm: its line and marker."""
    return (
        f'<svg class="swatch arm-{arm % 6}" viewBox="0 0 30 12" width="30" height="12" aria-hidden="true">'
        f'<path class="line" d="M1 6H29"{_dash(arm)}/>{marker(arm, 15, 6)}</svg>'
    )


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    stop: float
    log: bool

    @classmethod
    def of(
        cls, low: float, high: float, start: float, stop: float, *, log: bool, padded: bool = False
    ) -> _Axis:
        if log:
            return cls(math.log10(low) - 0.03, math.log10(high) + 0.03, start, stop, True)
        if high <= low:
            low, high = low - 0.5, low + 0.5
        pad = 0.04 * (high - low) if padded else 0.0
        # Losses that come near zero start there: a cut axis would exaggerate differences.
        low = 0.0 if padded and 0 <= low < 0.35 * high else low - pad
        return cls(low, high + pad, start, stop, False)

    def at(self, value: float) -> float:
        position = math.log10(value) if self.log else value
        return self.start + (position - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            every = max(1, len(powers) // 8)  # of many decades some
            values = [m * 10.0**p for p in powers[::every] for m in ((1, 2, 5) if every == 1 else (1,))]
            return [v for v in values if v > 0 and self.low <= math.log10(v) <= self.high]
        rough = (self.high - self.low) / 4
        magnitude = 10.0 ** math.floor(math.log10(rough))
        step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str, percent: bool) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in y_axis.ticks():
        at = y_axis.at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text("tick", LEFT - 6, at + 4, _number(tick, percent), "end"))
    parts += [_text("tick", x_axis.at(tick), bottom + 15, _number(tick, False)) for tick in x_axis.ticks()]
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(_text("label", (LEFT + right) / 2, HEIGHT - 6, x_label))
    turned = f"translate(12 {(TOP + bottom) / 2:.1f}) rotate(-90)"
    return "".join(parts) + f'<g transform="{turned}">{_text("label", 0, 0, y_label)}</g>'


def _text(kind: str, x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(series: Series, px: Sequence[float], y_axis: _Axis, whiskers: bool) -> str:
    def path(values: Sequence[float]) -> str:
        return "L".join(f"{x:.1f} {y_axis.at(v):.1f}" for x, v in zip(px, values, strict=True))

    parts = [f'<g class="arm-{series.arm % 6}" data-arm="{series.arm}">']
    if series.low is not None and series.high is not None:
        if whiskers:
            ends = zip(px, series.low, series.high, strict=True)
            parts += [
                f'<path class="whisker" d="M{x:.1f} {y_axis.at(a):.1f}V{y_axis.at(b):.1f}"/>'
                for x, a, b in ends
            ]
        elif list(series.low) != list(series.y):
            back = "L".join(reversed(path(series.low).split("L")))
            parts.append(f'<path class="band" d="M{path(series.high)}L{back}z"/>')
    parts.append(f'<path class="line" d="M{path(series.y)}"{_dash(series.arm)}/>')
    if whiskers or len(px) == 1:
        parts += [marker(series.arm, x, y_axis.at(v)) for x, v in zip(px, series.y, strict=True)]
    return "".join([*parts, "</g>"])


def _tooltip_data(series: Series, y_axis: _Axis) -> dict[str, object]:
    def rounded(values: Sequence[float] | None) -> list[float] | None:
        return None if values is None else [float(f"{v:.4g}") for v in values]

    return {
        "label": series.label,
        "arm": series.arm,
        "x": list(series.x),
        "y": rounded(series.y),
        "low": rounded(series.low),
        "high": rounded(series.high),
        "py": [round(y_axis.at(v), 1) for v in series.y],
    }


def _whisker(mark: Interval, axis: _Axis, y: float) -> str:
    low, high = axis.at(mark.low), axis.at(mark.high)
    dots = "".join(f'<circle class="dot" cx="{axis.at(v):.1f}" cy="{y:.1f}" r="1.8"/>' for v in mark.points)
    return (
        f'<g class="arm-{mark.arm % 6}" data-arm="{mark.arm}" data-tip="{escape(mark.text)}" tabindex="0" '
        f'role="img" aria-label="{escape(mark.text)}">'
        f'<rect class="hit" x="{low - 6:.1f}" y="{y - 7:.1f}" width="{high - low + 12:.1f}" height="14"/>'
        f'<path class="whisker" d="M{low:.1f} {y:.1f}H{high:.1f}'
        f'M{low:.1f} {y - 3:.1f}v6M{high:.1f} {y - 3:.1f}v6"/>'
        f"{dots}{marker(mark.arm, axis.at(mark.value), y)}</g>"
    )


def _svg(body: str, title: str, height: int, extra: str = "") -> str:
    focus = ' tabindex="0"' if extra else ""
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="{"img" if extra else "group"}" '
        f'aria-label="{escape(title)}"{focus}{extra}>{body}</svg>'
    )


def _number(value: float, percent: bool) -> str:
    if percent:
        return f"{100 * value:.3g} %"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.6g}"


def _short(label: str, limit: int = 30) -> str:
    return label if len(label) <= limit else label[: limit - 1] + "…"
