"""The figure of a finding: success and depth in the tokens by arm, a mark for each training seed.

    python studies/compare/figure.py --results studies/compare/results/libero-confirm --layer 3

Reads comparison.json and probe.csv (from `spatial-forcing probe`) in the folder, writes figure.svg beside
them. Wants matplotlib (extra `libero` has it).
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import tyro
from matplotlib.axes import Axes

Marks = dict[str, list[float]]


@dataclass(frozen=True)
class Settings:
    """What is drawn.

    Attributes:
        results: folder with both files.
        layer: whose probe is shown.
    """

    results: Path
    layer: int


def main(settings: Settings) -> None:
    """Draw both panels."""
    rows = json.loads((settings.results / "comparison.json").read_text())["rows"]
    success = {row["arm"]: [100 * v for v in row["per_seed"].values()] for row in rows}
    depth, levels = probed(settings.results / "probe.csv", settings.layer)
    plt.rcParams |= {"svg.hashsalt": "figure", "font.size": 9, "svg.fonttype": "none"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.0), layout="constrained")
    draw(left, success, "Success, %", {})
    left.set_ylim(-4, 104)
    draw(
        right,
        {arm: depth[arm] for arm in success if arm in depth},
        "Depth error of a linear probe, AbsRel",
        levels,
    )
    figure.savefig(settings.results / "figure.svg", metadata={"Date": None})
    print(settings.results / "figure.svg")


def probed(path: Path, layer: int) -> tuple[Marks, dict[str, float]]:
    """AbsRel over all cameras by arm, a value a seed, and the levels that it is read against."""
    marks: Marks = {}
    floor: list[float] = []
    levels: dict[str, float] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["camera"] != "all":
                continue
            value, run = float(row["abs_rel"]), re.search(r"runs/([^/]+)-seed\d+/", row["name"])
            if row["kind"] == "ceiling":
                levels["teacher"] = value
            elif run and row["layer"] == str(layer):
                (floor if row["kind"] == "floor" else marks.setdefault(run[1], [])).append(value)
    return marks, levels | ({"random weights": sum(floor) / len(floor)} if floor else {})


def draw(axes: Axes, marks: Mapping[str, Sequence[float]], title: str, levels: Mapping[str, float]) -> None:
    """A column an arm: a dot a seed, a bar at the mean."""
    for column, values in enumerate(marks.values()):
        spread = [column + 0.28 * (i / max(1, len(values) - 1) - 0.5) for i in range(len(values))]
        axes.plot(spread, values, "o", color="#3366aa", markersize=4, alpha=0.75)
        axes.hlines(sum(values) / len(values), column - 0.25, column + 0.25, color="#222222", linewidth=1.6)
    for name, level in levels.items():
        axes.axhline(level, color="#888888", linewidth=0.8, linestyle="--")
        right_edge = axes.get_yaxis_transform()
        axes.text(1, level, name, transform=right_edge, ha="right", va="bottom", color="#666666", fontsize=8)
    axes.set_xticks(range(len(marks)), [name.replace("-", "\n") for name in marks])
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main(tyro.cli(Settings))
