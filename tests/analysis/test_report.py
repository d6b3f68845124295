import base64
import json
import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace

import numpy as np
import pytest

from spatial_forcing.analysis.report import Media, render, write_report
from spatial_forcing.errors import DataError
from spatial_forcing.experiments.sections import training_section
from tests.analysis.browser import inspect, visit
from tests.analysis.sample_report import TASKS, compared, sample_report

CHARTS = 3 + 2 + 3
"""Success, differences, success over training; two losses; the probe's three metrics."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return sample_report(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def page(data, tmp_path_factory):
    return write_report(data, tmp_path_factory.mktemp("report") / "report.html")


def test_every_section_is_there(page):
    html = page.read_text()
    for section in ("comparison", "losses", "probe", "features", "videos", "repeat"):
        assert f'<section id="{section}">' in html
        assert f'href="#{section}"' in html
    assert html.count('class="chart"') == CHARTS
    assert html.count('class="card"') == 3
    assert html.count("<video") == html.count('poster="data:image/png') == 2 * 3
    assert "&#34;alpha&#34;: 0.5" in html
    assert "packages.torch" in html
    assert "spatial-forcing quickstart --seed 0" in html


def test_nothing_on_the_page_points_outside_it(page):
    html = page.read_text()
    targets = re.findall(r'(?:src|href)="([^"]{0,40})', html)
    assert targets
    assert all(t.startswith(("data:", "#")) for t in targets)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", html)


def test_every_figure_can_be_saved_as_vectors_and_numbers(page):
    html = page.read_text()
    saved = re.findall(r'<a download="([^"]*)" href="data:([^;]*);base64,([^"]*)"', html)
    kinds = {"svg": "image/svg+xml", "pdf": "application/pdf", "csv": "text/csv"}
    assert len(saved) == 3 * CHARTS
    for name, kind, data in saved:
        assert kinds[name.rpartition(".")[2]] == kind
        content = base64.b64decode(data)
        if kind == "image/svg+xml":
            tree = ET.fromstring(content)
            assert tree.tag == "{http://www.w3.org/2000/svg}svg"
            # No class, variable or script of the page is needed.
            assert not re.search(rb'class=|currentColor|var\(|data-tip|class="hit"', content)
        elif kind == "application/pdf":
            assert content.startswith(b"%PDF-")
            assert b"/FontFile2" in content  # embedded, as publishers want
        else:
            assert len(content.splitlines()) > 1
    csv = next(
        base64.b64decode(d).decode() for n, _, d in saved if n == "success-mean-over-training-seeds.csv"
    )
    row = next(line for line in csv.splitlines() if line.startswith("SF,")).split(",")
    spread = compared().rows[1].success
    assert [float(v) for v in row[1:]] == pytest.approx([spread.mean, spread.low, spread.high], rel=1e-5)


def test_without_svglib_the_page_is_made_all_the_same(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "svglib.svglib", None)
    html = render(data)
    kinds = [name.rpartition(".")[2] for name in re.findall(r'<a download="([^"]*)"', html)]
    assert sorted(set(kinds)) == ["csv", "svg"]
    assert len(kinds) == 2 * CHARTS


def test_every_picture_has_an_alternative_text(page):
    html = page.read_text()
    images = re.findall(r"<img [^>]*>", html)
    assert len(images) == 3 * 6 + 3 * 4
    assert all(re.search(r'alt="[^"]+"', image) for image in images)


def test_cards_and_tables_say_what_was_measured(page):
    html = page.read_text()
    cards = re.findall(r'card-value">([^<]*)<', html)
    means = [f"{100 * row.success.mean:.1f}" for row in compared().rows]
    assert cards == [f"{mean} %" for mean in means]
    table = html[html.index('id="comparison-arms"') :]
    assert all(f">{mean}<" in table for mean in means)
    assert all(f">{task}</th>" in html for task in TASKS)


def test_data_are_json_able(data):
    plain = json.loads(json.dumps(asdict(data)))
    assert [card["name"] for card in plain["sections"][0]["cards"]] == ["base", "SF", "blind"]


def test_names_and_notes_are_escaped(data):
    first, *rest = data.sections
    odd = replace(
        data, title="<script>alert(1)</script>", sections=(replace(first, notes=("a < b & c",)), *rest)
    )
    html = render(odd)
    assert "<script>alert" not in html
    assert "a &lt; b &amp; c" in html


def test_what_is_missing_is_named(data, tmp_path):
    with pytest.raises(DataError, match="no section"):
        render(replace(data, sections=()))
    with pytest.raises(DataError, match=r"clip\.mp4"):
        Media.file(tmp_path / "clip.mp4", "")


def test_a_failed_render_keeps_the_old_page(data, tmp_path):
    path = write_report(data, tmp_path / "report.html")
    before = path.read_bytes()
    with pytest.raises(DataError):
        write_report(replace(data, sections=()), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_losses_are_means_over_the_runs_of_an_arm():
    runs = [[{"step": 1, "action_loss": v}, {"step": 2, "cosine": 0.1}] for v in (0.5, 0.7)]
    section = training_section({"a": runs, "b": [[]]})
    assert [figure.title for figure in section.figures] == ["Action loss"]
    assert section.figures[0].legend == ((0, "a"),)
    assert "[0.6]" in section.figures[0].svg
    assert training_section({"a": [[]]}).figures == ()


def test_pictures_are_lossless():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert Media.picture(pixels, "x").uri.startswith("data:image/png;base64,")


# In the browser.

LOOK = """
const all = (selector) => [...document.querySelectorAll(selector)];
const point = (node, clientX, clientY) =>
  node.dispatchEvent(new PointerEvent('pointermove', {clientX, clientY}));
