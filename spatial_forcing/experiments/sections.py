"""The sections of the page of a comparison: figures and tables of what `statistics` found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from spatial_forcing.analysis.charts import Interval, Series, thinned
from spatial_forcing.analysis.figures import Figure
from spatial_forcing.analysis.report import Card, Cell, Section, TableData
from spatial_forcing.evaluation.paired import NOT_SHOWN, p_text
from spatial_forcing.experiments.arms import ArmSpec
from spatial_forcing.experiments.audits import AuditRow, whole
from spatial_forcing.experiments.contrasts import Contrast
from spatial_forcing.experiments.statistics import Comparison, ErrorRow, HeldOut, Row, SuccessRow

MOST_CARDS = 4
LESS_DATA = "Arms on less data against the control on the most"
CURVES = {
    "action_loss": ("Action loss", "what the policy is trained for", False),
    "align_loss": (
        "Alignment loss",
        "1 \u2212 mean cosine between projected tokens and the teacher's features",
        True,
    ),
}
"""Title, meaning, and whether the axis is logarithmic, by metric."""


def comparison_section(
    found: Comparison, arms: Mapping[str, ArmSpec] | None = None, notes: Sequence[str] = ()
) -> Section:
    """Success over training seeds, paired differences, curves, cost; `arms` says by title what each is."""
    figures: list[Figure] = []
    tables: list[TableData] = []
    if found.rows:
        label = _labels(found.rows)
        figures.append(_success_figure(found.rows, label))
        if found.contrasts:
            title = "Paired differences"
            figures.append(_contrast_figure(found.contrasts, found.rows, title, "difference of success"))
        figures += _curve_figures(found.rows, "Success", "success", percent=True)
        points = [
            (row.arm, row.fraction, row.success.mean, row.success.low, row.success.high) for row in found.rows
        ]
        figures += _data_figures(points, "Success", "success", percent=True)
        tables += [_arm_table(found, label), _task_table(found, label)]
        if found.contrasts:
            title = "Paired differences, in points"
            tables.insert(1, _contrast_table("differences", title, found.contrasts, label))
        if found.less_data:
            tables.append(_contrast_table("less-data", f"{LESS_DATA}, points", found.less_data, label))
    if found.held_out is not None:
        figures += _error_figures(found.held_out)
        tables += _error_tables(found.held_out)
    if arms:
        lines = tuple(
            (Cell(title), Cell(arm.name, words=True), Cell(arm.description, words=True))
            for title, arm in arms.items()
        )
        tables.append(TableData("meaning", "What the arms are", ("arm", "name", "what it is"), lines))
    return Section(
        key="comparison",
        title="Comparison",
        cards=_cards(found, arms or {}),
        text=tuple(found.sentences()),
        notes=tuple(notes),
        figures=tuple(figures),
        tables=tuple(tables),
    )


def gradient_sections(rows: Sequence[AuditRow], arms: Sequence[str] = ()) -> tuple[Section, ...]:
    """The gradient audits of all arms; empty without any. `arms`: in the order of the other charts."""
    if not rows:
        return ()
    label = _labels(rows)
    parts = len({row.fraction for row in rows})
    order = list(dict.fromkeys([*arms, *(row.arm for row in rows)]))
    numbers = [order.index(row.arm) if parts == 1 else n for n, row in enumerate(whole(rows))]
    kinds = {
        "Cosine between the two gradients": ("cosine", [row.cosines for row in whole(rows)]),
        "Norm: alignment over action": ("ratio", [row.ratios for row in whole(rows)]),
    }
    figures = []
    for title, (y_label, curves) in kinds.items():
        series = [
            Series(label[row.arm, row.fraction], number, list(curve), list(curve.values()))
            for number, row, curve in zip(numbers, whole(rows), curves, strict=True)
        ]
        figures.append(
            Figure.lines(series, title, "mean over seeds", x_label="training step", y_label=y_label)
        )
    table = TableData(
        "audit",
        "By place of the student, means over training and seeds",
        ("arm", "place", "seeds", "cosine", "norm ratio"),
        tuple(
            (Cell(label[r.arm, r.fraction]), Cell(r.place), Cell(str(r.seeds)),
             Cell.number(r.cosine, "{:+.3f}"), Cell.number(r.ratio, "{:.2f}"))
            for r in rows
        ),
    )  # fmt: skip
    text = (
        "Gradients of the alignment and the action loss over the weights that both reach; alpha is not "
        "included. A cosine near 0: the losses neither help nor hinder each other directly. A ratio far from "
        "that of another arm: the two differ in how hard the alignment pulls, too.",
    )
    section = Section("gradients", "Gradient audit", text=text, figures=tuple(figures), tables=(table,))
    return (section,)


def training_section(lines: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> Section:
    """Losses over training, mean over the runs of each arm.

    Args:
        lines: by arm, the metrics lines of its runs.
    """
    figures = []
    for key, (title, explanation, log) in CURVES.items():
        series, averaged = [], False
        for number, (arm, runs) in enumerate(lines.items()):
            curves = [{row["step"]: row[key] for row in run if key in row} for run in runs]
            steps = sorted(set.intersection(*map(set, curves)))
            if not steps:
                continue
            mean = [float(np.mean([curve[step] for curve in curves])) for step in steps]
            (x, y, low, high), binned = thinned(steps, mean)
            series.append(Series(arm, number, x, y, low if binned else None, high if binned else None))
            averaged |= binned
        if series:
            note = "line: mean of consecutive steps, band: their extremes" if averaged else ""
            text = "; ".join(filter(None, (explanation, note)))
            axes = {"x_label": "training step", "y_label": title.lower()}
            figures.append(Figure.lines(series, title, text, log=log, **axes))
    return Section("losses", "Losses", figures=tuple(figures))


def _cards(found: Comparison, arms: Mapping[str, ArmSpec]) -> tuple[Card, ...]:
    """Every arm on the most data, by the measure that leads; none where there are too many to be read."""
    rows: Sequence[Row] = found.held_out.rows if found.held_out and _errors_lead(found) else found.rows
    most = max((row.fraction for row in rows), default=1.0)
    chosen = [row for row in rows if row.fraction == most]
    if len(chosen) > MOST_CARDS:
        return ()
    number = _arm_numbers(rows)
    return tuple(
        Card(
            number[row.arm, row.fraction],
            row.arm,
            *_headline(row, found),
            arms[row.arm].description if row.arm in arms else "",
        )
        for row in chosen
    )


def _errors_lead(found: Comparison) -> bool:
    """Whether the held-out error says more than success: it alone was measured, or shows a difference."""
    if found.held_out is None:
        return False
    success, errors = (
        any(one.verdict != NOT_SHOWN for one in family)
        for family in (found.contrasts, found.held_out.contrasts)
    )
    return not found.rows or (errors and not success)


def _headline(row: Row, found: Comparison) -> tuple[str, str]:
    """The large figure of a card, and what it is."""
    if isinstance(row, SuccessRow):
        s = row.success
        over = f"{s.seeds} training seeds" if s.seeds > 1 else f"{found.episodes} episodes"
        return (
            f"{100 * s.mean:.1f} %",
            f"success, 95 % interval {100 * s.low:.1f} to {100 * s.high:.1f} %, over {over}",
        )
    assert isinstance(row, ErrorRow)
    what = "error on held-out demonstrations, standard deviations of the actions"
    if row.low is None or row.high is None:
        return f"{row.mean:.3f}", f"{what}; one training seed"
    interval = f"95 % interval {row.low:.3f} to {row.high:.3f}, over {len(row.per_seed)} training seeds"
    return f"{row.mean:.3f}", f"{what}; {interval}"


def _labels(rows: Sequence[Row | AuditRow]) -> dict[tuple[str, float], str]:
    several = len({row.fraction for row in rows}) > 1
    return {
        (row.arm, row.fraction): f"{row.arm}, {100 * row.fraction:g} % of data" if several else row.arm
        for row in rows
    }


Labels = Mapping[tuple[str, float], str]


def _arm_numbers(rows: Sequence[Row]) -> dict[tuple[str, float], int]:
    """Colour and marker of every row: its arm's, whatever part of the data it had."""
    arms = list(dict.fromkeys(row.arm for row in rows))
    return {(row.arm, row.fraction): arms.index(row.arm) for row in rows}


