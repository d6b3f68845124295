"""Arms compared over training seeds: paired differences, correction for several arms, spread, McNemar's test.

A training seed is one draw of initial weights and batches; an arm's result on it is the success over the
evaluation episodes, a mean over tasks. Arms that share their seeds and episodes are compared seed by seed.

The standard error of the mean difference comes from a hierarchical bootstrap: seeds are drawn with
replacement, and for each drawn seed the episodes of every task. With a handful of seeds its percentiles are
too narrow (Hesterberg 2015, Am. Stat. 69:371), so the interval is Student's, with one degree of
freedom less than there are seeds, and the error is scaled by sqrt(S / (S - 1)). The spread between seeds
already holds the noise of their episodes, and the second stage adds it again: with few episodes the interval
is wider than it need be (`planning.power` counts with that). Where seeds solve all or nothing, a few may
agree by chance; what they then show is bounded, see `least_error`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from spatial_forcing.errors import DataError
from spatial_forcing.evaluation.results import EpisodeResult

LEVEL = 0.05
"""Of a corrected p-value below which a difference counts as shown."""
BOOTSTRAPS = 10_000
CHUNK = 500
"""Bootstrap draws made at a time, so that many seeds and tasks do not fill the memory."""

Outcomes = Mapping[tuple[str, int], bool]
"""Success by (task, episode seed) of one policy."""
SeedOutcomes = Mapping[int, Outcomes]
"""Outcomes by training seed."""
Errors = Mapping[tuple[str, int], float]
"""A positive error by (task, episode) of one policy; lower is better."""


@dataclass(frozen=True)
class PairedDifference:
    """Mean over seeds of treated minus control, in [-1, 1], with a two-sided interval.

    Attributes:
        value, low, high: the estimate and its interval.
        p_value: of "no difference", two-sided, not corrected.
        per_seed: differences by training seed.
        per_task: mean over seeds by task.
        seed_sd: standard deviation of the differences over seeds, less what the episodes alone give.
        episode_sd: standard deviation of one episode's paired difference around its task's, within a seed.
        episodes: in each seed.
    """

    value: float
    low: float
    high: float
    p_value: float
    per_seed: Mapping[int, float]
    per_task: Mapping[str, float]
    seed_sd: float
    episode_sd: float
    episodes: int

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


@dataclass(frozen=True)
class ErrorDifference:
    """Mean over seeds of treated minus control as a part of the control's mean error; below 0 is better.

    Attributes:
        value, low, high: the estimate and its interval; -0.1: an error lower by a tenth.
        p_value: of "no difference", two-sided, not corrected.
        per_seed: differences by training seed, parts of the same mean.
        episodes: in each seed.
    """

    value: float
    low: float
    high: float
    p_value: float
    per_seed: Mapping[int, float]
    episodes: int

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} % [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


@dataclass(frozen=True)
class Spread:
    """Success over training seeds: mean, Student's interval of the mean, standard deviation, extremes."""

    mean: float
    low: float
    high: float
    sd: float
    minimum: float
    maximum: float
    seeds: int


@dataclass(frozen=True)
class McNemar:
    """Two policies over identical episodes: those that only the first, or only the second, solved."""

    only_first: int
    only_second: int
    episodes: int
    p_value: float


def outcomes(episodes: Iterable[EpisodeResult]) -> dict[tuple[str, int], bool]:
    """Success by (task, episode seed). Raises `DataError` when an episode is there twice."""
    found: dict[tuple[str, int], bool] = {}
    for episode in episodes:
        key = (episode.task, episode.seed)
        if key in found:
            raise DataError(f"episode {key} is there twice; give the episodes of one policy only.")
        found[key] = episode.success
    return found


def macro_success(found: Outcomes) -> float:
    """Success, an unweighted mean over tasks."""
    if not found:
        raise DataError("no episode, so there is no success rate; evaluate the policy first.")
    return macro_error(found)


def macro_error(found: Errors) -> float:
    """The mean over episodes, then, unweighted, over tasks."""
    by_task: dict[str, list[float]] = {}
    for (task, _), value in found.items():
        by_task.setdefault(task, []).append(value)
    return float(np.mean([np.mean(values) for values in by_task.values()]))


