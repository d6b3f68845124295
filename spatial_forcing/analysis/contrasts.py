"""Arms against controls, whatever was measured: the loop, the correction, and whether eyes mattered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from rich.table import Table

from spatial_forcing.evaluation.paired import ErrorDifference, PairedDifference, holm, p_text, verdict_of

BLIND = "blind"
"""The arm whose images are blanked; see `comparison.arms`."""

MANY = 3
"""More differences than this that are not shown are said in one sentence for each control."""

Difference = TypeVar("Difference", bound=PairedDifference | ErrorDifference)
Run = TypeVar("Run")
Made = TypeVar("Made", bound="ArmContrast[Any]")
Groups = Mapping[tuple[str, float], Mapping[int, Run]]
"""Runs by training seed, by (arm, part of the data)."""


class Pair(NamedTuple):
    """An arm and a control, each on a part of the data."""

    arm: str
    control: str
    fraction: float
    control_fraction: float


@dataclass(frozen=True)
class ArmContrast(ABC, Generic[Difference]):
    """An arm against a control, paired by training seed.

    `p_holm` is corrected over all contrasts of their family; `verdict` is better, worse or not shown.
    `VERB` stands before the verdict in a sentence; `BETTER` is the sign of a better difference.
    """

    VERB: ClassVar[str]
    BETTER: ClassVar[int]

    arm: str
    control: str
    fraction: float
    control_fraction: float
    difference: Difference
    p_holm: float
    verdict: str

    @abstractmethod
    def found(self) -> str:
        """What differs by how much, in words."""

    def sentence(self) -> str:
        """What was found, in words."""
        found = (
            f"{self.found()} over {len(self.difference.per_seed)} training seeds (95 % interval), "
            f"Holm-corrected p {p_text(self.p_holm)}."
        )
        if self.verdict == "not shown":
            return f"{found} A difference is not shown."
        arm, control = self.sides()
        return f"{found} {arm} {self.VERB} {self.verdict} than {control} here."

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


def on_the_same_data(groups: Groups[Run], controls: Sequence[str]) -> list[Pair]:
    """Every arm with every control on the same part of the data, where they share two training seeds.

    Args:
        groups: of all arms.
        controls: a control is itself compared with those before it.
    """
    return [
        Pair(arm, control, fraction, fraction)
        for position, control in enumerate(controls)
        for (arm, fraction), treated in groups.items()
        if arm not in controls[: position + 1]
        and len(treated.keys() & groups.get((control, fraction), {}).keys()) >= 2
    ]


def on_less_data(groups: Groups[Run], control: str) -> list[Pair]:
    """Every arm, the control too, on less data than the control's most: data efficiency.

    Args:
        groups: of all arms; pairs that share fewer than two training seeds are left out.
        control: the arm whose runs on the most data are the measure.
    """
    most = max((fraction for arm, fraction in groups if arm == control), default=0.0)
    return [
        Pair(arm, control, fraction, most)
        for (arm, fraction), treated in groups.items()
        if fraction < most and len(treated.keys() & groups[control, most].keys()) >= 2
    ]


def corrected_contrasts(
    kind: type[Made],
    groups: Groups[Run],
    pairs: Sequence[Pair],
    difference: Callable[[Mapping[int, Run], Mapping[int, Run]], PairedDifference | ErrorDifference],
) -> tuple[Made, ...]:
    """One family of contrasts: its p-values are corrected together (Holm).

    Args:
        kind: class of the contrasts.
        groups: of all arms.
        pairs: what is compared.
        difference: of treated and control runs, of the class's kind.
    """
    found = [difference(groups[p.arm, p.fraction], groups[p.control, p.control_fraction]) for p in pairs]
    adjusted = holm({str(number): one.p_value for number, one in enumerate(found)})
    return tuple(
        kind(*pair, one, p_holm, verdict_of(kind.BETTER * one.value, p_holm))
        for pair, one, p_holm in zip(pairs, found, adjusted.values(), strict=True)
    )


def in_words(contrasts: Sequence[ArmContrast[Difference]], subject: str) -> list[str]:
    """A sentence for each contrast, those that are shown first; many that are not shown are gathered.

    Args:
        contrasts: of all arms.
        subject: what differs, with its unit.
    """
    unclear = [one for one in contrasts if one.verdict == "not shown"]
    shown = [one.sentence() for one in contrasts if one.verdict != "not shown"]
    if len(unclear) <= MANY:
        return [*shown, *(one.sentence() for one in unclear)]
    groups: dict[str, list[ArmContrast[Difference]]] = {}
    for one in unclear:
        groups.setdefault(one.sides()[1], []).append(one)
    gathered = [
        f"{subject}, against {control}, a difference is not shown for any of these: "
        + "; ".join(f"{one.sides()[0]}{one.part()} {one.difference}" for one in group)
        + f" (95 % intervals; Holm-corrected p at least {min(one.p_holm for one in group):.3f})."
        for control, group in groups.items()
    ]
    return [*shown, *gathered]


def contrast_columns(difference: str) -> list[str]:
    """Header of what `csv_lines` adds; `difference` names the column of the estimate."""
    return ["control", "control_fraction", difference, "difference_low", "difference_high", "p", "p_holm",
            "verdict"]  # fmt: skip


def csv_lines(
    own: Sequence[object], arm: str, fraction: float, contrasts: Iterable[ArmContrast[Difference]]
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


def contrast_table(contrasts: Sequence[ArmContrast[Difference]], title: str) -> list[Table]:
    """A row for each contrast, so that no p-value stands beside another's difference; empty without any."""
    if not contrasts:
        return []
    first = contrasts[0]
    if first.fraction != first.control_fraction:
        title += f", against {first.sides()[1]}"
    table = Table(title=title, caption="95 % intervals over seeds; p after Holm's correction over all rows.")
    for column in ("arm", "data", "against", "difference", "p", "verdict"):
        table.add_column(column)
    for one in contrasts:
        part = f"{100 * one.fraction:g} %"
        table.add_row(
            one.arm,
            part,
            one.control,
            str(one.difference),
            p_text(one.p_holm).removeprefix("= "),
            one.verdict,
        )
    return [table]


def worth_of_sight(contrasts: Iterable[ArmContrast[Difference]], measured: str) -> list[str]:
    """Whether the comparison could show what an arm sees: a sentence for each part with a blind arm.

    Where blanked images are not shown to do worse, arms that differ in their eyes can hardly be told apart,
    and "not shown" among them says little. This checks the comparison and is none of its findings: the
    p-value is not corrected for them, so that more arms do not make a comparison look blind.

    Args:
        contrasts: of all arms; the first control of each part is read.
        measured: what differs, in the words of the sentence.
    """
    said: dict[float, str] = {}
    for one in contrasts:
        if one.arm == BLIND and one.fraction not in said:
            alone = verdict_of(one.BETTER * one.difference.value, one.difference.p_value)
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
