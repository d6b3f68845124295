import json
import re
import xml.etree.ElementTree as ET
from html import unescape

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_forcing.analysis.charts import (
    HEIGHT,
    WIDTH,
    Interval,
    Series,
    interval_chart,
    line_chart,
    swatch,
    thinned,
)


def parse(svg):
    return ET.fromstring(svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1))


def coordinates(svg):
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", svg)]


@given(
    st.lists(st.floats(-1e4, 1e4, allow_subnormal=False), min_size=1, max_size=30),
    st.floats(0, 1e3, allow_subnormal=False),
)
@settings(max_examples=60, deadline=None)
def test_every_line_stays_inside_its_frame(values, spread):
    steps = list(range(0, 50 * len(values), 50))
    low, high = [v - spread for v in values], [v + spread for v in values]
    svg = line_chart([Series("a", 0, steps, values, low, high)], title="t", x_label="step", y_label="loss")
    parse(svg)
    points = coordinates(svg)
    assert points
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)


def test_values_over_many_decades_stay_inside_with_a_few_ticks():
    values = [1e-230, 1e-45, 1.0]
    svg = line_chart([Series("a", 0, [0, 1, 2], values)], title="t", x_label="s", y_label="y")
    (_, lowest), *_, (_, highest) = coordinates(re.search(r'class="line" d="([^"]*)"', svg)[1])
    assert 0 <= highest < lowest <= HEIGHT
    assert svg.count('class="grid"') <= 12


def test_larger_values_are_drawn_higher_and_later_ones_further_right():
    svg = line_chart(
        [Series("a", 0, [0, 100], [0.2, 0.9])], title="t", x_label="s", y_label="y", percent=True
    )
    (x0, y0), (x1, y1) = coordinates(re.search(r'class="line" d="([^"]*)"', svg)[1])
    assert x0 < x1
    assert y0 > y1
    assert "100 %" in svg


def test_hover_data_tells_the_numbers():
    svg = line_chart(
        [Series("a", 0, [1, 2], [3.0, 4.0]), Series("b & c", 1, [2], [5.0], [4.5], [5.5])],
        title="t",
        x_label="step",
        y_label="y",
        whiskers=True,
    )
    data = json.loads(unescape(re.search(r'data-line="([^"]*)"', svg)[1]))
    assert data["x"] == [1, 2]
    assert [s["label"] for s in data["series"]] == ["a", "b & c"]
    assert (data["series"][1]["low"], data["series"][1]["high"]) == ([4.5], [5.5])
    parse(svg)


def test_values_over_many_magnitudes_get_a_log_axis():
    wide = line_chart([Series("a", 0, [0, 1, 2], [1.0, 0.1, 0.01])], title="t", x_label="s", y_label="y")
    ys = [y for _, y in coordinates(re.search(r'class="line" d="([^"]*)"', wide)[1])]
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.2)
    assert "log scale" in wide
    narrow = line_chart([Series("a", 0, [0, 1], [1.0, 0.5])], title="t", x_label="s", y_label="y")
    assert "log scale" not in narrow


def test_interval_chart_has_a_mark_for_every_arm_and_escapes_names():
    rows = [
        ("reach <v3>", [Interval(0, 0.5, 0.4, 0.6, "base"), Interval(1, 0.7, 0.6, 0.8, 'the "SF" arm')]),
        ("push", [Interval(0, 0.0, 0.0, 0.1, "base")]),
    ]
    tree = parse(interval_chart(rows, title="t", x_label="success", percent=True))
    marks = [g for g in tree.iter() if g.get("data-tip")]
    assert [g.get("data-tip") for g in marks] == ["base", 'the "SF" arm', "base"]
    assert "reach <v3>" in [t.text for t in tree.iter() if t.tag.endswith("text")]


def test_arms_differ_by_more_than_colour():
    shapes = {re.sub(r"arm-\d", "", swatch(i)) for i in range(6)}
    assert len(shapes) == 6


def test_thinning_keeps_mean_and_extremes():
    x = np.arange(1000.0)
    y = np.sin(x)
    (tx, ty, low, high), averaged = thinned(x.tolist(), y.tolist(), 100)
    assert averaged
    assert len(tx) == len(ty) == 100
    assert np.mean(ty) == pytest.approx(y.mean())
    assert min(low) == y.min()
    assert max(high) == y.max()
    assert thinned([1.0], [2.0]) == ([[1.0], [2.0], [2.0], [2.0]], False)
