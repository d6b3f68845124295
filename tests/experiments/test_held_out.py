import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest

from spatial_forcing.analysis.report import ReportData, render
from spatial_forcing.errors import DataError
from spatial_forcing.experiments.sections import comparison_section
from spatial_forcing.experiments.statistics import (
    MEANING,
    RunRecord,
    analyse,
    analyse_errors,
    without_rollouts,
)


def record(arm, seed, level, fraction=1.0):
    rng = np.random.default_rng([seed, len(arm)])
    of_seed = 0.02 * np.random.default_rng(seed).standard_normal()
    errors = {
        step: {
            (task, n): scale * level + of_seed + 0.01 * rng.standard_normal()
            for task in "ab"
            for n in range(6)
        }
        for step, scale in ((20, 2.0), (40, 1.0))
    }
    return RunRecord(arm, fraction, seed, errors, seconds=10.0 + seed, peak_memory=2**30, act_ms=1.5)


def records(levels, seeds=5, fraction=1.0):
    return [record(arm, s, level, fraction) for arm, level in levels.items() for s in range(seeds)]


def test_a_lower_error_is_better_and_noise_is_not_shown():
    found = analyse_errors(records({"alpha0": 1.0, "sf": 0.9, "bad": 1.1, "same": 1.0}), controls=["alpha0"])
    assert {c.arm: c.verdict for c in found.contrasts} == {
        "sf": "better", "bad": "worse", "same": "not shown"
    }  # fmt: skip
    sf = found.contrasts[0]
    assert sf.difference.value == pytest.approx(-0.1, abs=0.02)
    assert sf.p_holm >= sf.difference.p_value
    assert "sf predicts better than alpha0." in sf.sentence()
    assert found.contrasts[2].sentence().endswith("A difference is not shown.")
    assert without_rollouts([0], [], found).sentences()[-1] == MEANING
    alpha0 = found.rows[0]
    assert alpha0.curve[20] == pytest.approx(2.0, abs=0.05)
    assert (alpha0.seconds, alpha0.peak_memory, alpha0.act_ms) == (12.0, 2**30, 1.5)
    assert alpha0.low < alpha0.mean < alpha0.high
    assert alpha0.mean == pytest.approx(np.mean(list(alpha0.per_seed.values())))


def test_controls_are_compared_with_those_before_them_and_parts_for_themselves():
    rows = records({"alpha0": 1.0, "sf": 0.9, "shuffled": 1.0}) + records(
        {"alpha0": 2.0, "sf": 1.0}, fraction=0.2
    )
    found = analyse_errors(rows, controls=["alpha0", "shuffled"])
    assert [(c.arm, c.control, c.fraction) for c in found.contrasts] == [
        ("sf", "alpha0", 1.0), ("shuffled", "alpha0", 1.0), ("sf", "alpha0", 0.2), ("sf", "shuffled", 1.0)
    ]  # fmt: skip
    assert "on 20 % of the demonstrations" in found.contrasts[2].sentence()
    alpha0, sf = found.less_data
    assert (alpha0.arm, alpha0.verdict, sf.arm, sf.verdict) == ("alpha0", "worse", "sf", "not shown")
    assert sf.sentence() in without_rollouts([0], [], found).sentences()
    section = comparison_section(without_rollouts([0], [], found))
    assert [t.name for t in section.tables] == ["held-out", "held-out-differences", "held-out-less-data"]


def test_tables_and_page_hold_the_same_figures():
    found = analyse_errors(records({"alpha0": 1.0, "sf": 0.9}), controls=["alpha0"])
    lines = list(csv.DictReader(io.StringIO(found.csv())))
    assert [line["arm"] for line in lines] == ["alpha0", "sf"]
    assert lines[0]["verdict"] == ""
    assert float(lines[0]["train_seconds"]) == 12.0
    assert float(lines[1]["relative_difference"]) == found.contrasts[0].difference.value
    whole = without_rollouts([0, 1, 2, 3, 4], ["sf-seed5"], found)
    assert json.loads(json.dumps(whole.to_json()))["held_out"]["episodes"] == 12
    assert whole.sentences()[-1] == "Not finished and not counted: sf-seed5."
    assert len(whole.tables()) == 2
    section = comparison_section(whole)
    assert [table.name for table in section.tables] == ["held-out", "held-out-differences"]
    page = render(ReportData("Comparison", "", sections=(section,)))
    assert "Held-out error against the controls" in page
    assert MEANING in page


def test_the_page_draws_the_error_over_training_and_over_the_parts_of_the_data():
    one_part = analyse_errors(records({"alpha0": 1.0, "sf": 0.9}), controls=["alpha0"])
    titles = lambda found: [f.title for f in comparison_section(without_rollouts([0], [], found)).figures]  # noqa: E731
    assert titles(one_part) == [
        "Held-out error, mean over seeds",
        "Held-out error against the controls",
        "Held-out error over training",
    ]
    # one seed on the small part: a mark without an interval
    rows = records({"alpha0": 1.0, "sf": 0.9}) + records({"alpha0": 2.0, "sf": 1.5}, seeds=1, fraction=0.05)
    figures = comparison_section(without_rollouts([0], [], analyse_errors(rows, controls=["alpha0"]))).figures
    assert figures[-1].title == "Held-out error by amount of data"
    assert figures[-1].legend == ((0, "alpha0"), (1, "sf"))
    assert figures[-1].svg.count('class="whisker"') == 4


def test_the_cards_show_the_measure_that_leads():
    errors = analyse_errors(records({"alpha0": 1.0, "sf": 0.9}), controls=["alpha0"])
    by_error = comparison_section(without_rollouts([0], [], errors)).cards
    assert [card.value for card in by_error] == [f"{row.mean:.3f}" for row in errors.rows]
    assert all("5 training seeds" in card.detail for card in by_error)

    def success(arm, won):
        outcomes = {40: {("a", n): n < won for n in range(20)}}
        return [RunRecord(arm, 1.0, s, outcomes, seconds=1.0, peak_memory=1) for s in range(5)]

    alike = analyse(success("alpha0", 1) + success("sf", 1), controls=["alpha0"])
    apart = analyse(success("alpha0", 1) + success("sf", 19), controls=["alpha0"])
    values = [
        [card.value for card in comparison_section(replace(found, held_out=errors)).cards]
        for found in (alike, apart)
    ]
    assert values == [[f"{row.mean:.3f}" for row in errors.rows], ["5.0 %", "95.0 %"]]


def test_one_seed_is_said_and_nothing_is_refused():
    found = analyse_errors(records({"alpha0": 1.0, "sf": 0.9}, seeds=1), controls=["alpha0"])
    assert str(found.rows[0]).endswith("(one seed)")
    assert found.contrasts[0].difference.seeds == 1
    assert "12 episodes, not over training seeds" in found.contrasts[0].sentence()
    with pytest.raises(DataError, match="no run is finished"):
        analyse_errors([], controls=["alpha0"])
