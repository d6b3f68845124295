"""Finished episodes: rows of an appendable JSONL file, and the tables made of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from spatial_forcing.errors import DataError
from spatial_forcing.evaluation.statistics import Rate, macro_mean, wilson


@dataclass(frozen=True)
class EpisodeResult:
    """One finished episode.

    Attributes:
        task, seed: which episode; `env.reset(seed=seed)` started it.
        success: whether the environment reported success at any step.
        steps: environment steps taken.
        reward: sum of rewards.
        sim_seconds: wall time its worker spent in the environment (stepping and rendering).
        video: file of its video, relative to the results file, or None.
        tags: what was evaluated, e.g. `{"arm": "sf", "step": 500}`.
        setup: settings that decide the outcome; episodes of another setup must not be mixed in.
        threads: threads of the policy's process (torch); the last bits of its actions depend on them. None in
            files of older versions.
    """

    task: str
    seed: int
    success: bool
    steps: int
    reward: float
    sim_seconds: float
    video: str | None = None
    tags: Mapping[str, Any] = field(default_factory=dict)
    setup: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None


@dataclass(frozen=True)
class EpisodeError:
    """An episode that failed twice (its worker died or its environment raised); it counts nowhere."""

    task: str
    seed: int
    message: str


@dataclass(frozen=True)
class EvaluationResult:
    """All finished episodes of one evaluation, in order of task and seed.

    Attributes:
        episodes: finished ones, those of an earlier interrupted call included.
        errors: episodes without a result.
        seconds: wall time of this call.
        steps_run: environment steps taken by this call (resumed episodes excluded).
        busy: fraction of the workers' time spent in the simulator, in [0, 1]; the rest waited.
    """

    episodes: tuple[EpisodeResult, ...]
    errors: tuple[EpisodeError, ...] = ()
    seconds: float = 0.0
    steps_run: int = 0
    busy: float = 0.0

    @property
    def per_task(self) -> dict[str, Rate]:
        """Success rate with Wilson interval by task."""
        return rates_by_task(self.episodes)

    @property
    def success(self) -> Rate:
        """Unweighted mean over tasks with its interval. Raises `DataError` without any episode."""
        return macro_mean(list(self.per_task.values()))

    def table(self, title: str = "Success") -> Table:
        """The per-task table with its macro mean, for `rich.print`."""
        return success_table({"success": self.episodes}, title=title, errors=self.errors)


def rates_by_task(episodes: Iterable[EpisodeResult]) -> dict[str, Rate]:
    """Success rate with Wilson interval by task, in order of first appearance."""
    counts: dict[str, list[bool]] = {}
    for episode in episodes:
        counts.setdefault(episode.task, []).append(episode.success)
    return {task: wilson(sum(won), len(won)) for task, won in counts.items()}


def remarks(episodes: Iterable[EpisodeResult]) -> tuple[str, ...]:
    """What every table of these results must say beside the figures."""
    stand_ins = any(episode.setup.get("assets") == "stand-ins" for episode in episodes)
    return ("Stand-in looks: not comparable with published results.",) if stand_ins else ()


def success_table(
    arms: Mapping[str, Sequence[EpisodeResult]],
    *,
    title: str = "Success",
    errors: Sequence[EpisodeError] = (),
) -> Table:
    """Tasks x arms with 95 % intervals and a macro-mean row, for `rich.print`."""
    rates = {arm: rates_by_task(rows) for arm, rows in arms.items()}
    tasks = list(dict.fromkeys(task for by_task in rates.values() for task in by_task))
    said = remarks(row for rows in arms.values() for row in rows)
    caption = " ".join(("95 % intervals; mean = unweighted over tasks.", *said))
    if errors:
        caption += f" Failed to run, not counted: {len(errors)}."
    table = Table(title=title, caption=caption, caption_style="red" if errors else "dim")
    table.add_column("task")
    for arm in arms:
        table.add_column(arm, justify="right")
        table.add_column("episodes", justify="right", style="dim")
    for task in tasks:
        table.add_row(task, *_cells([by_task.get(task) for by_task in rates.values()]))
    table.add_section()
    means = [macro_mean(list(by_task.values())) if by_task else None for by_task in rates.values()]
    table.add_row("mean", *_cells(means), style="bold")
    return table


def _cells(rates: Iterable[Rate | None]) -> list[str]:
    return [text for r in rates for text in ((str(r), str(r.trials)) if r else ("-", "0"))]


def read_results(path: Path, tags: Mapping[str, Any] | None = None) -> list[EpisodeResult]:
    """The episodes in a results file, those whose tags include `tags`; an absent file holds none.

    A last line cut short by a kill is left out: its episode counts as not finished.

    Raises:
        DataError: another line is not a result; the message names it.
    """
    if not path.exists():
        return []
    names = {f.name for f in fields(EpisodeResult)}
    episodes = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is incomplete
        try:
            row = json.loads(line)
            episode = EpisodeResult(**{k: v for k, v in row.items() if k in names})
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number} is not an episode result ({error}); remove the line to evaluate "
                "that episode again."
            ) from error
        if all(episode.tags.get(k) == v for k, v in (tags or {}).items()):
            episodes.append(episode)
    return episodes


def read_harness_results(path: Path, tags: Mapping[str, Any] | None = None) -> list[EpisodeResult]:
    """The episodes in a result file (JSON) of vla-eval, those whose tags include `tags`.

    Tags are `benchmark` and `file` (the file's name without its ending); the seed is the episode's number in
    its task, and the setup what the benchmark was given. As in the harness, an episode that ended in an error
    counts as a failure.

    Raises:
        DataError: it is no such file, or an incomplete one.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        named = {"benchmark": body["benchmark"], "file": path.stem}
        setup = {"params": (body.get("config") or {}).get("params", {}), "harness": "vla-eval"}
        episodes = [
            EpisodeResult(
                task=task["task"],
                seed=int(row["episode_id"]),
                success=bool(row["metrics"].get("success", False)),
                steps=int(row.get("steps") or 0),
                reward=float(row["metrics"].get("reward", 0.0)),
                sim_seconds=float(row.get("elapsed_sec") or 0.0),
                tags=named,
                setup=setup,
            )
            for task in body["tasks"]
            for row in task["episodes"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a result of vla-eval ({type(error).__name__}: {error}); give the JSON file that "
            "`vla-eval run` or `vla-eval export` wrote for one benchmark."
        ) from error
    if body.get("partial"):
        raise DataError(f"{path} is partial: some of its shards are missing; run `vla-eval merge` first.")
    return [e for e in episodes if all(e.tags.get(k) == v for k, v in (tags or {}).items())]


class ResultsFile:
    """Appends episodes to a JSONL file, one flushed line each, so that a kill loses at most one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _drop_incomplete_line(path)

    def append(self, episode: EpisodeResult) -> None:
        """Write one row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(episode)) + "\n")


def _drop_incomplete_line(path: Path) -> None:
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
