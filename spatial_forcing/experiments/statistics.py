"""What finished runs show: a row for every arm, contrasts with controls, words that claim no more.

Two measures are treated alike: success in closed loop, and the error on demonstrations that were held out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from spatial_forcing.errors import DataError
from spatial_forcing.evaluation.paired import (
    LEVEL,
    NOT_SHOWN,
    Outcomes,
    PairedDifference,
    SeedOutcomes,
    Spread,
    macro_average,
    mean_reach,
    paired_difference,
    paired_error,
    spread,
)
from spatial_forcing.evaluation.planning import Plan, StepsToThreshold, sample_sizes, steps_to_threshold
from spatial_forcing.experiments.audits import AuditRow, audit_table
from spatial_forcing.experiments.contrasts import (
    ERROR,
    SUCCESS,
    Contrast,
    Groups,
    Measure,
    contrast_columns,
    contrast_table,
    corrected_contrasts,
    csv_lines,
    on_less_data,
    on_the_same_data,
    shown_in_words,
    unclear_in_words,
    worth_of_sight,
)
from spatial_forcing.storage import csv_text

EFFECT = 0.05
"""The difference that the sample-size note plans for: five points."""
BOTH = (
    "Success and held-out error are two measures, each corrected for its own differences alone; say "
    "beforehand which of them decides."
)
MEANING = (
    "The held-out error says how well demonstrations are predicted, not how often a task is solved: it can "
    "show that arms differ, and cannot show that a robot does better."
)


@dataclass(frozen=True)
class RunRecord:
    """One finished run.

    Attributes:
        arm, fraction, seed: which.
        outcomes: by training step, success or error by (task, episode).
        seconds: wall clock in the training loop.
        peak_memory: bytes.
        act_ms: milliseconds of one call of the policy with one observation; None where not measured.
        remarks: what must stand beside its figures; see `evaluation.results.remarks`.
    """

    arm: str
    fraction: float
    seed: int
    outcomes: Mapping[int, Outcomes]
    seconds: float
    peak_memory: int
    act_ms: float | None = None
    remarks: tuple[str, ...] = ()

    @property
    def final(self) -> Outcomes:
        """The outcomes of the last evaluated step."""
        return self.outcomes[max(self.outcomes)]


@dataclass(frozen=True, kw_only=True)
class Row:
    """An arm on a part of the data.

    Attributes:
        arm, fraction: which.
        per_seed: mean after the last step.
        curve: mean over seeds by step.
        seconds, peak_memory, act_ms: mean wall clock, largest memory (bytes), median time of one policy call.
    """

    arm: str
    fraction: float
    per_seed: Mapping[int, float]
    curve: Mapping[int, float]
    seconds: float
    peak_memory: int
    act_ms: float | None

    @property
    def costs(self) -> list[float | int | None]:
        """The last three, as a CSV holds them."""
        return [self.seconds, self.peak_memory, self.act_ms]


@dataclass(frozen=True, kw_only=True)
class SuccessRow(Row):
    """Success of an arm after the last step: over seeds, by task; and training steps to the threshold."""

    success: Spread
    per_task: Mapping[str, float]
    steps: StepsToThreshold


@dataclass(frozen=True, kw_only=True)
class ErrorRow(Row):
    """Held-out error of an arm: mean over seeds after the last step, in standard deviations of the actions.

    `low`, `high`: 95 % interval of the mean; None with one seed.
    """

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        known = self.low is not None and self.high is not None
        return f"{self.mean:.4f} " + (f"[{self.low:.4f}, {self.high:.4f}]" if known else "(one seed)")


@dataclass(frozen=True)
class HeldOut:
    """Held-out errors of all arms; `episodes` were held out, `less_data` as in `Comparison`."""

    rows: tuple[ErrorRow, ...]
    contrasts: tuple[Contrast, ...]
    episodes: int
    less_data: tuple[Contrast, ...] = ()

    def csv(self) -> str:
        """A line for each arm and control, the control's other parts of the data included."""
        header = ["error", "low", "high", "train_seconds", "peak_memory_bytes", "act_ms"]
        lines = [(row, [row.mean, row.low, row.high, *row.costs]) for row in self.rows]
        return _csv(header, "relative_difference", lines, (*self.contrasts, *self.less_data))

    def tables(self) -> list[Table]:
        """Arms with their error and cost, then their paired differences, for `rich.print`."""
        table = _table(
            f"Error on {self.episodes} held-out episodes, in standard deviations of the actions",
            "95 % intervals over seeds; lower is better.",
            ("error",),
            ("train s", "act ms"),
        )
        for row in self.rows:
            table.add_row(*_which(row), str(row), f"{row.seconds:.0f}", _milliseconds(row))
        return [table, *contrast_table(self.contrasts), *contrast_table(self.less_data)]


