"""Arms against controls: which pairs are compared, the correction over them, and the result in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Self, TypeVar

from rich.table import Table

from spatial_forcing.evaluation.paired import NOT_SHOWN, PairedDifference, holm, p_text, verdict_of
from spatial_forcing.experiments.arms import BLIND

MANY = 3
"""More differences than this that are not shown are said in one sentence for each control."""


class Measure(StrEnum):
    """What a difference is of; results hold its value, sentences its words.

    Attributes:
        subject: what was measured.
        unit: of a difference, after its interval.
        joint: between arm and control.
        verdict: with the places `{arm}`, `{verdict}` and `{control}`.
    """

    subject: str
    unit: str
    joint: str
    verdict: str

    def __new__(cls, value: str, subject: str, unit: str, joint: str, verdict: str) -> Self:
        """A member by its value, with its words."""
        made = str.__new__(cls, value)
        made._value_ = value
        made.subject, made.unit, made.joint, made.verdict = subject, unit, joint, verdict
        return made

    SUCCESS = "success", "Success", " points", "minus", "{arm} is {verdict} than {control}"
    ERROR = "held-out error", "Held-out error", "", "against", "{arm} predicts {verdict} than {control}"
    DEPTH = (
        "depth error",
        "Error of depth that a linear probe reads from the frozen tokens",
        "",
        "against",
        "depth is read {verdict} from the tokens of {arm} than of {control}",
    )


SUCCESS, ERROR, DEPTH = Measure

Run = TypeVar("Run")
Groups = Mapping[tuple[str, float], Mapping[int, Run]]
"""Runs by training seed, by (arm, part of the data)."""


class Pair(NamedTuple):
    """An arm and a control, each on a part of the data."""

    arm: str
    control: str
    fraction: float
    control_fraction: float


@dataclass(frozen=True)
class Contrast:
    """An arm against a control, paired by training seed.

    `p_holm` is corrected over all contrasts of their family; `verdict` is better, worse or not shown.
    """

    arm: str
    control: str
    fraction: float
    control_fraction: float
    difference: PairedDifference
    p_holm: float
    verdict: str
    measure: Measure = SUCCESS

    def sentence(self) -> str:
        """What was measured, in words."""
        d, (arm, control), said = self.difference, self.sides(), self.measure
        measured = f"{said.subject}, {arm} {said.joint} {control}{self.part()}: {d}{said.unit}"
        measured += (
            f" over {d.seeds} training seeds (95 % interval), Holm-corrected p {p_text(self.p_holm)}."
            if d.seeds > 1
            else f" with one training seed (95 % interval over {d.episodes} episodes, not over training "
            f"seeds), Holm-corrected p {p_text(self.p_holm)}."
        )
        if self.verdict == NOT_SHOWN:
            return f"{measured} A difference is not shown."
        if d.seeds == 1:
            arm, control = f"this policy of {arm}", f"this one of {control}"
        verdict = said.verdict.format(arm=arm, verdict=self.verdict, control=control)
        return f"{measured} Here {verdict}."

    def sides(self) -> tuple[str, str]:
        """Arm and control, each with its part of the data where the two differ in it."""
        if self.fraction == self.control_fraction:
            return self.arm, self.control
        return self.arm + _on(self.fraction), self.control + _on(self.control_fraction)

    def part(self) -> str:
        """Which part of the data both have, as the end of a phrase; empty for all, or where they differ."""
        alike = self.fraction == self.control_fraction
        return _on(self.fraction) if alike and self.fraction < 1 else ""


def _on(fraction: float) -> str:
    return " on all demonstrations" if fraction == 1 else f" on {100 * fraction:g} % of the demonstrations"


def on_the_same_data(groups: Groups[Any], controls: Sequence[str]) -> list[Pair]:
    """Every arm with every control on the same part of the data, where they share enough training seeds.

    Args:
        groups: of all arms.
        controls: a control is itself compared with those before it.
    """
    return [
        Pair(arm, control, fraction, fraction)
        for position, control in enumerate(controls)
        for arm, fraction in groups
        if arm not in controls[: position + 1] and _comparable(groups, (arm, fraction), (control, fraction))
    ]


def on_less_data(groups: Groups[Any], control: str) -> list[Pair]:
    """Every arm, the control too, on less data than the control's most: data efficiency.

    Args:
        groups: of all arms.
        control: the arm whose runs on the most data are the measure.
    """
    most = max((fraction for arm, fraction in groups if arm == control), default=0.0)
    return [
        Pair(arm, control, fraction, most)
        for arm, fraction in groups
        if fraction < most and _comparable(groups, (arm, fraction), (control, most))
    ]


def _comparable(groups: Groups[Any], treated: tuple[str, float], control: tuple[str, float]) -> bool:
    """Whether the two share two training seeds; one is enough where no run has another."""
    seeds = {seed for runs in groups.values() for seed in runs}
    return len(groups[treated].keys() & groups.get(control, {}).keys()) >= min(2, len(seeds))


def corrected_contrasts(
    groups: Groups[Run],
    pairs: Sequence[Pair],
    difference: Callable[[Mapping[int, Run], Mapping[int, Run]], PairedDifference],
    measure: Measure = SUCCESS,
) -> tuple[Contrast, ...]:
    """One family of contrasts: its p-values are corrected together (Holm).

    Args:
        groups: of all arms.
        pairs: what is compared.
        difference: of treated and control runs.
        measure: what it is of.
    """
    made = [difference(groups[p.arm, p.fraction], groups[p.control, p.control_fraction]) for p in pairs]
    adjusted = holm({str(number): one.p_value for number, one in enumerate(made)})
    return tuple(
        Contrast(*pair, one, p_holm, verdict_of(_gain(one), p_holm), measure)
        for pair, one, p_holm in zip(pairs, made, adjusted.values(), strict=True)
    )


def _gain(difference: PairedDifference) -> float:
    return -difference.value if difference.relative else difference.value


def shown_in_words(contrasts: Iterable[Contrast]) -> list[str]:
    """A sentence for each contrast that is shown."""
    return [one.sentence() for one in contrasts if one.verdict != NOT_SHOWN]


def unclear_in_words(contrasts: Sequence[Contrast]) -> list[str]:
    """A sentence for each contrast that is not shown; many are gathered."""
    unclear = [one for one in contrasts if one.verdict == NOT_SHOWN]
    if len(unclear) <= MANY:
        return [one.sentence() for one in unclear]
    measure = contrasts[0].measure
    subject = ", in".join(filter(None, (measure.subject, measure.unit)))
    groups: dict[str, list[Contrast]] = {}
    for one in unclear:
        groups.setdefault(one.sides()[1], []).append(one)
    return [
        f"{subject}, against {control}, a difference is not shown for any of these: "
        + "; ".join(f"{one.sides()[0]}{one.part()} {one.difference}" for one in group)
        + f" (95 % intervals; Holm-corrected p at least {min(one.p_holm for one in group):.3f})."
        for control, group in groups.items()
    ]


def contrast_columns(difference: str) -> list[str]:
    """Header of what `csv_lines` adds; `difference` names the column of the estimate."""
    return ["control", "control_fraction", difference, "difference_low", "difference_high", "p", "p_holm",
            "verdict"]  # fmt: skip


def csv_lines(
    own: Sequence[object], arm: str, fraction: float, contrasts: Iterable[Contrast]
) -> list[list[object]]:
    """The CSV lines of an arm: its figures, and one contrast a line.

    Args:
        own: figures of the arm on that part of the data.
        arm, fraction: which.
        contrasts: of all arms and families.
    """
    lines: list[list[object]] = [
        [*own, c.control, c.control_fraction, d.value, d.low, d.high, d.p_value, c.p_holm, c.verdict]
        for c in contrasts
        if (c.arm, c.fraction) == (arm, fraction)
        for d in (c.difference,)
    ]
    return lines or [[*own, *[""] * len(contrast_columns(""))]]


def contrast_table(contrasts: Sequence[Contrast]) -> list[Table]:
    """A row for each contrast, so that no p-value stands beside another's difference; empty without any."""
    if not contrasts:
        return []
    first = contrasts[0]
    title = "Paired differences of " + ", in".join(
        filter(None, (first.measure.subject.lower(), first.measure.unit))
    )
    if first.fraction != first.control_fraction:
        title += f", against {first.sides()[1]}"
    over = "seeds" if first.difference.seeds > 1 else "the episodes of one seed"
    table = Table(
        title=title, caption=f"95 % intervals over {over}; p after Holm's correction over all rows."
    )
    for column in ("arm", "data", "against", "difference", "p", "verdict"):
        table.add_column(column)
    for one in contrasts:
        table.add_row(
            one.arm,
            f"{100 * one.fraction:g} %",
            one.control,
            str(one.difference),
            p_text(one.p_holm).removeprefix("= "),
            one.verdict,
        )
    return [table]


def worth_of_sight(contrasts: Iterable[Contrast]) -> list[str]:
    """Whether the comparison could show what an arm sees: a sentence for each part with a blind arm.

    Where blanked images are not shown to do worse, arms that differ in their eyes can hardly be told apart,
    and "not shown" among them says little. This checks the comparison and is none of its findings: the
    p-value is not corrected for them, so that more arms do not make a comparison look blind.

    Args:
        contrasts: of all arms; the first control of each part is read.
    """
    said: dict[float, str] = {}
    for one in contrasts:
        if one.arm == BLIND and one.fraction not in said:
            measured = "the held-out error" if one.difference.relative else "success, in points,"
            alone = verdict_of(_gain(one.difference), one.difference.p_value)
            said[one.fraction] = (
                f"What sight is worth here{one.part()}: blanked images change {measured} by {one.difference} "
                f"against {one.control}, "
                + (
                    "the scale on which differences between arms that see are to be read."
                    if alone == "worse"
                    else "which is not shown to be worse: these runs can hardly tell what an arm sees."
                )
            )
    return list(said.values())
