"""What a matched comparison shows: a row for every arm, contrasts with controls, words that claim no more."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from spatial_forcing.analysis.audits import AuditRow, audit_table
from spatial_forcing.analysis.contrasts import (
    ArmContrast,
    Groups,
    contrast_columns,
    contrast_table,
    corrected_contrasts,
    csv_lines,
    in_words,
    on_less_data,
    on_the_same_data,
    worth_of_sight,
)
from spatial_forcing.analysis.held_out import HeldOut
from spatial_forcing.errors import DataError
from spatial_forcing.evaluation.paired import (
    LEVEL,
    Outcomes,
    PairedDifference,
    SeedOutcomes,
    Spread,
    macro_success,
    paired_difference,
    spread,
)
from spatial_forcing.evaluation.planning import Plan, StepsToThreshold, sample_sizes, steps_to_threshold

EFFECT = 0.05
"""The difference that the sample-size note plans for: five points."""
BOTH = (
    "Success and held-out error are two measures, each corrected for its own differences alone; say "
    "beforehand which of them decides."
)


@dataclass(frozen=True)
class RunRecord:
    """One finished run.

    Attributes:
        arm, fraction, seed: which.
        outcomes: success by (task, episode seed), by training step.
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
    def last_step(self) -> int:
        """The last evaluated step."""
        return max(self.outcomes)


@dataclass(frozen=True)
class ArmRow:
    """An arm on a part of the data.

    Attributes:
        arm, fraction: which.
        success: of the last step, over training seeds; `per_seed` and `per_task` are means.
        curve: mean success over seeds by step.
        steps: training steps to the threshold.
        seconds, peak_memory, act_ms: mean wall clock, largest memory, median time of one policy call.
    """

    arm: str
    fraction: float
    success: Spread
    per_seed: Mapping[int, float]
    per_task: Mapping[str, float]
    curve: Mapping[int, float]
    steps: StepsToThreshold
    seconds: float
    peak_memory: int
    act_ms: float | None


@dataclass(frozen=True)
class Contrast(ArmContrast[PairedDifference]):
    """An arm minus a control in success."""

    VERB, BETTER = "is", 1

    def found(self) -> str:
        """What differs by how much, in words."""
        arm, control = self.sides()
        return f"{arm} minus {control}{self.part()}: {self.difference} points"


@dataclass(frozen=True)
class Comparison:
    """All of it. `plans` say how many seeds it takes to show `EFFECT` at 80 % power.

    `less_data` are arms on less data against the first control on the most, corrected among themselves;
    `audits` are what the runs logged of their gradients.
    Without a simulator there are no rows, and `held_out` is what there is.
    """

    rows: tuple[ArmRow, ...]
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

    def sentences(self) -> list[str]:
        """The result in words, limits included."""
        said = [*self.remarks, *worth_of_sight(self.contrasts, "success, in points,")]
        for family in (self.contrasts, self.less_data):
            said += in_words(family, "Success, in points")
        if not (self.contrasts or (self.held_out and self.held_out.contrasts)):
            said.append("Nothing is compared yet: a difference needs two training seeds that both arms have.")
        if any(one.verdict == "not shown" for one in self.contrasts):
            said += [plan_sentence(plan, self.planned_for) for plan in self.plans[:1]]
        said += self.held_out.sentences() if self.held_out else []
        if self.contrasts and self.held_out and self.held_out.contrasts:
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
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            ["arm", "fraction", "seeds", "success", "low", "high", "sd_over_seeds",
             "median_steps_to_threshold", "steps_low", "steps_high", "reached", "train_seconds",
             "peak_memory_bytes", "act_ms", *contrast_columns("difference")]
        )  # fmt: skip
        for row in self.rows:
            s, t = row.success, row.steps
            own = [
                row.arm, row.fraction, s.seeds, s.mean, s.low, s.high, s.sd, t.median, t.low, t.high,
                t.reached, row.seconds, row.peak_memory, row.act_ms,
            ]  # fmt: skip
            writer.writerows(csv_lines(own, row.arm, row.fraction, (*self.contrasts, *self.less_data)))
        return text.getvalue()

    def tables(self) -> list[Table]:
        """What `rich.print` shows: success, held-out errors, audits, as far as they were measured."""
        subject = "Paired differences of success, in points"
        success = [
            self.table(),
            *contrast_table(self.contrasts, subject),
            *contrast_table(self.less_data, subject),
        ]
        errors = self.held_out.tables() if self.held_out else []
        return [*(success if self.rows else []), *errors, *audit_table(self.audits)]

    def table(self) -> Table:
        """Arms with success and cost."""
        table = Table(
            title=f"Success in %, {len(self.seeds)} training seeds, {self.episodes} episodes each",
            caption=" ".join(
                (f"95 % intervals over seeds; threshold {100 * self.threshold:.0f} %.", *self.remarks)
            ),
        )
        for column in ("arm", "data", "success", "sd"):
            table.add_column(column)
        for column in ("steps to threshold", "train s", "GiB", "act ms"):
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(
                row.arm,
                f"{100 * row.fraction:g} %",
                interval_text(row.success),
                f"{100 * row.success.sd:.1f}",
                str(row.steps),
                f"{row.seconds:.0f}",
                f"{row.peak_memory / 2**30:.2f}",
                "-" if row.act_ms is None else f"{row.act_ms:.1f}",
            )
        return table