@dataclass(frozen=True)
class Comparison:
    """All of it. `plans` say how many seeds it takes to show `EFFECT` at 80 % power.

    `less_data` are arms on less data against the first control on the most, corrected among themselves;
    `audits` are what the runs logged of their gradients, `depth` what a probe of their policies found.
    Without a simulator there are no rows, and `held_out` is what there is.
    """

    rows: tuple[SuccessRow, ...]
    contrasts: tuple[Contrast, ...]
    plans: tuple[Plan | None, ...]
    planned_for: str
    threshold: float
    seeds: tuple[int, ...]
    episodes: int
    missing: tuple[str, ...]
    remarks: tuple[str, ...] = ()
    held_out: HeldOut | None = None
    less_data: tuple[Contrast, ...] = ()
    audits: tuple[AuditRow, ...] = ()
    depth: tuple[Contrast, ...] = ()

    def sentences(self) -> list[str]:
        """The result in words: what is shown, success first; then what is not, and the limits of both."""
        errors = self.held_out.contrasts if self.held_out else ()
        less_errors = self.held_out.less_data if self.held_out else ()
        families = (self.contrasts, errors, self.depth, self.less_data, less_errors)
        said = [sentence for family in families for sentence in shown_in_words(family)]
        said += [sentence for family in families for sentence in unclear_in_words(family)]
        if not (self.contrasts or errors):
            said.append("Nothing is compared yet: a difference needs training seeds that both arms have.")
        if any(one.verdict == NOT_SHOWN for one in self.contrasts):
            said += [plan_sentence(plan, self.planned_for) for plan in self.plans[:1]]
        said += [*worth_of_sight(self.contrasts), *worth_of_sight(errors), *self.remarks]
        said += [MEANING] if self.held_out else []
        if self.contrasts and errors:
            said.append(BOTH)
        if self.missing:
            said.append(f"Not finished and not counted: {', '.join(self.missing)}.")
        return said

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        plain: dict[str, Any] = asdict(self)
        return plain | {"sentences": self.sentences()}

    def csv(self) -> str:
        """A line for each arm and control, the control's other parts of the data included."""
        header = [
            "success", "low", "high", "sd_over_seeds", "median_steps_to_threshold", "steps_low", "steps_high",
            "reached", "train_seconds", "peak_memory_bytes", "act_ms",
        ]  # fmt: skip
        lines = [
            (row, [s.mean, s.low, s.high, s.sd, t.median, t.low, t.high, t.reached, *row.costs])
            for row in self.rows
            for s, t in ((row.success, row.steps),)
        ]
        return _csv(header, "difference", lines, (*self.contrasts, *self.less_data))

    def tables(self) -> list[Table]:
        """What `rich.print` shows: success, held-out errors, audits, as far as they were measured."""
        success = [self.table(), *contrast_table(self.contrasts), *contrast_table(self.less_data)]
        errors = self.held_out.tables() if self.held_out else []
        return [*(success if self.rows else []), *errors, *audit_table(self.audits)]

    def table(self) -> Table:
        """Arms with success and cost."""
        many = f"{len(self.seeds)} training seeds" if len(self.seeds) > 1 else "one training seed"
        over = "seeds" if len(self.seeds) > 1 else "episodes"
        table = _table(
            f"Success in %, {many}, {self.episodes} episodes each",
            " ".join((f"95 % intervals over {over}; threshold {100 * self.threshold:.0f} %.", *self.remarks)),
            ("success", "sd"),
            ("steps to threshold", "train s", "GiB", "act ms"),
        )
        for row in self.rows:
            table.add_row(
                *_which(row),
                f"{100 * row.success.mean:.1f} [{100 * row.success.low:.1f}, {100 * row.success.high:.1f}]",
                f"{100 * row.success.sd:.1f}" if row.success.seeds > 1 else "-",
                str(row.steps),
                f"{row.seconds:.0f}",
                f"{row.peak_memory / 2**30:.2f}",
                _milliseconds(row),
            )
        return table