def paired_difference(
    treated: SeedOutcomes,
    control: SeedOutcomes,
    *,
    bootstraps: int = BOOTSTRAPS,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Treated minus control over the training seeds that both have.

    Args:
        treated, control: outcomes over the same episodes in every seed.
        bootstraps: draws of the hierarchical bootstrap.
        confidence: of the interval.
        seed: of the bootstrap.

    Raises:
        DataError: fewer than two common seeds, or episodes that are not the same in both arms.
    """
    seeds = sorted(treated.keys() & control.keys())
    if len(seeds) < 2:
        raise DataError(
            f"the arms share the training seeds {seeds}; a difference with an interval needs at least two."
        )
    tasks, better, worse, counts = _discordant(treated, control, seeds)
    by_task = (better - worse) / counts
    by_seed = by_task.mean(1)
    value = float(by_seed.mean())
    error = bootstrap_error(better, worse, counts, bootstraps=bootstraps, seed=seed)
    error *= sqrt(len(seeds) / (len(seeds) - 1))
    error = max(error, least_error(value, len(seeds), int(counts[0].sum())))
    low, high, p_value = _student(value, error, len(seeds), confidence)
    within = (better + worse) / counts - by_task**2
    noise = float((within / counts).sum(1).mean() / len(tasks) ** 2)
    return PairedDifference(
        value=value,
        low=max(-1.0, low),
        high=min(1.0, high),
        p_value=p_value,
        per_seed=dict(zip(seeds, map(float, by_seed), strict=True)),
        per_task=dict(zip(tasks, map(float, by_task.mean(0)), strict=True)),
        seed_sd=sqrt(max(0.0, float(by_seed.var(ddof=1)) - noise)),
        episode_sd=sqrt(float(within.mean())),
        episodes=int(counts[0].sum()),
    )


def paired_error(
    treated: Mapping[int, Errors],
    control: Mapping[int, Errors],
    *,
    bootstraps: int = BOOTSTRAPS,
    confidence: float = 0.95,
    seed: int = 0,
) -> ErrorDifference:
    """`paired_difference` for errors: the same bootstrap and interval, as a part of the control's mean.

    Args:
        treated, control: by training seed, errors over the same episodes.
        bootstraps, confidence, seed: see `paired_difference`.

    Raises:
        DataError: fewer than two common seeds, episodes that are not the same in all of them, or a control
            without any error.
    """
    seeds = sorted(treated.keys() & control.keys())
    episodes = sorted(treated[seeds[0]]) if seeds else []
    if len(seeds) < 2 or not episodes:
        raise DataError(f"the arms share the training seeds {seeds}; a difference needs at least two.")
    if any(sorted(found[s]) != episodes for s in seeds for found in (treated, control)):
        raise DataError("the errors are not over the same episodes in all arms and training seeds.")
    level = float(np.mean([macro_error(control[s]) for s in seeds]))
    if level <= 0:
        raise DataError("the control's error is 0, so that no difference can be a part of it.")
    columns = [
        np.array([[treated[s][key] - control[s][key] for key in episodes if key[0] == task] for s in seeds])
        for task in sorted({task for task, _ in episodes})
    ]
    by_seed = np.mean([values.mean(1) for values in columns], axis=0) / level
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, bootstraps, CHUNK):
        drawn = rng.integers(len(seeds), size=(min(CHUNK, bootstraps - start), len(seeds)))
        again = [
            v[drawn[..., None], rng.integers(v.shape[1], size=(*drawn.shape, v.shape[1]))] for v in columns
        ]
        means.append(np.mean([values.mean((1, 2)) for values in again], axis=0))
    error = float(np.concatenate(means).std()) / level * sqrt(len(seeds) / (len(seeds) - 1))
    value = float(by_seed.mean())
    low, high, p_value = _student(value, error, len(seeds), confidence)
    per_seed = dict(zip(seeds, map(float, by_seed), strict=True))
    return ErrorDifference(value, low, high, p_value, per_seed, len(episodes))


def _discordant(
    treated: SeedOutcomes, control: SeedOutcomes, seeds: Sequence[int]
) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Tasks, and by (seed, task): episodes that only treated won, that only control won, and all."""
    tasks = sorted({task for task, _ in treated[seeds[0]]})
    if not tasks:
        raise DataError(f"training seed {seeds[0]} has no episode; evaluate it before arms are compared.")
    better, worse, counts = (np.zeros((len(seeds), len(tasks)), np.int64) for _ in range(3))
    for row, seed in enumerate(seeds):
        if treated[seed].keys() != control[seed].keys() or {t for t, _ in treated[seed]} != set(tasks):
            odd = sorted(treated[seed].keys() ^ control[seed].keys())[:3]
            raise DataError(
                f"the arms were not evaluated on the same episodes with training seed {seed} (only one has, "
                f"for instance, {odd}); evaluate both on the same tasks and episode seeds."
            )
        for (task, episode), won in treated[seed].items():
            column = tasks.index(task)
            counts[row, column] += 1
            better[row, column] += won and not control[seed][task, episode]
            worse[row, column] += control[seed][task, episode] and not won
    return tasks, better, worse, counts


def bootstrap_error(
    better: NDArray[np.int64],
    worse: NDArray[np.int64],
    counts: NDArray[np.int64],
    *,
    bootstraps: int = BOOTSTRAPS,
    seed: int = 0,
) -> float:
    """Standard error of the mean difference: seeds are drawn with replacement, then episodes of every task.

    Resampled episodes enter only through how many of them each arm alone won, so one multinomial draw a task
    stands for them all.

    Args:
        better, worse, counts: (seeds, tasks); see `_discordant`.
        bootstraps, seed: number of draws, and their random stream.
    """
    rng = np.random.default_rng(seed)
    shares = np.stack([better, worse, counts - better - worse], -1) / counts[..., None]
    means = []
    for start in range(0, bootstraps, CHUNK):
        drawn = rng.integers(len(counts), size=(min(CHUNK, bootstraps - start), len(counts)))
        again = rng.multinomial(counts[drawn], shares[drawn])
        means.append(((again[..., 0] - again[..., 1]) / counts[drawn]).mean((1, 2)))
    return float(np.concatenate(means).std())


def least_error(value: float, seeds: int, episodes: int) -> float:
    """The least standard error that a mean difference over seeds may have, however well they agree.

    Each seed may be off by half an episode, and the p-value stays at or above 2 * 4^-S: that
    of treated policies which all solve everything beside controls which solve nothing, where each would do
    either with probability 1/2.
    """
    return max(half_episode(seeds, episodes), abs(value) / float(stats.t.isf(by_chance(seeds), seeds - 1)))


def half_episode(seeds: int, episodes: int) -> float:
    """Standard error of a mean over seeds of which each may be off by half an episode."""
    return 0.5 / episodes / sqrt(seeds)


def by_chance(seeds: int) -> float:
    """Probability that all seeds agree on one side by chance; see `least_error`."""
    return 4.0**-seeds


def _student(value: float, error: float, seeds: int, confidence: float) -> tuple[float, float, float]:
    """Interval and two-sided p-value of a mean over `seeds` with this standard error."""
    if error == 0:
        # Every error of every seed differs by the same. The sign-flip test is then all that can be said.
        return value, value, 1.0 if value == 0 else 2.0 ** (1 - seeds)
    reach = float(stats.t.ppf((1 + confidence) / 2, seeds - 1)) * error
    p_value = 2 * float(stats.t.sf(abs(value) / error, seeds - 1))
    return value - reach, value + reach, min(1.0, p_value)


def p_text(p_value: float) -> str:
    """A p-value as a reader expects it: "= 0.042", and never "= 0.000"."""
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction (1979): adjusted p-values by name, in the order given."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def verdict_of(gain: float, p_value: float) -> str:
    """Better, worse or not shown, at a corrected p-value; a `gain` above 0 is better."""
    if p_value >= LEVEL or gain == 0:
        return "not shown"
    return "better" if gain > 0 else "worse"


def spread(arm: SeedOutcomes, confidence: float = 0.95) -> Spread:
    """How an arm's success varies over its training seeds; one seed has no interval (it is [0, 1]).

    Where all seeds agree it is narrow, and says nothing of seeds that may turn out unlike them.
    """
    values = np.array([macro_success(found) for found in arm.values()])
    if not len(values):
        raise DataError("no training seed has been evaluated.")
    mean, low, high, sd = float(values.mean()), 0.0, 1.0, 0.0
    if len(values) > 1:
        sd = float(values.std(ddof=1))
        least = half_episode(len(values), min(map(len, arm.values()))) * sqrt(len(values))
        reach = mean_reach(max(sd, least), len(values), confidence)
        low, high = max(0.0, mean - reach), min(1.0, mean + reach)
    return Spread(mean, low, high, sd, float(values.min()), float(values.max()), len(values))


def mean_reach(sd: float, seeds: int, confidence: float = 0.95) -> float:
    """Half the width of Student's interval of a mean over two or more seeds."""
    return float(stats.t.ppf((1 + confidence) / 2, seeds - 1)) * sd / sqrt(seeds)


def mcnemar(first: Outcomes, second: Outcomes) -> McNemar:
    """Exact two-sided McNemar test of two given policies over identical episodes.

    It speaks of these two checkpoints, not of the methods that made them: those vary with the training seed.

    Raises:
        DataError: the episodes are not the same, or there are none.
    """
    if not first or first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())[:3]
        raise DataError(
            f"McNemar's test needs the same episodes of both policies; only one has, for instance, {odd}."
        )
    only_first = sum(first[key] and not second[key] for key in first)
    only_second = sum(second[key] and not first[key] for key in first)
    discordant = only_first + only_second
    p_value = float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return McNemar(only_first, only_second, len(first), p_value)
