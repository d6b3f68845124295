import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from markupsafe import escape

from spatial_forcing.analysis.report import ReportData, render
from spatial_forcing.errors import DataError
from spatial_forcing.experiments.arms import ARMS
from spatial_forcing.experiments.sections import comparison_section
from spatial_forcing.experiments.statistics import RunRecord, analyse


def record(arm, seed, rate, fraction=1.0, rng=None, last=40):
    rng = rng or np.random.default_rng([seed, int(100 * rate), len(arm)])
    won = {
        s: {(t, e): bool(rng.random() < rate * s / last) for t in "ab" for e in range(30)} for s in (20, last)
    }
    return RunRecord(arm, fraction, seed, won, seconds=10.0 + seed, peak_memory=2**30, act_ms=1.5)


def runs(rates, seeds=6, fraction=1.0):
    return [record(arm, s, rate, fraction) for arm, rate in rates.items() for s in range(seeds)]


def test_a_large_difference_is_shown_and_none_is_not():
    found = analyse(runs({"alpha0": 0.3, "sf": 0.8, "same": 0.3}), controls=["alpha0"])
    verdicts = {c.arm: c.verdict for c in found.contrasts}
    assert verdicts == {"sf": "better", "same": "not shown"}
    assert any("sf is better than alpha0" in s for s in found.sentences())
    assert any("A difference is not shown." in s for s in found.sentences())
    assert any("episodes x" in s for s in found.sentences())
    better = found.contrasts[0]
    assert better.p_holm == pytest.approx(2 * better.difference.p_value)


def test_worse_is_worse_and_a_second_control_adds_contrasts():
    found = analyse(runs({"alpha0": 0.7, "sf": 0.2, "shuffled": 0.7}), controls=["alpha0", "shuffled"])
    made = [(c.arm, c.control) for c in found.contrasts]
    assert made == [("sf", "alpha0"), ("shuffled", "alpha0"), ("sf", "shuffled")]
    assert [c.verdict for c in found.contrasts] == ["worse", "not shown", "worse"]


def test_threshold_is_the_controls_level_and_steps_are_censored():
    found = analyse(runs({"alpha0": 0.9, "blind": 0.05}), controls=["alpha0"])
    rows = {row.arm: row for row in found.rows}
    assert found.threshold == pytest.approx(rows["alpha0"].success.mean)
    assert rows["blind"].steps.reached == 0
    found = analyse(runs({"alpha0": 0.9, "blind": 0.05}), controls=["alpha0"], threshold=0.6)
    rows = {row.arm: row for row in found.rows}
    assert (rows["blind"].steps.median, rows["blind"].steps.high) == (None, None)
    assert 20 < rows["alpha0"].steps.median < 40
    assert rows["alpha0"].steps.reached == 6


def test_a_control_that_solves_nothing_does_not_reach_the_threshold():
    found = analyse(runs({"alpha0": 0.0, "sf": 0.9}), controls=["alpha0"])
    rows = {row.arm: row for row in found.rows}
    assert found.threshold == pytest.approx(1 / 60)
    assert (rows["alpha0"].steps.reached, rows["alpha0"].steps.median) == (0, None)
    assert rows["sf"].steps.reached == 6


def test_remarks_stand_beside_the_figures():
    said = "Stand-in looks: not comparable with published results."
    marked = [replace(run, remarks=(said,)) for run in runs({"alpha0": 0.3, "sf": 0.8})]
    found = analyse(marked, controls=["alpha0"])
    assert said in found.sentences()[1:]  # not before the result
    assert said in str(found.table().caption)
    assert said in render(ReportData("Comparison", "", sections=(comparison_section(found),)))
    assert said not in str(analyse(runs({"alpha0": 0.3}), controls=["alpha0"]).table().caption)


def test_parts_of_the_data_are_compared_each_for_itself():
    rows = runs({"alpha0": 0.2, "sf": 0.7}, fraction=0.05) + runs({"alpha0": 0.7, "sf": 0.7}, fraction=1.0)
    found = analyse(rows, controls=["alpha0"])
    assert {c.fraction: c.verdict for c in found.contrasts} == {0.05: "better", 1.0: "not shown"}
    assert found.threshold == pytest.approx(
        next(r.success.mean for r in found.rows if (r.arm, r.fraction) == ("alpha0", 1.0))
    )
    section = comparison_section(found)
    assert "Success by amount of data" in [figure.title for figure in section.figures]


