"""`spatial-forcing compare`, `compare-checkpoints` and `sample-size`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from spatial_forcing.commands.train import read_config
from spatial_forcing.errors import DataError
from spatial_forcing.evaluation import read_results
from spatial_forcing.evaluation.paired import mcnemar, outcomes, p_text
from spatial_forcing.evaluation.planning import independent_episode_sd, sample_sizes
from spatial_forcing.evaluation.results import (
    EpisodeResult,
    rates_by_task,
    read_harness_results,
    remarks,
)
from spatial_forcing.evaluation.statistics import macro_mean
from spatial_forcing.experiments import ARMS, CompareConfig
from spatial_forcing.experiments import compare as run_comparison
from spatial_forcing.experiments.arms import parse_overrides
from spatial_forcing.experiments.report import write_page


def compare(prog: str, arguments: Sequence[str]) -> None:
    """Train and evaluate arms x training seeds, matched in everything else, and report the differences.

    `--config FILE` (a compare.json) gives the starting point, every other option overrides one setting of it.
    The same command resumes; more arms and seeds may be added to it later. `--stand-ins`: where LIBERO's
    assets are not found, plain ones are made and used.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config", type=Path, default=None)
    chosen, rest = first.parse_known_args(list(arguments))
    plain = {} if chosen.config is None else read_config(chosen.config, "give a compare.json")
    # What the file leaves out must be on the command line.
    open_ones = {name: tyro.MISSING for name in ("dataset", "output") if name not in plain}
    given = dict.fromkeys(open_ones, "open") | plain
    folder = Path() if chosen.config is None else chosen.config.parent
    default = replace(CompareConfig.from_file(given, folder), **open_ones)
    listed = "\n".join(f"  {name}: {arm.description}" for name, arm in ARMS.items())
    config = tyro.cli(
        CompareConfig,
        prog=prog,
        description=f"{compare.__doc__}\nArms:\n{listed}",
        default=default,
        args=rest,
    )
    console = Console()
    found = run_comparison(config, console)
    page = write_page(config, found)
    console.print(f"page: [bold]{page}[/]")


@dataclass(frozen=True)
class CheckpointOptions:
    """The episodes of two policies, selected by their tags.

    Attributes:
        results: episode files (JSONL) of the two policies, one file may hold both; or result files (JSON) of
            vla-eval.
        first: tags (`name=value`) that select the episodes of the one policy; vla-eval's files have
            `file=NAME` and `benchmark=NAME`.
        second: tags of the other's.
    """

    results: tuple[Path, ...]
    first: tuple[str, ...]
    second: tuple[str, ...]


def checkpoints(options: tyro.conf.OmitArgPrefixes[CheckpointOptions]) -> None:
    """Two given policies over identical episodes: Wilson intervals and McNemar's exact test.

    The result speaks of these two checkpoints; that one method is better than another needs several training
    seeds (`compare`).
    """
    one, two = (_select(options.results, words) for words in (options.first, options.second))
    given = [{json.dumps(row.setup.get("params"), sort_keys=True) for row in rows} for rows in (one, two)]
    if given[0] != given[1]:
        raise DataError(
            f"the two policies played with other params ({'; '.join(sorted(given[0] | given[1]))}), so their "
            "episodes are not the same; run both with one configuration."
        )
    found = mcnemar(outcomes(one), outcomes(two))
    console = Console()
    for words, rows in ((options.first, one), (options.second, two)):
        console.print(f"{' '.join(words)}: {macro_mean(list(rates_by_task(rows).values()))}")
    console.print(
        f"{found.episodes} identical episodes; only the first succeeds in {found.only_first}, only the "
        f"second in {found.only_second}; McNemar's exact p {p_text(found.p_value)}"
        + ("." if found.p_value < 0.05 else ": a difference is not shown.")
    )
    for remark in remarks([*one, *two]):
        console.print(remark)


def _select(files: Sequence[Path], words: Sequence[str]) -> list[EpisodeResult]:
    if missing := [str(file) for file in files if not file.exists()]:
        raise DataError(f"{', '.join(missing)} does not exist; give the episodes (JSONL) of an evaluation.")
    tags = parse_overrides(tuple(words), "tags")
    readers = {".json": read_harness_results}
    rows = [e for file in files for e in readers.get(file.suffix, read_results)(file, tags)]
    if not rows:
        raise DataError(f"no episode in {', '.join(map(str, files))} has the tags {tags}.")
    return rows


@dataclass(frozen=True)
class SampleSizeOptions:
    """The difference to detect, and the spread of the outcomes.

    Attributes:
        effect: difference of success rates, e.g. 0.05 for five points.
        rate: success rate of the arms; gives the spread of an episode's difference where nothing is known.
        seed_sd: standard deviation of the difference over training seeds (`compare` says it).
        episode_sd: of one episode's paired difference (`compare` says it); none: from `rate`.
        episodes: evaluation episodes of a seed, over all tasks; several give a table.
        power: wanted probability that a true difference of this size is shown.
        alpha: two-sided level; divide 0.05 by the number of differences that are compared.
    """

    effect: float = 0.05
    rate: float = 0.5
    seed_sd: float = 0.05
    episode_sd: float | None = None
    episodes: tuple[int, ...] = (40, 80, 160, 320)
    power: float = 0.8
    alpha: float = 0.05


def sample_size(options: tyro.conf.OmitArgPrefixes[SampleSizeOptions]) -> None:
    """To see a difference with a given power you need N episodes x S training seeds."""
    episode_sd = independent_episode_sd(options.rate) if options.episode_sd is None else options.episode_sd
    plans = sample_sizes(
        options.effect,
        seed_sd=options.seed_sd,
        episode_sd=episode_sd,
        episodes=options.episodes,
        power_wanted=options.power,
        alpha=options.alpha,
    )
    table = Table(
        title=f"To see {100 * options.effect:g} points at {100 * options.power:g} % power",
        caption=f"Differences spread by {options.seed_sd:g} over training seeds and {episode_sd:.2g} over a "
        f"seed's episodes; level {options.alpha:g}.",
    )
    for column in ("episodes a seed", "training seeds", "power"):
        table.add_column(column, justify="right")
    for episodes, plan in zip(options.episodes, plans, strict=True):
        cells = ("over 1000", "-") if plan is None else (str(plan.seeds), f"{100 * plan.power:.0f} %")
        table.add_row(str(episodes), *cells)
    Console().print(table)
