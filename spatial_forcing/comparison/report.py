"""The page of a comparison: one self-contained HTML file beside its JSON and CSV."""

from __future__ import annotations

from pathlib import Path

from spatial_forcing.analysis.comparison import Comparison
from spatial_forcing.analysis.probe_page import read_probe
from spatial_forcing.analysis.report import write_report
from spatial_forcing.analysis.report_data import ReportData
from spatial_forcing.analysis.run_page import numbers_section, read_representation
from spatial_forcing.analysis.sections import Section, comparison_section, gradient_sections
from spatial_forcing.comparison.config import RUNS, CompareConfig, cells
from spatial_forcing.training.run import environment

PAGE, PROBE = "report.html", "probe"


def write_page(config: CompareConfig, found: Comparison) -> Path:
    """Write report.html into the comparison's folder.

    Further evidence that lies there is shown, too: the depth probe of its policies (`spatial-forcing probe
    --output FOLDER/probe`) and the analysis of its runs (`spatial-forcing analyse --run FOLDER/runs/RUN`).
    """
    parts = ", ".join(f"{100 * fraction:g} %" for fraction in config.fractions)
    probe = read_probe(config.output / PROBE)
    data = ReportData(
        title="Comparison",
        subtitle=f"{len(config.arms)} arms, {len(config.seeds)} training seeds, trained on {parts} of the "
        f"demonstrations{' that are not held out' if config.held_out else ''}; {_measured(config)}",
        arms=(),
        notes=(
            "The arms of a training seed start from the same weights and see the same batches in the same "
            "order; all runs are evaluated on the same episodes.",
            "Intervals are over training seeds; p-values are corrected over all differences of their table "
            "(Holm). What is called not shown may still be true: the sample was too small to tell.",
        ),
        probe=probe[0] if probe is not None else None,
        sections=(
            comparison_section(found, {arm.name: arm.description for arm in config.specs}),
            *gradient_sections(found.audits, [arm.name for arm in config.specs]),
            *(probe[1:] if probe is not None else ()),
            *_analysed(config),
        ),
        config={"compare": config.to_plain()},
        environment=environment(),
        commands=(f"spatial-forcing compare --config {config.output / 'compare.json'}",),
    )
    return write_report(data, config.output / PAGE)


def _analysed(config: CompareConfig) -> list[Section]:
    """Ranks and CKA of the runs that were analysed."""
    names = [cell.name for cell in cells(config)]
    read = {name: read_representation(config.output / RUNS / name) for name in names}
    return [numbers_section(one, name) for name, one in read.items() if one is not None]


def _measured(config: CompareConfig) -> str:
    tasks = "one task" if len(config.tasks) == 1 else f"each of {len(config.tasks)} tasks"
    by = [
        f"{config.episodes} episodes of {tasks}" if config.tasks else "",
        f"{100 * config.held_out:g} % of the demonstrations held out" if config.held_out else "",
    ]
    return ", ".join(filter(None, by))