def _csv(
    header: Sequence[str],
    difference: str,
    lines: Iterable[tuple[Row, list[Any]]],
    contrasts: Sequence[Contrast],
) -> str:
    made = (
        line
        for row, figures in lines
        for own in [[row.arm, row.fraction, len(row.per_seed), *figures]]
        for line in csv_lines(own, row.arm, row.fraction, contrasts)
    )
    return csv_text(["arm", "fraction", "seeds", *header, *contrast_columns(difference)], made)


def _table(title: str, caption: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, caption=caption)
    for column in ("arm", "data", *words):
        table.add_column(column)
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def _which(row: Row) -> tuple[str, str]:
    return row.arm, f"{100 * row.fraction:g} %"


def _milliseconds(row: Row) -> str:
    return "-" if row.act_ms is None else f"{row.act_ms:.1f}"


def without_rollouts(seeds: Sequence[int], missing: Sequence[str], held_out: HeldOut) -> Comparison:
    """A comparison of held-out errors alone."""
    return Comparison((), (), (), "", 0.0, tuple(seeds), 0, tuple(missing), held_out=held_out)


def plan_sentence(plan: Plan | None, spread_of: str) -> str:
    """How large a comparison must be to see five points."""
    goal = f"To see {100 * EFFECT:.0f} points at 80 % power with the spread of {spread_of}"
    if plan is None:
        return f"{goal}, more than a thousand seeds are needed."
    return f"{goal}, {plan.episodes} episodes x {plan.seeds} seeds are needed."


def _plans(contrasts: Sequence[Contrast]) -> tuple[tuple[Plan | None, ...], str]:
    """Sizes that would show `EFFECT`, and whose spread they rest on: the first contrast's on the most data.

    The level is what the smallest of the corrected p-values has to stay below.
    """
    if not contrasts:
        return (), ""
    chosen = max(contrasts, key=lambda c: c.fraction)
    d, level = chosen.difference, LEVEL / len(contrasts)
    if d.seeds == 1 or d.seed_sd == d.episode_sd == 0:
        return (), ""  # there is no spread to plan with
    plans = sample_sizes(
        EFFECT,
        seed_sd=d.seed_sd,
        episode_sd=d.episode_sd,
        episodes=(d.episodes, 2 * d.episodes, 4 * d.episodes),
        alpha=level,
    )
    number = f" / {len(contrasts)} differences" if len(contrasts) > 1 else ""
    return tuple(plans), (
        f"{chosen.arm} minus {chosen.control}{chosen.part()} (standard deviation {d.seed_sd:.2f} over seeds, "
        f"{d.episode_sd:.2f} over a seed's episodes) at level {LEVEL:g}{number}"
    )


def analyse(
    runs: Iterable[RunRecord],
    *,
    controls: Sequence[str],
    threshold: float | None = None,
    missing: Sequence[str] = (),
) -> Comparison:
    """From the success of finished runs to rows, contrasts and words.

    Args:
        runs: of any arms, parts and seeds; each is compared where its partner is there.
        controls: arms that the others are compared with, the first one first. A control is itself compared
            with the controls before it.
        threshold: success rate of "steps to threshold"; None: the first control's mean on all data, or
            one solved episode where it solves none.
        missing: names of runs that are not finished.

    Raises:
        DataError: no run, or arms with different episodes.
    """
    runs = list(runs)
    groups = _groups(runs)
    threshold = threshold if threshold is not None else _control_level(groups, controls[0])
    contrasts, less = _families(groups, controls, paired_difference, SUCCESS)
    plans, planned_for = _plans(contrasts)
    return Comparison(
        rows=tuple(
            _success_row(arm, fraction, group, threshold) for (arm, fraction), group in groups.items()
        ),
        contrasts=contrasts,
        plans=plans,
        planned_for=planned_for,
        threshold=threshold,
        seeds=tuple(sorted({run.seed for run in runs})),
        episodes=len(runs[0].final),
        missing=tuple(missing),
        remarks=tuple(dict.fromkeys(remark for run in runs for remark in run.remarks)),
        less_data=less,
    )


