"""What a matched comparison shows without a simulator: the error on demonstrations that were held out."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np
from rich.table import Table

from spatial_forcing.analysis.contrasts import (
    ArmContrast,
    contrast_columns,
    contrast_table,
    corrected_contrasts,
    csv_lines,
    in_words,
    on_less_data,
    on_the_same_data,
    worth_of_sight,
)
from spatial_forcing.errors import DataError
from spatial_forcing.evaluation.paired import (
    ErrorDifference,
    Errors,
    macro_error,
    mean_reach,
    paired_error,
)

MEANING = (
    "The held-out error says how well demonstrations are predicted, not how often a task is solved: it can "
    "show that arms differ, and cannot show that a robot does better."
)


@dataclass(frozen=True)
class ErrorRecord:
    """One finished run: which, its errors by training step (see `evaluation.open_loop`), and its cost.

    `seconds`, `peak_memory` and `act_ms` are those of `comparison.RunRecord`.
    """

    arm: str
    fraction: float
    seed: int
    errors: Mapping[int, Errors]
    seconds: float
    peak_memory: int
    act_ms: float | None = None


@dataclass(frozen=True)
class ErrorRow:
    """An arm on a part of the data.

    Attributes:
        arm, fraction: which.
        mean: error after the last step, over training seeds, in standard deviations of the actions.
        low, high: 95 % interval of the mean; None with one seed.
        per_seed: after the last step.
        curve: mean over seeds by step.
        seconds, peak_memory, act_ms: mean wall clock, largest memory, median time of one policy call.
    """

    arm: str
    fraction: float
    mean: float
    low: float | None
    high: float | None
    per_seed: Mapping[int, float]
    curve: Mapping[int, float]
    seconds: float
    peak_memory: int
    act_ms: float | None

    def __str__(self) -> str:
        known = self.low is not None and self.high is not None
        return f"{self.mean:.4f} " + (f"[{self.low:.4f}, {self.high:.4f}]" if known else "(one seed)")


@dataclass(frozen=True)
class ErrorContrast(ArmContrast[ErrorDifference]):
    """An arm against a control in held-out error; a lower one is better."""

    VERB, BETTER = "predicts", -1

    def found(self) -> str:
        """What differs by how much, in words."""
        arm, control = self.sides()
        return f"Held-out error, {arm} against {control}{self.part()}: {self.difference}"


@dataclass(frozen=True)
class HeldOut:
    """All of it; `episodes` were held out, `less_data` are arms on less data against the control's most."""

    rows: tuple[ErrorRow, ...]
    contrasts: tuple[ErrorContrast, ...]
    episodes: int
    less_data: tuple[ErrorContrast, ...] = ()

    def sentences(self) -> list[str]:
        """The result in words, limits included."""
        sight = worth_of_sight(self.contrasts, "the held-out error")
        found = (in_words(family, "Held-out error") for family in (self.contrasts, self.less_data))
        return [*sight, *chain(*found), MEANING]

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        plain: dict[str, Any] = asdict(self)
        return plain | {"sentences": self.sentences()}

    def csv(self) -> str:
        """A line for each arm and control, the control's other parts of the data included."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            ["arm", "fraction", "seeds", "error", "low", "high", "train_seconds", "peak_memory_bytes",
             "act_ms", *contrast_columns("relative_difference")]
        )  # fmt: skip
        for row in self.rows:
            cost = [row.seconds, row.peak_memory, row.act_ms]
            own = [row.arm, row.fraction, len(row.per_seed), row.mean, row.low, row.high, *cost]
            writer.writerows(csv_lines(own, row.arm, row.fraction, (*self.contrasts, *self.less_data)))
        return text.getvalue()

    def tables(self) -> list[Table]:
        """Arms with their error and cost, then their paired differences, for `rich.print`."""
        table = Table(
            title=f"Error on {self.episodes} held-out episodes, in standard deviations of the actions",
            caption="95 % intervals over seeds; lower is better.",
        )
        for column in ("arm", "data", "error"):
            table.add_column(column)
        for column in ("train s", "act ms"):
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(
                row.arm,
                f"{100 * row.fraction:g} %",
                str(row),
                f"{row.seconds:.0f}",
                "-" if row.act_ms is None else f"{row.act_ms:.1f}",
            )
        subject = "Paired differences of held-out error"
        return [
            table,
            *contrast_table(self.contrasts, subject),
            *contrast_table(self.less_data, subject),
        ]


def analyse_errors(
    runs: Sequence[ErrorRecord], *, controls: Sequence[str], bootstraps: int = 10_000
) -> HeldOut:
    """From finished runs to rows, contrasts and words.

    Args:
        runs: of any arms, parts and seeds; each is compared where its partner is there.
        controls: as in `comparison.analyse`.
        bootstraps: draws for each interval.

    Raises:
        DataError: no run, or arms with different episodes.
    """
    if not runs:
        raise DataError("no run is finished, so there is no held-out error to compare.")
    groups: dict[tuple[str, float], dict[int, ErrorRecord]] = {}
    for run in runs:
        groups.setdefault((run.arm, run.fraction), {})[run.seed] = run

    def difference(treated: Mapping[int, ErrorRecord], other: Mapping[int, ErrorRecord]) -> ErrorDifference:
        return paired_error(_final(treated), _final(other), bootstraps=bootstraps)

    same, less = on_the_same_data(groups, controls), on_less_data(groups, controls[0])
    return HeldOut(
        rows=tuple(_row(arm, fraction, found) for (arm, fraction), found in groups.items()),
        contrasts=corrected_contrasts(ErrorContrast, groups, same, difference),
        episodes=len(_last(runs[0])),
        less_data=corrected_contrasts(ErrorContrast, groups, less, difference),
    )


def _last(run: ErrorRecord) -> Errors:
    return run.errors[max(run.errors)]


def _row(arm: str, fraction: float, found: Mapping[int, ErrorRecord]) -> ErrorRow:
    curves = {s: {step: macro_error(e) for step, e in run.errors.items()} for s, run in found.items()}
    steps = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    per_seed = {s: curve[max(curve)] for s, curve in curves.items()}
    values = np.array(list(per_seed.values()))
    mean = float(values.mean())
    reach = mean_reach(float(values.std(ddof=1)), len(values)) if len(values) > 1 else None
    times = [run.act_ms for run in found.values() if run.act_ms is not None]
    return ErrorRow(
        arm=arm,
        fraction=fraction,
        mean=mean,
        low=None if reach is None else max(0.0, mean - reach),
        high=None if reach is None else mean + reach,
        per_seed=per_seed,
        curve={step: float(np.mean([curve[step] for curve in curves.values()])) for step in steps},
        seconds=float(np.mean([run.seconds for run in found.values()])),
        peak_memory=max(run.peak_memory for run in found.values()),
        act_ms=float(np.median(times)) if times else None,
    )


def _final(found: Mapping[int, ErrorRecord]) -> dict[int, Errors]:
    return {seed: _last(run) for seed, run in found.items()}