const tip = document.getElementById('tip');
const line = document.querySelector('[data-line]');
const box = line.getBoundingClientRect();
point(line, box.left + box.width * 0.9, box.top + 50);
const hover = {hidden: tip.hidden, text: tip.textContent};
point(document.querySelector('[data-tip]'), 50, 50);
const mark = tip.textContent;
const downloads = [];
HTMLAnchorElement.prototype.click = function () {
  downloads.push([this.download, decodeURIComponent(this.href)]);
};
for (const button of all('[data-csv]')) button.click();
const before = document.documentElement.dataset.theme;
const paper = getComputedStyle(document.body).backgroundColor;
document.getElementById('theme').click();
const size = (node) => node.getBoundingClientRect();
return {
  charts: all('svg.chart').map((c) =>
    [size(c).width, size(c).height, c.querySelectorAll('.mark, .line').length]),
  texts: Math.min(...all('.chart text').map((t) => size(t).height)),
  overflow: document.documentElement.scrollWidth - innerWidth,
  pictures: [...document.images].every((i) => i.complete && i.naturalWidth > 0),
  hover, mark, downloads, before, paper,
  after: document.documentElement.dataset.theme,
  afterPaper: getComputedStyle(document.body).backgroundColor,
};
"""


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_works_in_a_browser(page, width, dark):
    found, seen = inspect(page, LOOK, width=width, dark=dark)
    assert seen.console == []
    assert seen.requests == []
    assert len(found["charts"]) == CHARTS
    assert all(w > 250 and h > 60 and marks > 0 for w, h, marks in found["charts"])
    assert found["texts"] >= 9  # pixels
    assert found["overflow"] <= 0
    assert found["pictures"]
    assert not found["hover"]["hidden"]
    assert "training step 1500" in found["hover"]["text"]
    assert f"SF: {100 * compared().rows[1].success.mean:.1f} %" in found["hover"]["text"]
    assert "base:" in found["mark"]
    assert (found["before"], found["after"]) == (("dark", "light") if dark else ("light", "dark"))
    assert found["paper"] != found["afterPaper"]


def test_tables_come_as_csv(page):
    found, _ = inspect(page, LOOK)
    tables = dict(found["downloads"])
    lines = tables["comparison-arms.csv"].removeprefix("data:text/csv;charset=utf-8,").splitlines()
    assert lines[0].startswith("arm,seeds,")
    row = next(line for line in lines if line.startswith("SF,")).split(",")
    spread = compared().rows[1].success
    shown = [100 * v for v in (spread.mean, spread.low, spread.high)]
    assert [float(v) for v in row[2:5]] == pytest.approx(shown, rel=1e-5)
    assert len(tables["probe-readouts.csv"].splitlines()) == 1 + 8 * 3


def test_the_browser_check_notices_errors_and_requests(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://127.0.0.1:9/a.png'><script>missing()</script>")
    seen = visit(page)
    assert any("missing is not defined" in line for line in seen.console)
    assert seen.requests == ["http://127.0.0.1:9/a.png"]


def test_an_added_request_would_be_blocked(page):
    script = "document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/a.png'})); return {};"
    _, seen = inspect(page, script)
    assert seen.requests == []
    assert any("Content Security Policy" in line for line in seen.console)