def analyse_errors(runs: Sequence[RunRecord], *, controls: Sequence[str]) -> HeldOut:
    """From the held-out errors of finished runs (see `evaluation.open_loop`) to rows, contrasts and words.

    Args:
        runs, controls: as in `analyse`.

    Raises:
        DataError: no run, or arms with different episodes.
    """
    groups = _groups(runs)
    contrasts, less = _families(groups, controls, paired_error, ERROR)
    rows = tuple(_error_row(arm, fraction, group) for (arm, fraction), group in groups.items())
    return HeldOut(rows, contrasts, len(runs[0].final), less)


def _groups(runs: Sequence[RunRecord]) -> dict[tuple[str, float], dict[int, RunRecord]]:
    if not runs:
        raise DataError("no run is finished, so there is nothing to compare.")
    groups: dict[tuple[str, float], dict[int, RunRecord]] = {}
    for run in runs:
        groups.setdefault((run.arm, run.fraction), {})[run.seed] = run
    return groups


def _families(
    groups: Groups[RunRecord], controls: Sequence[str], paired: Any, measure: Measure
) -> tuple[tuple[Contrast, ...], tuple[Contrast, ...]]:
    """Contrasts on the same data, and on less data than the first control's most."""

    def difference(treated: Mapping[int, RunRecord], other: Mapping[int, RunRecord]) -> PairedDifference:
        made: PairedDifference = paired(_final(treated), _final(other))
        return made

    return (
        corrected_contrasts(groups, on_the_same_data(groups, controls), difference, measure),
        corrected_contrasts(groups, on_less_data(groups, controls[0]), difference, measure),
    )


def _final(group: Mapping[int, RunRecord]) -> SeedOutcomes:
    return {seed: run.final for seed, run in group.items()}


def _control_level(groups: Groups[RunRecord], control: str) -> float:
    """Mean success of the control on the most data; of everything where it is not there yet.

    At least one episode's worth: a policy that solves nothing would else reach the threshold at once.
    """
    mine = {fraction: group for (arm, fraction), group in groups.items() if arm == control}
    chosen = [mine[max(mine)]] if mine else list(groups.values())
    level = float(np.mean([spread(_final(group)).mean for group in chosen]))
    return max(level, 1 / max(len(won) for group in chosen for won in _final(group).values()))


def _curves(group: Mapping[int, RunRecord]) -> dict[int, dict[int, float]]:
    """Mean outcome by step, by seed."""
    return {s: {step: macro_average(o) for step, o in run.outcomes.items()} for s, run in group.items()}


def _common(arm: str, fraction: float, group: Mapping[int, RunRecord]) -> dict[str, Any]:
    """What every `Row` holds."""
    curves = _curves(group)
    steps = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    times = [run.act_ms for run in group.values() if run.act_ms is not None]
    return {
        "arm": arm,
        "fraction": fraction,
        "per_seed": {seed: curve[max(curve)] for seed, curve in curves.items()},
        "curve": {step: float(np.mean([curve[step] for curve in curves.values()])) for step in steps},
        "seconds": float(np.mean([run.seconds for run in group.values()])),
        "peak_memory": max(run.peak_memory for run in group.values()),
        "act_ms": float(np.median(times)) if times else None,
    }


def _success_row(arm: str, fraction: float, group: Mapping[int, RunRecord], threshold: float) -> SuccessRow:
    final = _final(group)
    tasks = sorted({task for task, _ in next(iter(final.values()))})
    return SuccessRow(
        **_common(arm, fraction, group),
        success=spread(final),
        per_task={
            task: float(
                np.mean([won for o in final.values() for (name, _), won in o.items() if name == task])
            )
            for task in tasks
        },
        steps=steps_to_threshold(_curves(group), threshold),
    )


def _error_row(arm: str, fraction: float, group: Mapping[int, RunRecord]) -> ErrorRow:
    common = _common(arm, fraction, group)
    values = np.array(list(common["per_seed"].values()))
    mean = float(values.mean())
    reach = mean_reach(float(values.std(ddof=1)), len(values)) if len(values) > 1 else None
    return ErrorRow(
        **common,
        mean=mean,
        low=None if reach is None else max(0.0, mean - reach),
        high=None if reach is None else mean + reach,
    )
