"""`spatial-forcing data record | check | stats | info | convert`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from spatial_forcing.data import Dataset
from spatial_forcing.data.check import check as find_problems
from spatial_forcing.data.convert import CONVERTERS, load_converter
from spatial_forcing.data.convert.run import convert as run_conversion
from spatial_forcing.data.convert.run import read_log
from spatial_forcing.data.info import STATS_FILE, parse_keys
from spatial_forcing.data.recompute import recompute_stats
from spatial_forcing.data.record import RecordConfig
from spatial_forcing.data.record import record as record_demonstrations
from spatial_forcing.errors import ConfigError, DataError

Root = Annotated[Path, tyro.conf.Positional]


def record(config: tyro.conf.OmitArgPrefixes[RecordConfig]) -> None:
    """Record demonstrations of scripted experts into a LeRobot v3.0 dataset; the same command resumes.

    `--stand-ins`: where LIBERO's assets are not found, plain ones are made and used.
    """
    root = record_demonstrations(config)
    dataset = Dataset.open(root)
    Console().print(f"{len(dataset.episodes)} episodes, {len(dataset)} frames in {root}")


def check(root: Root, decode: bool = True, keys: tuple[str, ...] = ()) -> None:
    """Find damaged files, NaN, wrong shapes, tables and videos that disagree, wrong statistics, by episode.

    Args:
        root: folder of the dataset.
        decode: also decode every frame; without it only the tables are read.
        keys: `NAME=FEATURE` where the dataset calls a feature otherwise, e.g. `action=actions`.
    """
    console = Console(soft_wrap=True, highlight=False)
    found = find_problems(root, decode=decode, keys=parse_keys(keys))
    for problem in found:
        console.print(str(problem), markup=False)
    if problems := [problem for problem in found if not problem.note]:
        raise DataError(f"{root} has {len(problems)} problems, listed above.")
    console.print(f"{root}: no problem found.")


def stats(root: Root) -> None:
    """Recompute `meta/stats.json`, from the rows of all episodes and the images' statistics of each.

    Args:
        root: folder of the dataset.
    """
    changed = recompute_stats(root)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{root / STATS_FILE}: {', '.join(changed) or 'nothing'} changed.")


def info(root: Root) -> None:
    """Print what a dataset holds.

    Args:
        root: folder of the dataset.
    """
    dataset = Dataset.open(root)
    table = Table(title=str(root), box=None, title_justify="left", show_header=False)
    sizes = ", ".join(f"{c} {'x'.join(str(n) for n in dataset.info.frame_size(c))}" for c in dataset.cameras)
    table.add_row("cameras", sizes)
    table.add_row("state, action", f"{dataset.state.shape[1]}, {dataset.action.shape[1]} numbers")
    table.add_row("frames", f"{len(dataset)} at {dataset.fps} Hz in {len(dataset.episodes)} episodes")
    counts: dict[str, int] = {}

    for episode in dataset.episodes:
        counts[episode.task] = counts.get(episode.task, 0) + 1
    for task, count in counts.items():
        table.add_row("task", f"{task} ({count} episodes)")
    Console().print(table)


def convert(prog: str, arguments: Sequence[str]) -> None:
    """Convert another format into a LeRobot v3.0 dataset: `data convert NAME OPTIONS`. It resumes.

    `--stand-ins`: where LIBERO's assets are not found, plain ones are made and used.
    """
    names = ", ".join(sorted(CONVERTERS))
    if arguments and arguments[0] in ("-h", "--help"):
        Console().print(f"usage: {prog} NAME OPTIONS\n\n{convert.__doc__}\nNAME is one of: {names}.")
        return
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(f"{prog} needs the name of a converter first: {names}.")
    name, *rest = arguments
    settings = tyro.cli(load_converter(name), prog=f"{prog} {name}", args=rest)
    dataset = Dataset.open(run_conversion(settings))
    console = Console(soft_wrap=True, highlight=False)
    reasons = Counter(read_log(settings.output)["skipped"].values())
    for reason, count in reasons.items():
        console.print(f"{count} left out: {reason}", markup=False)
    console.print(f"{len(dataset.episodes)} episodes, {len(dataset)} frames in {settings.output}")
