"""Frames recorded a minute by one worker, encoding and writing included.

python -m benchmarks.recording --repeats 3
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import tyro

from benchmarks.common import show
from spatial_forcing.data import Dataset
from spatial_forcing.data.record import RecordConfig, record


def main(
    tasks: tuple[str, ...] = ("reach-v3", "drawer-open-v3", "push-v3"),
    episodes: int = 6,
    image_size: int = 128,
    repeats: int = 3,
) -> None:
    """Record `episodes` of every task `repeats` times; start-up of the worker is not counted.

    Args:
        tasks: Meta-World tasks.
        episodes: of each task; the start-up is what one episode of the first task takes beyond its share.
        image_size: pixels on a side; two cameras.
        repeats: of the whole measurement.
    """
    rates = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            short = timed(Path(folder) / "short", tasks, 1, image_size)
            long = timed(Path(folder) / "long", tasks, 1 + episodes, image_size)
            rates.append(60 * (long[0] - short[0]) / (long[1] - short[1]))
    show("two-camera frames a minute, one worker", rates, "aim 3,000 or more")


def timed(root: Path, tasks: tuple[str, ...], episodes: int, image_size: int) -> tuple[int, float]:
    """Frames and wall-clock seconds of one recording with one worker."""
    started = time.perf_counter()
    record(
        RecordConfig(
            root, tasks, episodes_per_task=episodes, image_size=image_size, workers=1, progress=False
        )
    )
    seconds = time.perf_counter() - started
    return len(Dataset.open(root)), seconds


if __name__ == "__main__":
    tyro.cli(main)