def _success_figure(rows: Sequence[SuccessRow], label: Labels) -> Figure:
    many = rows[0].success.seeds > 1
    spans = [
        (s.mean, s.low, s.high, f"{100 * s.mean:.1f} %" + (
            f", standard deviation over {s.seeds} seeds {100 * s.sd:.1f} points" if s.seeds > 1 else ""))
        for s in (row.success for row in rows)
    ]  # fmt: skip
    over = "seeds; small dots: each seed" if many else "the episodes of one seed"
    title, text = "Success, mean over training seeds", f"95 % intervals over {over}"
    marks = _marks(rows, label, _arm_numbers(rows), spans)
    return Figure.intervals(marks, title, text, x_label="success", percent=True)


Span = tuple[float, float, float, str]
"""Mean of an arm, its interval, and both in words."""


def _marks(
    rows: Sequence[Row], label: Labels, number: Mapping[tuple[str, float], int], spans: Sequence[Span]
) -> list[tuple[str, list[Interval]]]:
    """A row of an interval chart for every arm, its training seeds as dots where there are several."""
    made = []
    for row, (mean, low, high, words) in zip(rows, spans, strict=True):
        key = (row.arm, row.fraction)
        seeds = tuple(row.per_seed.values())
        text = f"{label[key]}: {words}"
        mark = Interval(number[key], mean, low, high, text, seeds if len(seeds) > 1 else ())
        made.append((label[key], [mark]))
    return made