def test_less_data_against_the_controls_most_is_a_family_of_its_own():
    rows = runs({"alpha0": 0.1, "sf": 0.9}, fraction=0.05) + runs({"alpha0": 0.4, "sf": 0.9})
    found = analyse(rows, controls=["alpha0"])
    alpha0, sf = found.less_data
    assert (alpha0.arm, alpha0.verdict, sf.arm, sf.verdict) == ("alpha0", "worse", "sf", "better")
    assert sf.difference.value == pytest.approx(0.5, abs=0.1)
    assert max(alpha0.p_holm, sf.p_holm) <= 2 * max(alpha0.difference.p_value, sf.difference.p_value)
    assert any(
        s.startswith("Success, sf on 5 % of the demonstrations minus alpha0 on all")
        for s in found.sentences()
    )
    assert [c.fraction for c in found.contrasts] == [0.05, 1.0]
    assert len(found.tables()) == 3
    table = next(t for t in comparison_section(found).tables if t.name == "less-data")
    assert [cell.text for cell in table.rows[1]][:2] == ["sf, 5 % of data", "alpha0 on all demonstrations"]
    assert not analyse(runs({"alpha0": 0.1, "sf": 0.9}), controls=["alpha0"]).less_data

    # The CSV holds both families.
    lines = list(csv.DictReader(io.StringIO(found.csv())))
    compared = [(line["arm"], line["fraction"], line["control"], line["control_fraction"]) for line in lines]
    assert compared == [
        ("alpha0", "0.05", "alpha0", "1.0"),
        ("sf", "0.05", "alpha0", "0.05"),
        ("sf", "0.05", "alpha0", "1.0"),
        ("alpha0", "1.0", "", ""),
        ("sf", "1.0", "alpha0", "1.0"),
    ]
    assert "sf minus alpha0 (standard" in found.planned_for  # on all data, though that comes last


def test_every_control_is_in_the_csv_and_the_plan_is_for_all_differences():
    found = analyse(runs({"alpha0": 0.3, "sf": 0.8, "shuffled": 0.4}), controls=["alpha0", "shuffled"])
    lines = list(csv.DictReader(io.StringIO(found.csv())))
    assert [(line["arm"], line["control"]) for line in lines] == [
        ("alpha0", ""), ("sf", "alpha0"), ("sf", "shuffled"), ("shuffled", "alpha0")
    ]  # fmt: skip
    assert found.planned_for.endswith("at level 0.05 / 3 differences")
    alone = analyse(runs({"alpha0": 0.3, "sf": 0.8}), controls=["alpha0"])
    assert alone.planned_for.endswith("at level 0.05")
    assert found.plans[0].seeds > alone.plans[0].seeds


def test_where_nothing_varied_nothing_is_planned():
    found = analyse(runs({"alpha0": 0.0, "sf": 1.0}), controls=["alpha0"])
    assert found.contrasts[0].verdict == "better"
    assert found.plans == ()
    assert not any("are needed" in sentence for sentence in found.sentences())


def test_one_seed_and_missing_runs_are_said():
    found = analyse(runs({"alpha0": 0.3}, seeds=2), controls=["alpha0"], missing=["sf-seed1"])
    assert found.contrasts == ()
    assert any("Nothing is compared yet" in s for s in found.sentences())
    assert any("sf-seed1" in s for s in found.sentences())
    page = render(
        ReportData("Comparison", "", sections=(comparison_section(found, {"spatial forcing": ARMS["sf"]}),))
    )
    assert 'id="comparison-differences"' not in page
    assert escape(ARMS["sf"].description) in page
    with pytest.raises(DataError, match="no run"):
        analyse([], controls=["alpha0"])


def test_one_seed_is_compared_over_its_episodes_and_says_so():
    found = analyse(runs({"alpha0": 0.3, "sf": 0.8}, seeds=1), controls=["alpha0"])
    (contrast,) = found.contrasts
    assert (contrast.verdict, contrast.difference.seeds) == ("better", 1)
    assert contrast.difference.low > 0.2
    assert "60 episodes, not over training seeds" in contrast.sentence()
    assert "this policy of sf is better than this one of alpha0." in contrast.sentence()
    assert found.plans == ()
    # As soon as a run has another seed, one seed is no longer enough.
    grown = analyse(
        [*runs({"alpha0": 0.3, "sf": 0.8}, seeds=1), record("alpha0", 1, 0.3)], controls=["alpha0"]
    )
    assert grown.contrasts == ()


def test_json_csv_and_page_hold_the_same_numbers():
    found = analyse(runs({"alpha0": 0.3, "sf<b>": 0.8}), controls=["alpha0"])
    plain = json.loads(json.dumps(found.to_json()))
    lines = list(csv.DictReader(io.StringIO(found.csv())))
    assert [line["arm"] for line in lines] == ["alpha0", "sf<b>"]
    assert float(lines[1]["difference"]) == pytest.approx(plain["contrasts"][0]["difference"]["value"])
    assert float(lines[1]["success"]) == pytest.approx(plain["rows"][1]["success"]["mean"])
    assert lines[0]["verdict"] == ""
    page = render(ReportData("Comparison", "", sections=(comparison_section(found),)))
    assert "sf<b>" not in page
    assert "sf&lt;b&gt;" in page
    assert 'id="comparison-arms"' in page
    assert 'data-csv="comparison-differences"' in page
    assert "https:" not in page
