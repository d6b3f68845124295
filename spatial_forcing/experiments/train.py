"""Trains several arms side by side, each in a process of its own, with one progress display."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import TaskID

from spatial_forcing.errors import SpatialForcingError
from spatial_forcing.progress import ProgressBars, progress_bar
from spatial_forcing.storage import write_json
from spatial_forcing.training import TrainConfig
from spatial_forcing.training.run import METRICS, RESULT

POLL_SECONDS = 0.5
GRACE_SECONDS = 60
"""What an interrupted arm may take to save its checkpoint."""
SHOWN_LINES = 15


class ArmFailed(SpatialForcingError):
    """A training process ended with an error; the message holds the end of its log."""


@dataclass
class _Running:
    name: str
    config: TrainConfig
    process: subprocess.Popen[bytes]
    line: TaskID
    lane: int


def train_arms(arms: Mapping[str, TrainConfig], *, parallel: int, console: Console) -> None:
    """Train every arm to its end, `parallel` at a time; finished ones are not repeated.

    Arms run in processes of their own with a share of the cores and one GPU each (shared where there are more
    arms at a time than GPUs): small models waste a second thread, and the peak memory of an arm is its own.
    Ctrl-C stops them all; each saves a checkpoint first.

    Raises:
        ArmFailed: a process failed; the others are stopped (and resume later).
    """
    waiting = list(arms.items())
    threads = max(1, (os.cpu_count() or 1) // min(parallel, len(waiting)))
    running: list[_Running] = []
    with progress_bar(console=console, note="note") as bar:
        lines = {
            name: bar.add_task(f"   {name:8}", total=config.steps, note="waiting")
            for name, config in arms.items()
        }
        try:
            while waiting or running:
                while waiting and len(running) < parallel:
                    name, config = waiting.pop(0)
                    lane = min(set(range(parallel)) - {arm.lane for arm in running})
                    process = _start(config, {"OMP_NUM_THREADS": str(threads)} | one_gpu(lane))
                    running.append(_Running(name, config, process, lines[name], lane))
                time.sleep(POLL_SECONDS)
                running = [arm for arm in running if not _finished(arm, bar)]
        finally:
            _stop(running)


def one_gpu(lane: int) -> dict[str, str]:
    """Environment of the process in this lane: it sees one of the visible GPUs. Empty without any."""
    count = torch.cuda.device_count()
    if not count:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return {"CUDA_VISIBLE_DEVICES": names[lane % count]}


def _start(config: TrainConfig, settings: Mapping[str, str]) -> subprocess.Popen[bytes]:
    wanted = config.output / "wanted.json"
    write_json(wanted, config.to_file())
    command = [sys.executable, "-m", "spatial_forcing.cli", "train", "--config", str(wanted)]
    with (config.output / "train.log").open("ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | settings, start_new_session=True
        )


def _finished(arm: _Running, bar: ProgressBars) -> bool:
    code = arm.process.poll()
    metrics = _last_metrics(arm.config.output / METRICS)
    note = "starting"
    if metrics:
        shown = [("loss", "action_loss"), ("cosine", "cosine")]
        note = "  ".join(f"{label} {metrics[key]:.3f}" for label, key in shown if key in metrics)
    bar.update(arm.line, completed=metrics.get("step", 0), note=note)
    if code is None:
        return False
    if code != 0 or not (arm.config.output / RESULT).exists():
        raise ArmFailed(f"training of arm {arm.name!r} ended with code {code}:\n{_tail(arm.config.output)}")
    bar.update(arm.line, completed=arm.config.steps)
    return True


def _last_metrics(path: Path) -> dict[str, float]:
    """The last complete line of a metrics file that another process appends to."""
    if not path.exists():
        return {}
    complete = path.read_bytes().rpartition(b"\n")[0]
    last = complete.rpartition(b"\n")[2]
    return dict(json.loads(last)) if last else {}


def _tail(folder: Path) -> str:
    log = (folder / "train.log").read_text(errors="replace").splitlines()
    return "\n".join([*log[-SHOWN_LINES:], f"(whole log: {folder / 'train.log'})"])


def _stop(running: Sequence[_Running]) -> None:
    """Ask politely (each saves a checkpoint), then insist."""
    for arm in running:
        arm.process.terminate()
    for arm in running:
        try:
            arm.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            arm.process.kill()
            arm.process.wait()