def _contrast_figure(
    contrasts: Sequence[Contrast],
    rows: Sequence[Row],
    title: str,
    x_label: str,
    text: str = "",
) -> Figure:
    number = _arm_numbers(rows)
    several = len({row.fraction for row in rows}) > 1
    marks = [
        (
            f"{c.arm} \u2212 {c.control}" + (f", {100 * c.fraction:g} %" if several else ""),
            [
                Interval(
                    number[c.arm, c.fraction],
                    c.difference.value,
                    c.difference.low,
                    c.difference.high,
                    c.sentence(),
                    tuple(c.difference.per_seed.values()) if c.difference.seeds > 1 else (),
                )
            ],
        )
        for c in contrasts
    ]
    many = contrasts[0].difference.seeds > 1
    over = "training seed" if many else "episode of one training seed"
    dots = "; small dots: each seed" if many else ""
    return Figure.intervals(
        marks,
        title,
        f"{text}paired by {over}, 95 % intervals{dots}",
        x_label=x_label,
        percent=True,
        signed=True,
    )


def _curve_figures(rows: Sequence[Row], subject: str, y_label: str, *, percent: bool) -> list[Figure]:
    """A line an arm over training, where it was measured more than once."""
    if any(len(row.curve) < 2 for row in rows):
        return []
    label = _labels(rows)
    series = [
        Series(label[row.arm, row.fraction], number, list(row.curve), list(row.curve.values()))
        for number, row in enumerate(rows)
    ]
    title = f"{subject} over training"
    return [
        Figure.lines(
            series, title, "mean over seeds", x_label="training step", y_label=y_label, percent=percent
        )
    ]


Point = tuple[str, float, float, float, float]
"""Arm, part of the data, mean over seeds and its interval."""


def _data_figures(points: Sequence[Point], subject: str, y_label: str, *, percent: bool) -> list[Figure]:
    """A line an arm over the parts of the data, where there are several."""
    if len({part for _, part, *_ in points}) < 2:
        return []
    series = []
    for number, arm in enumerate(dict.fromkeys(arm for arm, *_ in points)):
        parts, means, lows, highs = zip(*sorted(rest for name, *rest in points if name == arm), strict=True)
        series.append(Series(arm, number, [100 * part for part in parts], means, lows, highs))
    figure = Figure.lines(
        series,
        f"{subject} by amount of data",
        "95 % intervals over seeds",
        x_label="% of the demonstrations",
        y_label=y_label,
        percent=percent,
        whiskers=True,
    )
    return [figure]


