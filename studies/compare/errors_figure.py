"""The figure of a comparison by held-out error: every arm against one control, a mark for each training seed.

    python studies/compare/errors_figure.py --results studies/compare/results/sweep --control alpha0

Reads comparison.json in the folder, writes errors.svg beside it. Wants matplotlib (extra `libero` has it).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import tyro
from matplotlib.axes import Axes

Contrast = Mapping[str, Any]
COLORS = {"better": "#3366aa", "worse": "#aa6633", "not shown": "#888888"}


@dataclass(frozen=True)
class Settings:
    """What is drawn.

    Attributes:
        results: folder with comparison.json.
        control: the arm that the others are compared with.
    """

    results: Path
    control: str = "alpha0"


def main(settings: Settings) -> None:
    """A panel for each part of the data."""
    found = json.loads((settings.results / "comparison.json").read_text())["held_out"]["contrasts"]
    found = [c for c in found if c["control"] == settings.control]
    parts = sorted({c["fraction"] for c in found})
    plt.rcParams |= {"svg.hashsalt": "errors", "font.size": 9, "svg.fonttype": "none"}
    tallest = max(sum(c["fraction"] == part for c in found) for part in parts)
    width, head = (6.4, 0.9) if len(parts) == 1 else (8.4, 1.2)
    figure, panels = plt.subplots(
        1, len(parts), figsize=(width, head + 0.24 * tallest),
        sharex=True, sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for axes, part in zip(panels[0], parts, strict=True):
        draw(axes, [c for c in found if c["fraction"] == part])
        if len(parts) > 1:
            axes.set_title(f"{100 * part:g} % of the demonstrations", fontsize=9)
    figure.suptitle(f"Held-out error against {settings.control}, %", fontsize=9)
    figure.savefig(settings.results / "errors.svg", metadata={"Date": None})
    print(settings.results / "errors.svg")


def draw(axes: Axes, contrasts: Sequence[Contrast]) -> None:
    """A line an arm: its interval, the mean, a dot a seed; what is shown after correction has a colour."""
    for line, contrast in enumerate(contrasts):
        difference, color = contrast["difference"], COLORS[contrast["verdict"]]
        low, high = 100 * difference["low"], 100 * difference["high"]
        axes.hlines(line, low, high, color=color, linewidth=2.2)
        axes.plot(100 * difference["value"], line, "|", color=color, markersize=11, markeredgewidth=2.2)
        seeds = [100 * value for value in difference["per_seed"].values()]
        axes.plot(seeds, [line + 0.22] * len(seeds), "o", color="#222222", markersize=2.5, alpha=0.6)
    axes.axvline(0, color="#222222", linewidth=0.8)
    axes.set_yticks(range(len(contrasts)), [contrast["arm"] for contrast in contrasts])
    axes.set_ylim(len(contrasts) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main(tyro.cli(Settings))
