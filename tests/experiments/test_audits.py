"""The gradient audits of a comparison's runs, gathered by arm."""

import csv
import io

import pytest

from spatial_forcing.experiments.audits import AuditRecord, audit_csv, audit_rows, audit_table
from spatial_forcing.experiments.sections import gradient_sections


def lines(cosine, ratio, steps=(0, 50)):
    """Metrics lines of a run: an audit at each step, growing by 0.1, and lines without one between them."""
    audits = [
        {
            "step": step,
            **{f"audit/cosine/{place}": cosine + 0.1 * n for place in ("all", "block0")},
            **{f"audit/ratio/{place}": ratio + 0.1 * n for place in ("all", "block0")},
            "audit/action_norm/all": 3.0,
        }
        for n, step in enumerate(steps)
    ]
    return [*audits, {"step": 10, "loss": 1.0}]


def test_audits_are_means_over_seeds_and_training_by_place():
    records = [
        AuditRecord("alpha0", 1.0, [{"step": 0, "loss": 1.0}]),
        AuditRecord("sf", 1.0, lines(0.1, 1.0)),
        AuditRecord("sf", 1.0, lines(0.3, 3.0, steps=(0, 50, 100))),  # one audit more than the other seed
        AuditRecord("sf", 0.05, lines(-0.2, 0.5)),
    ]
    rows = audit_rows(records)
    assert [(r.arm, r.fraction, r.place, r.seeds) for r in rows] == [
        ("sf", 1.0, "all", 2), ("sf", 1.0, "block0", 2), ("sf", 0.05, "all", 1), ("sf", 0.05, "block0", 1),
    ]  # fmt: skip
    assert rows[0].cosine == pytest.approx(0.25)
    assert rows[0].ratio == pytest.approx(2.05)
    assert rows[0].cosines == {0: pytest.approx(0.2), 50: pytest.approx(0.3)}
    assert rows[1].cosines == {}
    written = list(csv.DictReader(io.StringIO(audit_csv(rows))))
    assert [float(line["cosine"]) for line in written] == pytest.approx([0.25, 0.25, -0.15, -0.15])
    (table,) = audit_table(rows)
    assert table.row_count == 2
    (section,) = gradient_sections(rows)
    assert [figure.legend for figure in section.figures] == [
        ((0, "sf, 100 % of data"), (1, "sf, 5 % of data"))
    ] * 2
    (alone,) = gradient_sections(rows[:2], ["alpha0", "2d", "sf"])
    assert alone.figures[0].legend == ((2, "sf"),)  # as in the charts of all arms
    assert [row[3].text for row in section.tables[0].rows] == ["+0.250", "+0.250", "-0.150", "-0.150"]


def test_blocks_stand_in_the_order_of_their_numbers():
    places = ("block10", "input", "block2", "all", "block1")
    line = {"step": 0} | {f"audit/{kind}/{p}": 0.1 for kind in ("cosine", "ratio") for p in places}
    rows = audit_rows([AuditRecord("sf", 1.0, [line])])
    assert [row.place for row in rows] == ["all", "block1", "block2", "block10", "input"]


def test_without_an_audit_nothing_is_said():
    rows = audit_rows([AuditRecord("alpha0", 1.0, [{"step": 0, "loss": 1.0}])])
    assert rows == ()
    assert audit_table(rows) == []
    assert gradient_sections(rows) == ()
