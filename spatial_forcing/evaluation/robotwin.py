"""Results of RoboTwin 2.0's evaluation script, with intervals: `eval_result/.../_result.txt` to a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from spatial_forcing.envs.robotwin import CONFIGS, EPISODES
from spatial_forcing.errors import DataError
from spatial_forcing.evaluation.statistics import Rate, macro_mean, wilson


@dataclass(frozen=True)
class RoboTwinResult:
    """One run of the script.

    Attributes:
        task, policy, checkpoint: which.
        config: RoboTwin's task configuration, `demo_clean` (easy) or `demo_randomized` (hard).
        rate: success with its 95 % interval.
    """

    task: str
    policy: str
    config: str
    checkpoint: str
    rate: Rate


def read_robotwin_results(folder: Path, episodes: int = EPISODES) -> list[RoboTwinResult]:
    """The newest result of every task, policy, configuration and checkpoint below `folder`.

    Args:
        folder: RoboTwin's `eval_result`.
        episodes: the script's `test_num`, over which it averages.

    Raises:
        DataError: no result there, or a file that is none.
    """
    newest: dict[tuple[str, ...], Path] = {}
    for path in sorted(folder.glob("*/*/*/*/*/_result.txt")):
        newest[path.relative_to(folder).parts[:4]] = path  # the fifth part is the time, sorted
    if not newest:
        raise DataError(
            f"{folder} holds no TASK/POLICY/CONFIG/CHECKPOINT/TIME/_result.txt; give RoboTwin's eval_result."
        )
    results = []
    for (task, policy, config, checkpoint), path in newest.items():
        lines = path.read_text(encoding="utf-8").split()
        try:
            fraction = float(lines[-1])
        except (IndexError, ValueError) as error:
            raise DataError(f"{path} does not end with a success rate; run that evaluation again.") from error
        successes = round(fraction * episodes)
        if abs(successes - fraction * episodes) > 1e-6 or not 0 <= successes <= episodes:
            raise DataError(f"{path}: {fraction} is not a number of successes in {episodes} episodes.")
        results.append(RoboTwinResult(task, policy, config, checkpoint, wilson(successes, episodes)))
    return results


def robotwin_table(results: Sequence[RoboTwinResult]) -> Table:
    """Tasks x protocols (easy, hard) for each checkpoint, with means over tasks, for `rich.print`."""
    table = Table(title="RoboTwin 2.0", caption="95 % intervals; mean = unweighted over tasks.")
    table.add_column("task")
    runs = sorted({(r.policy, r.checkpoint) for r in results})
    columns = [(run, config) for run in runs for config in CONFIGS.values()]
    names = {config: name for name, config in CONFIGS.items()}
    for (_, checkpoint), config in columns:
        table.add_column(f"{checkpoint} {names[config]}", justify="right")
    rates = {((r.policy, r.checkpoint), r.config, r.task): r.rate for r in results}
    for task in sorted({r.task for r in results}):
        table.add_row(task, *(str(rates.get((*column, task), "-")) for column in columns))
    table.add_section()
    means = [[rate for key, rate in rates.items() if key[:2] == column] for column in columns]
    table.add_row("mean", *(str(macro_mean(part)) if part else "-" for part in means), style="bold")
    return table