def without_rollouts(seeds: Sequence[int], missing: Sequence[str], held_out: HeldOut) -> Comparison:
    """A comparison of held-out errors alone."""
    return Comparison((), (), (), "", 0.0, tuple(seeds), 0, tuple(missing), held_out=held_out)


def interval_text(s: Spread) -> str:
    """Success in %, with the interval of the mean where there is one."""
    if s.seeds == 1:
        return f"{100 * s.mean:.1f} (one seed)"
    return f"{100 * s.mean:.1f} [{100 * s.low:.1f}, {100 * s.high:.1f}]"


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
    if d.seed_sd == d.episode_sd == 0:
        return (), ""  # nothing varied, so there is no spread to plan with
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
    bootstraps: int = 10_000,
) -> Comparison:
    """From finished runs to rows, contrasts and words.

    Args:
        runs: of any arms, parts and seeds; each is compared where its partner is there.
        controls: arms that the others are compared with, the first one first. A control is itself compared
            with the controls before it.
        threshold: success rate of "steps to threshold"; None: the first control's mean on all data, or
            one solved episode where it solves none.
        missing: names of runs that are not finished.
        bootstraps: draws for each interval.

    Raises:
        DataError: no run, or arms with different episodes.
    """
    runs = list(runs)
    if not runs:
        raise DataError("no run is finished, so there is nothing to compare.")
    groups: dict[tuple[str, float], dict[int, RunRecord]] = {}
    for run in runs:
        groups.setdefault((run.arm, run.fraction), {})[run.seed] = run
    threshold = threshold if threshold is not None else _control_level(groups, controls[0])
    rows = tuple(_row(arm, fraction, found, threshold) for (arm, fraction), found in groups.items())

    def difference(treated: Mapping[int, RunRecord], other: Mapping[int, RunRecord]) -> PairedDifference:
        return paired_difference(_final(treated), _final(other), bootstraps=bootstraps)

    same, less = on_the_same_data(groups, controls), on_less_data(groups, controls[0])
    contrasts = corrected_contrasts(Contrast, groups, same, difference)
    first = runs[0].outcomes[runs[0].last_step]
    plans, planned_for = _plans(contrasts)
    return Comparison(
        rows=rows,
        contrasts=contrasts,
        plans=plans,
        planned_for=planned_for,
        threshold=threshold,
        seeds=tuple(sorted({run.seed for run in runs})),
        episodes=len(first),
        missing=tuple(missing),
        remarks=tuple(dict.fromkeys(remark for run in runs for remark in run.remarks)),
        less_data=corrected_contrasts(Contrast, groups, less, difference),
    )


def _final(found: Mapping[int, RunRecord]) -> SeedOutcomes:
    return {seed: run.outcomes[run.last_step] for seed, run in found.items()}


def _control_level(groups: Groups[RunRecord], control: str) -> float:
    """Mean success of the control on the most data; of everything where it is not there yet.

    At least one episode's worth: a policy that solves nothing would else reach the threshold at once.
    """
    mine = {fraction: found for (arm, fraction), found in groups.items() if arm == control}
    chosen = [mine[max(mine)]] if mine else list(groups.values())
    level = float(np.mean([spread(_final(found)).mean for found in chosen]))
    return max(level, 1 / max(len(won) for found in chosen for won in _final(found).values()))


def _row(arm: str, fraction: float, found: Mapping[int, RunRecord], threshold: float) -> ArmRow:
    final = _final(found)
    curves = {s: {step: macro_success(o) for step, o in run.outcomes.items()} for s, run in found.items()}
    steps = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    tasks = sorted({task for task, _ in next(iter(final.values()))})
    per_task = {
        task: float(np.mean([won for o in final.values() for (name, _), won in o.items() if name == task]))
        for task in tasks
    }
    times = [run.act_ms for run in found.values() if run.act_ms is not None]
    return ArmRow(
        arm=arm,
        fraction=fraction,
        success=spread(final),
        per_seed={seed: macro_success(o) for seed, o in final.items()},
        per_task=per_task,
        curve={step: float(np.mean([curve[step] for curve in curves.values()])) for step in steps},
        steps=steps_to_threshold(curves, threshold),
        seconds=float(np.mean([run.seconds for run in found.values()])),
        peak_memory=max(run.peak_memory for run in found.values()),
        act_ms=float(np.median(times)) if times else None,
    )
