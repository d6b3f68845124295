r"""Errors of a finished comparison's policies on demonstrations that were recorded for it afterwards.

    python studies/compare/open_loop.py --comparison runs/compare/libero-confirm \
        --dataset runs/compare/libero-unseen

For comparisons that held nothing out. Writes open-loop.json and open-loop.csv into the comparison's folder;
runs that are not finished are left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.progress import track

from spatial_forcing.data import Dataset
from spatial_forcing.evaluation.open_loop import open_loop_errors
from spatial_forcing.experiments import CompareConfig
from spatial_forcing.experiments.config import cells, train_config
from spatial_forcing.experiments.run import CONFIG, Run
from spatial_forcing.experiments.statistics import RunRecord, analyse_errors
from spatial_forcing.storage import replace_file, write_json
from spatial_forcing.students import load_student
from spatial_forcing.training.run import read_result


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        comparison: folder of a comparison; it is started from where that was.
        dataset: demonstrations of the same robot and cameras that no run has seen.
        frames: of each episode.
    """

    comparison: Path
    dataset: Path
    frames: int = 40


def main(settings: Settings) -> None:
    """Measure every finished run, then compare the arms."""
    torch.set_num_threads(1)
    config = CompareConfig.from_plain(json.loads((settings.comparison / CONFIG).read_text()))
    dataset = Dataset.open(settings.dataset)
    runs = [Run(cell, train_config(config, cell)) for cell in cells(config)]
    records = [measure(run, config, dataset, settings.frames) for run in track(runs, "measuring")]
    found = analyse_errors([r for r in records if r is not None], controls=config.controls)
    write_json(settings.comparison / "open-loop.json", found.to_json())
    replace_file(settings.comparison / "open-loop.csv", lambda path: path.write_text(found.csv()))
    console = Console()
    for table in found.tables():
        console.print(table)
    for sentence in found.sentences():
        console.print(f"- {sentence}", highlight=False)


def measure(run: Run, config: CompareConfig, dataset: Dataset, frames: int) -> RunRecord | None:
    """The errors of a run's last policy, if there is one."""
    result = read_result(run.train.output)
    if result is None:
        return None
    errors = open_loop_errors(
        load_student(run.policy(run.train.steps)),
        dataset,
        range(len(dataset.episodes)),
        cameras=run.train.student.cameras,
        execute=config.execute,
        frames=frames,
    )
    cell = run.cell
    return RunRecord(
        cell.arm.name, cell.fraction, cell.seed, {result.steps: errors}, result.seconds, result.peak_memory
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
