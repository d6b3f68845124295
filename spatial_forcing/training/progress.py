"""Progress of a run: a bar on a terminal, a line every few seconds in a log file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY = 30.0
"""Seconds between lines where the output is not a terminal."""


class TrainingProgress:
    """Steps done, time left, loss and alignment cosine. Without `shown` it prints nothing."""

    def __init__(
        self, title: str, done: int, steps: int, shown: bool, console: Console | None = None
    ) -> None:
        self._console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            disable=not (shown and self._console.is_terminal),
        )
        self._lines = shown and not self._console.is_terminal
        self._title, self._done, self._steps = title, done, steps
        self._start = self._last = time.monotonic()
        self._first = done
        self._task = self._bar.add_task(title, total=steps, completed=done, figures="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, done: int, row: Mapping[str, float] | None = None) -> None:
        """`done` steps are done; `row` is the latest synchronised metrics, if there are new ones."""
        self._done = done
        if row is None:
            self._bar.update(self._task, completed=done)
            return
        figures = describe(row)
        self._bar.update(self._task, completed=done, figures=figures)
        now = time.monotonic()
        if self._lines and (now - self._last >= LINE_EVERY or done == self._steps):
            self._last = now
            left = (now - self._start) / max(1, done - self._first) * (self._steps - done)
            self._console.print(f"{self._title}: step {done}/{self._steps}, {left:.0f} s left, {figures}")

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)


def describe(row: Mapping[str, float]) -> str:
    """The loss and the cosine, as text."""
    text = f"loss {row['loss']:.4f}"
    cosine = next((value for name, value in row.items() if name.endswith("cosine")), None)
    return text if cosine is None else f"{text}, cosine {cosine:.3f}"
