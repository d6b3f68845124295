"""Why arms differ, as far as gradients say it: the audit of every run, gathered by arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from spatial_forcing.analysis.representation import audit_curves
from spatial_forcing.storage import csv_text

ALL = "all"
"""The place that stands for everything which both losses reach."""

Curve = Mapping[int, float]
"""A value by training step."""
Curves = Mapping[str, Mapping[str, tuple[list[float], list[float]]]]
"""What `audit_curves` finds in a run."""


@dataclass(frozen=True)
class AuditRecord:
    """A run of an arm, and its metrics lines (those with `audit/...` entries are read)."""

    arm: str
    fraction: float
    lines: Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class AuditRow:
    """The audits of an arm at one place of the student; means over its runs.

    Attributes:
        arm, fraction: which.
        place: a block, `input` for what lies before them, or `all`.
        seeds: runs with an audit.
        cosine, ratio: of the two gradients (alignment's norm over action's, alpha not included), over the
            training.
        cosines, ratios: the same by step, for the place `all`; empty for the others.
    """

    arm: str
    fraction: float
    place: str
    seeds: int
    cosine: float
    ratio: float
    cosines: Curve
    ratios: Curve


def audit_rows(records: Sequence[AuditRecord]) -> tuple[AuditRow, ...]:
    """A row for each arm and place; runs without an audit (alpha 0, or no `audit_every`) are left out."""
    groups: dict[tuple[str, float], list[Curves]] = {}
    for record in records:
        curves = audit_curves(record.lines)
        if curves["cosine"]:
            groups.setdefault((record.arm, record.fraction), []).append(curves)
    return tuple(
        _row(arm, fraction, place, runs)
        for (arm, fraction), runs in groups.items()
        for place in sorted(set.intersection(*(set(run["cosine"]) for run in runs)), key=_order)
    )


def _order(place: str) -> tuple[str, int]:
    """`all`, then blocks by their number, then `input`."""
    number = place.lstrip("abcdefghijklmnopqrstuvwxyz")
    return place.removesuffix(number), int(number or 0)


def _row(arm: str, fraction: float, place: str, runs: Sequence[Curves]) -> AuditRow:
    cosines, ratios = _mean(runs, "cosine", place), _mean(runs, "ratio", place)
    return AuditRow(
        arm=arm,
        fraction=fraction,
        place=place,
        seeds=len(runs),
        cosine=float(np.mean(list(cosines.values()))),
        ratio=float(np.mean(list(ratios.values()))),
        cosines=cosines if place == ALL else {},
        ratios=ratios if place == ALL else {},
    )


def _mean(runs: Sequence[Curves], kind: str, place: str) -> Curve:
    """The mean over runs, at the steps that all runs have."""
    found = [dict(zip(*run[kind][place], strict=True)) for run in runs]
    steps = sorted(set.intersection(*(set(curve) for curve in found)))
    return {int(step): float(np.mean([curve[step] for curve in found])) for step in steps}


def whole(rows: Sequence[AuditRow]) -> list[AuditRow]:
    """The rows that cover all parameters which both losses reach."""
    return [row for row in rows if row.place == ALL]


def audit_csv(rows: Sequence[AuditRow]) -> str:
    """A line for each arm and place."""
    lines = ((r.arm, r.fraction, r.place, r.seeds, r.cosine, r.ratio) for r in rows)
    return csv_text(("arm", "fraction", "place", "seeds", "cosine", "ratio"), lines)


def audit_table(rows: Sequence[AuditRow]) -> list[Table]:
    """A row for each arm, for `rich.print`; empty without an audit."""
    if not rows:
        return []
    table = Table(
        title="Gradient audit: alignment against action loss",
        caption="Means over training and seeds; alpha is not included. A cosine near 0: the losses neither "
        "help nor hinder each other directly.",
    )
    for column in ("arm", "data"):
        table.add_column(column)
    for column in ("cosine", "norm ratio"):
        table.add_column(column, justify="right")
    for row in whole(rows):
        table.add_row(row.arm, f"{100 * row.fraction:g} %", f"{row.cosine:+.3f}", f"{row.ratio:.2f}")
    return [table]
