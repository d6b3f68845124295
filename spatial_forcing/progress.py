"""Progress of long work: bars on a terminal, in a log file a line for each now and then."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

LINE_EVERY = 30.0
"""Seconds between the lines of one task where the output is not a terminal."""


class ProgressBars(Progress):
    """rich's bars on a terminal; elsewhere a line a task every `LINE_EVERY` seconds and at its end.

    Args:
        columns: of the bars.
        console: where they are shown.
        enabled: without it nothing is printed.
        note: the task's field (a keyword of `update`) that lines end with; "" for none.
    """

    def __init__(self, *columns: ProgressColumn, console: Console, enabled: bool, note: str = "") -> None:
        super().__init__(*columns, console=console, disable=not (enabled and console.is_terminal))
        self._lines, self._note = enabled and not console.is_terminal, note
        self._said: dict[TaskID, tuple[float, float]] = {}  # when the last line was, and at how many
        self._began: dict[TaskID, tuple[float, float]] = {}

    def add_task(self, description: str, *args: Any, **kwargs: Any) -> TaskID:
        """See rich."""
        task = super().add_task(description, *args, **kwargs)
        now, done = time.monotonic(), self._tasks[task].completed
        self._began[task], self._said[task] = (now, done), (now, done)
        return task

    def update(self, task_id: TaskID, **kwargs: Any) -> None:
        """See rich."""
        super().update(task_id, **kwargs)
        self._say(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """See rich."""
        super().advance(task_id, advance)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        task, now = self._tasks[task_id], time.monotonic()
        if not self._lines or task.total is None:
            return
        last, at = self._said[task_id]
        ended = task.completed >= task.total
        if task.completed == at or not (ended or now - last >= LINE_EVERY):
            return
        self._said[task_id] = now, task.completed
        began, first = self._began[task_id]
        left = (now - began) / max(1.0, task.completed - first) * (task.total - task.completed)
        words = [f"{task.description.strip()}: {task.completed:g}/{task.total:g}", f"{left:.0f} s left"]
        note = str(task.fields.get(self._note, "")) if self._note else ""
        self.console.print(", ".join(filter(None, [*words, note])), markup=False, highlight=False)


def progress_bar(enabled: bool = True, *, console: Console | None = None, note: str = "") -> ProgressBars:
    """Description, bar, count, time left and the field `note`, on the terminal's error stream by default."""
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    ]
    if note:
        columns.append(TextColumn(f"{{task.fields[{note}]}}"))
    console = console or Console(stderr=True)
    return ProgressBars(*columns, console=console, enabled=enabled, note=note)