def _arm_table(found: Comparison, label: Labels) -> TableData:
    return TableData(
        "arms",
        "Arms",
        ("arm", "seeds", "success, %", "low", "high", "sd over seeds", "each seed",
         f"steps to {100 * found.threshold:.0f} %", "training, s", "peak memory, GiB", "one call, ms"),
        tuple(
            (
                Cell(label[row.arm, row.fraction]),
                Cell(str(row.success.seeds)),
                *(Cell.number(100 * v, "{:.1f}") for v in
                  (row.success.mean, row.success.low, row.success.high, row.success.sd)),
                Cell(" ".join(f"{100 * v:.0f}" for v in row.per_seed.values())),
                Cell(str(row.steps)),
                Cell.number(row.seconds, "{:.0f}"),
                Cell.number(row.peak_memory / 2**30, "{:.2f}"),
                Cell.number(row.act_ms, "{:.1f}"),
            )
            for row in found.rows
        ),
    )  # fmt: skip


def _contrast_table(name: str, title: str, contrasts: Sequence[Contrast], label: Labels) -> TableData:
    return TableData(
        name,
        title,
        ("arm", "minus", "difference", "low", "high", "p", "p (Holm)", "verdict"),
        tuple(
            (
                Cell(label[c.arm, c.fraction]),
                Cell(c.sides()[1]),
                *(Cell.number(100 * v, "{:+.1f}") for v in
                  (c.difference.value, c.difference.low, c.difference.high)),
                *(Cell(p_text(p).removeprefix("= "), f"{p:.6g}") for p in (c.difference.p_value, c.p_holm)),
                Cell(c.verdict),
            )
            for c in contrasts
        ),
    )  # fmt: skip


def _task_table(found: Comparison, label: Labels) -> TableData:
    tasks = sorted({task for row in found.rows for task in row.per_task})
    return TableData(
        "tasks",
        "Success by task, %, mean over seeds",
        ("arm", *tasks),
        tuple(
            (
                Cell(label[row.arm, row.fraction]),
                *(Cell.number(100 * row.per_task[t] if t in row.per_task else None, "{:.1f}") for t in tasks),
            )
            for row in found.rows
        ),
    )


def _error_figures(found: HeldOut) -> list[Figure]:
    title, x_label = "Held-out error against the controls", "difference, part of the control's error"
    figures = []
    if found.contrasts:
        figures.append(_contrast_figure(found.contrasts, found.rows, title, x_label, "left is better; "))
    subject, y_label = "Held-out error", "standard deviations"
    known = [(row, row.low, row.high) for row in found.rows if row.low is not None and row.high is not None]
    if known:
        spans = [(row.mean, low, high, str(row)) for row, low, high in known]
        shown = [row for row, *_ in known]
        marks = _marks(shown, _labels(found.rows), _arm_numbers(found.rows), spans)
        text = "lower is better; 95 % intervals over seeds; small dots: each seed"
        figures.insert(0, Figure.intervals(marks, f"{subject}, mean over seeds", text, x_label=y_label))
    figures += _curve_figures(found.rows, subject, y_label, percent=False)
    points = [
        (row.arm, row.fraction, row.mean, row.mean if row.low is None else row.low,
         row.mean if row.high is None else row.high)
        for row in found.rows
    ]  # fmt: skip
    return figures + _data_figures(points, subject, y_label, percent=False)


def _error_tables(found: HeldOut) -> list[TableData]:
    label = _labels(found.rows)
    errors = TableData(
        "held-out",
        f"Error on {found.episodes} held-out episodes, in standard deviations of the actions",
        (
            "arm",
            "seeds",
            "error",
            "low",
            "high",
            "each seed",
            "training, s",
            "peak memory, GiB",
            "one call, ms",
        ),
        tuple(
            (
                Cell(label[row.arm, row.fraction]),
                Cell(str(len(row.per_seed))),
                *(Cell.number(v) for v in (row.mean, row.low, row.high)),
                Cell(" ".join(f"{v:.3f}" for v in row.per_seed.values())),
                Cell.number(row.seconds, "{:.0f}"),
                Cell.number(row.peak_memory / 2**30, "{:.2f}"),
                Cell.number(row.act_ms, "{:.1f}"),
            )
            for row in found.rows
        ),
    )
    tables = [errors]
    if found.contrasts:
        title = "Paired differences of the held-out error, % of the control's"
        tables.append(_contrast_table("held-out-differences", title, found.contrasts, label))
    if found.less_data:
        title = f"{LESS_DATA}, held-out error, % of the control's"
        tables.append(_contrast_table("held-out-less-data", title, found.less_data, label))
    return tables
