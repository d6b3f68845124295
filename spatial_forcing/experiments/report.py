"""The page of a comparison: one self-contained HTML file beside its JSON and CSV."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from spatial_forcing.analysis.probe_page import read_probe
from spatial_forcing.analysis.report import Media, ReportData, Section, VideoRow, write_report
from spatial_forcing.analysis.run_page import numbers_section, read_representation
from spatial_forcing.errors import ConfigError
from spatial_forcing.evaluation import read_results
from spatial_forcing.experiments.checks import CONFIG, EPISODES
from spatial_forcing.experiments.config import RUNS, CompareConfig, cells
from spatial_forcing.experiments.run import reread
from spatial_forcing.experiments.sections import comparison_section, gradient_sections, training_section
from spatial_forcing.experiments.statistics import Comparison
from spatial_forcing.training import read_metrics
from spatial_forcing.training.run import environment

PAGE, PROBE = "report.html", "probe"


def write_page(
    config: CompareConfig,
    found: Comparison,
    *,
    title: str = "Comparison",
    notes: Sequence[str] = (),
    sections: Sequence[Section] | None = None,
    commands: Sequence[str] = (),
    settings: Mapping[str, object] | None = None,
) -> Path:
    """Write report.html into the comparison's folder.

    Args:
        config: what was compared.
        found: what it shows.
        title: heading.
        notes: further limits of what is shown.
        sections: put after the losses; default: the evidence that lies in the folder, which is the depth
            probe of the policies (`spatial-forcing probe --output FOLDER/probe`) and the analysis of the runs
            (`spatial-forcing analyse --run FOLDER/runs/RUN`).
        commands: that repeat it; default: `compare` with its file.
        settings: further settings to be shown, by name.
    """
    parts = ", ".join(f"{100 * fraction:g} %" for fraction in config.fractions)
    arms = {arm.title: arm for arm in config.specs}
    data = ReportData(
        title=title,
        subtitle=f"{len(arms)} arms, training seeds {', '.join(map(str, config.seeds))}, trained on {parts} "
        f"of the demonstrations{' that are not held out' if config.held_out else ''}; {_measured(config)}",
        sections=(
            comparison_section(found, arms, (*_notes(config), *notes)),
            *_losses(config),
            *gradient_sections(found.audits, tuple(arms)),
            *(_evidence(config) if sections is None else sections),
            *_videos(config),
        ),
        config={"compare": config.to_plain(), **(settings or {})},
        environment=environment(),
        commands=tuple(commands) or (f"spatial-forcing compare --config {config.output / 'compare.json'}",),
    )
    return write_report(data, config.output / PAGE)


def rebuild_page(folder: Path) -> Path:
    """Make the page of a finished comparison again, and nothing else; the folder may have been moved.

    Raises:
        ConfigError: `folder` holds no finished comparison.
    """
    settings = folder / CONFIG
    if not settings.exists():
        raise ConfigError(f"{settings} does not exist; give the output of `compare` or `quickstart`.")
    config = replace(CompareConfig.from_file(json.loads(settings.read_text()), folder), output=folder)
    return write_page(config, reread(config))


def _notes(config: CompareConfig) -> tuple[str, ...]:
    over = (
        "Intervals are over training seeds"
        if len(config.seeds) > 1
        else "One training seed: the intervals cover the choice of evaluation episodes, not that of the "
        "training seed"
    )
    return (
        "The arms of a training seed start from the same weights and see the same batches in the same "
        "order; all runs are evaluated on the same episodes.",
        f"{over}; p-values are corrected over all differences of their table (Holm). What is called not "
        "shown may still be true: the sample was too small to tell.",
    )


def _losses(config: CompareConfig) -> list[Section]:
    lines = {
        arm.title: [
            read_metrics(config.output / RUNS / cell.name)
            for cell in cells(config)
            if cell.arm.name == arm.name and cell.fraction == max(config.fractions)
        ]
        for arm in config.specs
    }
    section = training_section(lines)
    return [section] if section.figures else []


def _videos(config: CompareConfig) -> list[Section]:
    """The filmed episodes, a row each: all arms of a training seed side by side, from the same start."""
    rows: dict[str, list[Media]] = {}
    for cell in cells(config):
        folder = config.output / RUNS / cell.name
        part = "" if cell.fraction == 1 else f", {100 * cell.fraction:g} % of the data"
        for e in read_results(folder / EPISODES):
            if e.video is not None:
                heading = f"{e.task}, episode {e.seed}, training seed {cell.seed}{part}"
                outcome = "success" if e.success else "failure"
                shown = Media.file(folder / e.video, f"{cell.arm.title}: {outcome} after {e.steps} steps")
                rows.setdefault(heading, []).append(shown)
    made = tuple(VideoRow(heading, tuple(videos)) for heading, videos in rows.items())
    return [Section("videos", "Videos", videos=made)] if made else []


def _evidence(config: CompareConfig) -> list[Section]:
    """The depth probe, and ranks and CKA of the runs that were analysed."""
    names = [cell.name for cell in cells(config)]
    read = {name: read_representation(config.output / RUNS / name) for name in names}
    analysed = [numbers_section(one, name) for name, one in read.items() if one is not None]
    return [*read_probe(config.output / PROBE), *analysed]


def _measured(config: CompareConfig) -> str:
    tasks = "one task" if len(config.tasks) == 1 else f"each of {len(config.tasks)} tasks"
    by = [
        f"{config.episodes} episodes of {tasks}" if config.tasks else "",
        f"{100 * config.held_out:g} % of the demonstrations held out" if config.held_out else "",
    ]
    return ", ".join(filter(None, by))
