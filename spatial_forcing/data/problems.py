"""What can be wrong with a dataset, as one type that `check` lists and `Dataset.open` refuses."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from spatial_forcing.errors import DataError

logger = logging.getLogger(__name__)

RESTORE = "restore the file from where you got it, or record the episode again"
RERECORD = "leave the episode out (episodes=...), or record it again"
SHOWN = 3
"""Problems that an error quotes."""


@dataclass(frozen=True)
class Problem:
    """One defect.

    Attributes:
        episode: its number; None when it concerns the whole dataset.
        place: file and column.
        what: what is wrong there, with the values.
        remedy: what to do about it.
        note: it does not change what training reads; it is reported and nothing is refused.
    """

    episode: int | None
    place: str
    what: str
    remedy: str
    note: bool = False

    def __str__(self) -> str:
        where = "dataset" if self.episode is None else f"episode {self.episode}"
        return f"{'note: ' if self.note else ''}{where}: {self.place}: {self.what}; {self.remedy}."


def refuse(problems: Iterable[Problem], root: Any) -> None:
    """Log the notes, each once.

    Raises:
        DataError: there is a problem that is no note; quotes the first of them.
    """
    found = list(problems)
    wrong = [problem for problem in found if not problem.note]
    if wrong:
        more = f" ({len(wrong) - SHOWN} more)" if len(wrong) > SHOWN else ""
        quoted = " ".join(str(problem) for problem in wrong[:SHOWN])
        raise DataError(
            f"{root}: {quoted}{more} Run `spatial-forcing data check {root}` to see every problem."
        )
    for problem in found:
        _say(f"{root}: {problem}")


@lru_cache(maxsize=1024)
def _say(note: str) -> None:
    """Once a process: a comparison opens its dataset many times."""
    logger.warning("%s", note)
