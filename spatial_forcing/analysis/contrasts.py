"""Arms against controls, whatever was measured: the loop, the correction, and whether eyes mattered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from rich.table import Table

from spatial_forcing.evaluation.paired import ErrorDifference, PairedDifference, holm, p_text

BLIND = "blind"
"""The arm whose images are blanked; see `comparison.arms`."""

MANY = 6
"""More differences than this that are not shown are said in one sentence for each control."""

Difference = TypeVar("Difference", bound=PairedDifference | ErrorDifference)
Run = TypeVar("Run")


@dataclass(frozen=True)
class ArmContrast(ABC, Generic[Difference]):
    """An arm against a control on the same part of the data, paired by training seed.

    `p_holm` is corrected over all contrasts of the comparison; `verdict` is better, worse or not shown.
    `VERB` stands before the verdict in a sentence.
    """

    VERB: ClassVar[str]

    arm: str
    control: str
    fraction: float
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
        return f"{found} {self.arm} {self.VERB} {self.verdict} than {self.control} here."

    def part(self) -> str:
        """Which part of the data, as the end of a phrase."""
        return "" if self.fraction == 1 else f" on {100 * self.fraction:g} % of the demonstrations"


def against_controls(
    groups: Mapping[tuple[str, float], Mapping[int, Run]],
    controls: Sequence[str],
    difference: Callable[[Mapping[int, Run], Mapping[int, Run]], Difference],
) -> list[tuple[str, str, float, Difference, float]]:
    """Every arm against every control on the same part of the data, with p-values corrected over all (Holm).

    Args:
        groups: runs by training seed, by (arm, part of the data).
        controls: a control is itself compared with those before it.
        difference: of treated and control runs; called where they share two training seeds.

    Returns:
        (arm, control, part, difference, corrected p) each.
    """
    found: list[tuple[str, str, float, Difference]] = []
    for position, control in enumerate(controls):
        for (arm, fraction), treated in groups.items():
            other = groups.get((control, fraction), {})
            if arm not in controls[: position + 1] and len(treated.keys() & other.keys()) >= 2:
                found.append((arm, control, fraction, difference(treated, other)))
    adjusted = holm({str(number): one[3].p_value for number, one in enumerate(found)})
    return [(*one, adjusted[str(number)]) for number, one in enumerate(found)]


def in_words(contrasts: Sequence[ArmContrast[Difference]], subject: str) -> list[str]:
    """A sentence for each contrast; many that are not shown are gathered, behind those that are.

    Args:
        contrasts: of all arms.
        subject: what differs, with its unit.
    """
    unclear = [one for one in contrasts if one.verdict == "not shown"]
    if len(unclear) <= MANY:
        return [one.sentence() for one in contrasts]
    groups: dict[tuple[str, str], list[ArmContrast[Difference]]] = {}
    for one in unclear:
        groups.setdefault((one.control, one.part()), []).append(one)
    gathered = [
        f"{subject}, against {control}{part}, a difference is not shown for any of these: "
        + "; ".join(f"{one.arm} {one.difference}" for one in group)
        + f" (95 % intervals; Holm-corrected p at least {min(one.p_holm for one in group):.3f})."
        for (control, part), group in groups.items()
    ]
    return [*(one.sentence() for one in contrasts if one.verdict != "not shown"), *gathered]


def contrast_table(contrasts: Sequence[ArmContrast[Difference]], title: str) -> list[Table]:
    """A row for each contrast, so that no p-value stands beside another's difference; empty without any."""
    if not contrasts:
        return []
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
    and "not shown" among them says little.

    Args:
        contrasts: of all arms; the first control of each part is read.
        measured: what differs, in the words of the sentence.
    """
    said: dict[float, str] = {}
    for one in contrasts:
        if one.arm == BLIND and one.fraction not in said:
            said[one.fraction] = (
                f"What sight is worth here{one.part()}: blanked images change {measured} by {one.difference} "
                f"against {one.control}, "
                + (
                    "the scale on which differences between arms that see are to be read."
                    if one.verdict == "worse"
                    else "which is not shown to be worse: these runs can hardly tell what an arm sees."
                )
            )
    return list(said.values())
