"""Progress of a run: steps, time left, loss and alignment cosine."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console

from spatial_forcing.progress import progress_bar


class TrainingProgress:
    """Steps done, time left, loss and alignment cosine. Without `shown` it prints nothing."""

    def __init__(
        self, title: str, done: int, steps: int, shown: bool, console: Console | None = None
    ) -> None:
        self._bar = progress_bar(shown, console=console, note="figures")
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
        if row is None:
            self._bar.update(self._task, completed=done)
        else:
            self._bar.update(self._task, completed=done, figures=describe(row))

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(message, markup=False, highlight=False, soft_wrap=True)


def describe(row: Mapping[str, float]) -> str:
    """The loss and the cosine, as text."""
    text = f"loss {row['loss']:.4f}"
    cosine = next((value for name, value in row.items() if name.endswith("cosine")), None)
    return text if cosine is None else f"{text}, cosine {cosine:.3f}"
