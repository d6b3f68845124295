"""Arms against controls, and what the blind arm says of a whole comparison."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from rich.console import Console

from spatial_forcing.evaluation.paired import PairedDifference
from spatial_forcing.experiments.arms import BLIND
from spatial_forcing.experiments.contrasts import (
    DEPTH,
    ERROR,
    SUCCESS,
    Contrast,
    Measure,
    Pair,
    contrast_table,
    corrected_contrasts,
    on_less_data,
    on_the_same_data,
    shown_in_words,
    unclear_in_words,
    worth_of_sight,
)
from spatial_forcing.experiments.statistics import Comparison, HeldOut, without_rollouts


def difference(value: float, p_value: float = 0.01) -> PairedDifference:
    return PairedDifference(
        value, value - 0.02, value + 0.02, p_value, {0: value, 1: value}, {}, 0.0, 0.1, 8, relative=True
    )


def error(arm: str, control: str, part: float, control_part: float, *found: object) -> Contrast:
    """A contrast of held-out errors."""
    return Contrast(arm, control, part, control_part, *found, measure=ERROR)


def test_every_arm_meets_every_control_once_and_p_values_are_corrected_over_all() -> None:
    def gap(treated: Mapping[int, float], other: Mapping[int, float]) -> PairedDifference:
        return difference(treated[0] - other[0])

    groups = {
        ("alpha0", 1.0): {0: 1.0, 1: 1.0},
        ("shuffled", 1.0): {0: 3.0, 1: 3.0},
        ("sf", 1.0): {0: 7.0, 1: 7.0},
        ("sf", 0.2): {0: 7.0, 1: 7.0},  # no control on this part
        ("one seed", 1.0): {0: 5.0},
    }
    pairs = on_the_same_data(groups, ["alpha0", "shuffled"])
    found = corrected_contrasts(groups, pairs, gap)
    assert [(c.arm, c.control, c.fraction, c.control_fraction, c.difference.value) for c in found] == [
        ("shuffled", "alpha0", 1.0, 1.0, 2.0),
        ("sf", "alpha0", 1.0, 1.0, 6.0),
        ("sf", "shuffled", 1.0, 1.0, 4.0),
    ]
    assert [c.p_holm for c in found] == pytest.approx([0.03] * 3)
    assert {c.verdict for c in found} == {"worse"}
    assert on_less_data(groups, "alpha0") == [Pair("sf", "alpha0", 0.2, 1.0)]
    assert on_less_data(groups, "missing") == []


def test_less_data_is_compared_with_the_controls_most_and_says_so() -> None:
    one = error("sf", "alpha0", 0.05, 1.0, difference(-0.2), 0.01, "better")
    assert one.sentence().startswith(
        "Held-out error, sf on 5 % of the demonstrations against alpha0 on all demonstrations: -20.0 %"
    )
    assert one.sentence().endswith("demonstrations predicts better than alpha0 on all demonstrations.")
    many = [error(f"arm{n}", "alpha0", 0.05, 0.5, difference(0.0), 1.0, "not shown") for n in range(7)]
    (said,) = unclear_in_words(many)
    assert "against alpha0 on 50 % of the demonstrations, a difference is not shown" in said
    assert "arm6 on 5 % of the demonstrations +0.0 %" in said
    (table,) = contrast_table([one])
    assert table.title == "Paired differences of held-out error, against alpha0 on all demonstrations"


def test_a_blind_arm_that_is_not_worse_is_said_to_leave_the_comparison_blind() -> None:
    def contrast(arm: str, p_value: float, verdict: str = "not shown", part: float = 1.0) -> Contrast:
        value = 0.03 if verdict != "better" else -0.03
        return error(arm, "alpha0", part, part, difference(value, p_value), 0.2, verdict)

    assert worth_of_sight([contrast("sf", 0.01)]) == []
    (said,) = worth_of_sight([contrast("sf", 0.01), contrast(BLIND, 0.06)])
    assert "change the held-out error by +3.0 % [+1.0, +5.0] against alpha0" in said
    assert "can hardly tell what an arm sees" in said
    # It is judged by itself: other arms do not make it less sure.
    worse, partly = worth_of_sight([contrast(BLIND, 0.01), contrast(BLIND, 0.01, "better", 0.2)])
    assert "the scale on which differences" in worse
    assert "can hardly tell what an arm sees" in partly
    assert "on 20 % of the demonstrations: blanked" in partly
    assert "can hardly tell" in partly


def test_a_narrow_terminal_keeps_each_difference_beside_its_own_p_value() -> None:
    contrasts = [
        error("standardised", control, 0.05, 0.05, difference(gap, p), p, verdict)
        for control, gap, p, verdict in (
            ("alpha0", -0.2, 0.006, "better"),
            ("shuffled", 0.1, 0.542, "not shown"),
        )
    ]
    console = Console(width=80)
    with console.capture() as captured:
        console.print(*contrast_table(contrasts))
    rows = [line.split("│")[1:-1] for line in captured.get().splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["standardised", "5 %", "alpha0", "-20.0 % [-22.0, -18.0]", "0.006", "better"],
        ["standardised", "5 %", "shuffled", "+10.0 % [+8.0, +12.0]", "0.542", "not shown"],
    ]
    assert contrast_table([]) == []


def test_many_differences_that_are_not_shown_make_one_sentence_a_control() -> None:
    def contrasts(arms: int) -> list[Contrast]:
        unclear = [
            error(f"arm{n}", control, 1.0, 1.0, difference(n / 100), 0.5 + n / 10, "not shown")
            for control in ("alpha0", "shuffled")
            for n in range(arms)
        ]
        return [*unclear, error("sf", "alpha0", 1.0, 1.0, difference(-0.1), 0.01, "better")]

    assert len(unclear_in_words(contrasts(1))) == 2
    (shown,) = shown_in_words(contrasts(4))
    first, second = unclear_in_words(contrasts(4))
    assert shown.startswith("Held-out error, sf against alpha0: -10.0 %")
    assert first.startswith(
        "Held-out error, against alpha0, a difference is not shown for any of these: arm0 +0.0 % ["
    )
    assert "arm3 +3.0 % [+1.0, +5.0] (95 % intervals; Holm-corrected p at least 0.500)" in first
    assert "against shuffled" in second


def test_parts_of_the_data_share_a_sentence() -> None:
    parts = (0.05, 0.2, 0.5, 1.0)
    unclear = [error("sf", "alpha0", p, p, difference(0.0), 1.0, "not shown") for p in parts]
    (said,) = unclear_in_words(unclear)
    assert "against alpha0, a difference is not shown" in said
    assert "sf on 20 % of the demonstrations +0.0 %" in said
    assert "; sf +0.0 %" in said


def test_both_kinds_of_comparison_say_it() -> None:
    errors = HeldOut((), (error(BLIND, "alpha0", 1.0, 1.0, difference(0.03), 0.2, "not shown"),), 8)
    alone = without_rollouts([0, 1], [], errors)
    assert sum("What sight is worth here" in line for line in alone.sentences()) == 1
    success = PairedDifference(-0.2, -0.3, -0.1, 0.01, {0: -0.2, 1: -0.2}, {}, 0.0, 0.5, 40)
    blind = Contrast(BLIND, "alpha0", 1.0, 1.0, success, 0.01, "worse")
    found = Comparison((), (blind,), (), "", 0.5, (0, 1), 40, (), held_out=errors)
    assert sum("What sight is worth here" in line for line in found.sentences()) == 2
    assert any("change success, in points, by -20.0" in line for line in found.sentences())


def test_what_is_shown_comes_first_success_before_errors_before_depth() -> None:
    def of(measure: Measure, verdict: str) -> Contrast:
        return Contrast("sf", "alpha0", 1.0, 1.0, difference(-0.1), 0.01, verdict, measure)

    def said(success: str, errors: str, depth: str) -> list[str]:
        held_out = HeldOut((), (of(ERROR, errors),), 8)
        found = Comparison(
            (), (of(SUCCESS, success),), (), "", 0.5, (0, 1), 8, (), ("Stand-in looks.",), held_out,
            depth=(of(DEPTH, depth),),
        )  # fmt: skip
        return [line.partition(",")[0] for line in found.sentences()]

    assert said("better", "better", "better")[:3] == ["Success", "Held-out error", DEPTH.subject]
    assert said("not shown", "not shown", "better")[:3] == [DEPTH.subject, "Success", "Held-out error"]
    assert said("not shown", "worse", "better")[:3] == ["Held-out error", DEPTH.subject, "Success"]
