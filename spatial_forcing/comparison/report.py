"""The page of a comparison: one self-contained HTML file beside its JSON and CSV."""

from __future__ import annotations

from pathlib import Path

from spatial_forcing.analysis.comparison import Comparison
from spatial_forcing.analysis.report import write_report
from spatial_forcing.analysis.report_data import ReportData
from spatial_forcing.analysis.sections import Section, comparison_section
from spatial_forcing.comparison.config import CompareConfig
from spatial_forcing.training.run import environment

PAGE = "report.html"


def write_page(config: CompareConfig, found: Comparison, further: tuple[Section, ...] = ()) -> Path:
    """Write report.html into the comparison's folder; `further` sections follow the comparison's own."""
    parts = ", ".join(f"{100 * fraction:g} %" for fraction in config.fractions)
    data = ReportData(
        title="Comparison",
        subtitle=f"{len(config.arms)} arms, {len(config.seeds)} training seeds, {parts} of the "
        f"demonstrations, {_measured(config)}",
        arms=(),
        notes=(
            "The arms of a training seed start from the same weights and see the same batches in the same "
            "order; all runs are evaluated on the same episodes.",
            "Intervals are over training seeds; p-values are corrected over all differences of their table "
            "(Holm). What is called not shown may still be true: the sample was too small to tell.",
        ),
        sections=(comparison_section(found), *further),
        config={"compare": config.to_plain()},
        environment=environment(),
        commands=(f"spatial-forcing compare --config {config.output / 'compare.json'}",),
    )
    return write_report(data, config.output / PAGE)


def _measured(config: CompareConfig) -> str:
    tasks = "one task" if len(config.tasks) == 1 else f"each of {len(config.tasks)} tasks"
    by = [
        f"{config.episodes} episodes of {tasks}" if config.tasks else "",
        f"{100 * config.held_out:g} % of them held out" if config.held_out else "",
    ]
    return ", ".join(filter(None, by))
