"""Arms compared over training seeds: paired differences, correction for several arms, spread, McNemar's test.

A training seed is one draw of initial weights and batches. The result of an arm on it is the mean over tasks
of its evaluation episodes. Arms that share their seeds and episodes are compared seed by seed.

One method gives every interval of a difference. Its standard error is that of a hierarchical bootstrap which
draws seeds with replacement, then the episodes of every task. For a mean this has a closed form, the limit of
infinitely many draws:

    error^2 = (variance between seeds + mean over seeds of the variance of their own mean) / seeds

A handful of seeds makes the bootstrap's percentiles too narrow (Hesterberg 2015, Am. Stat. 69:371). The
interval is therefore Student's with one degree of freedom less than there are seeds, and the error is scaled
by sqrt(S / (S - 1)). The variance between seeds already holds the noise of their episodes, and the second
term adds it
again: with few episodes the interval is wider than it need be (`planning.power` counts with that).

With one common seed the interval covers the choice of episodes alone, and says so (`PairedDifference.seeds`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from spatial_forcing.errors import DataError
from spatial_forcing.evaluation.results import EpisodeResult
from spatial_forcing.evaluation.statistics import macro_mean, wilson

NOT_SHOWN = "not shown"
"""The verdict on a difference that may be chance; the others are "better" and "worse"."""
LEVEL = 0.05
"""A difference counts as shown where its corrected p-value is below this."""

Outcomes = Mapping[tuple[str, int], float]
"""By (task, episode) of one policy: success (0 or 1), or a positive error of which less is better."""
SeedOutcomes = Mapping[int, Outcomes]
"""Outcomes by training seed."""


@dataclass(frozen=True)
class PairedDifference:
    """Mean over seeds of treated minus control, with a two-sided interval.

    Attributes:
        value, low, high: the estimate and its interval: of success in [-1, 1]; of an error as a part of the
            control's mean error, so that -0.1 is an error lower by a tenth.
        p_value: of "no difference", two-sided, not corrected.
        per_seed: differences by training seed.
        per_task: mean over seeds by task.
        seed_sd: standard deviation of the differences over seeds, less what the episodes alone give.
        episode_sd: standard deviation of one episode's paired difference around its task's, within a seed.
        episodes: in each seed.
        relative: whether the values are parts of the control's mean (errors), not differences of success.
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
    relative: bool = False

    @property
    def seeds(self) -> int:
        """Training seeds that both arms have."""
        return len(self.per_seed)

    def __str__(self) -> str:
        unit = " %" if self.relative else ""
        return f"{100 * self.value:+.1f}{unit} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


@dataclass(frozen=True)
class Spread:
    """Success over training seeds: mean, interval of the mean, standard deviation, extremes."""

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
    """Success by (task, episode seed). Raises `DataError` when an episode appears twice."""
    made: dict[tuple[str, int], bool] = {}
    for episode in episodes:
        key = (episode.task, episode.seed)
        if key in made:
            raise DataError(f"episode {key} appears twice; give the episodes of one policy only.")
        made[key] = episode.success
    return made


def macro_average(measured: Outcomes) -> float:
    """The mean over episodes, then, unweighted, over tasks. Raises `DataError` without an episode."""
    by_task: dict[str, list[float]] = {}
    for (task, _), value in measured.items():
        by_task.setdefault(task, []).append(value)
    if not by_task:
        raise DataError("no episode, so there is no mean; evaluate the policy first.")
    return float(np.mean([np.mean(values) for values in by_task.values()]))


def paired_difference(
    treated: SeedOutcomes, control: SeedOutcomes, *, confidence: float = 0.95
) -> PairedDifference:
    """Success of treated minus control over the training seeds that both have.

    Args:
        treated, control: outcomes over the same episodes in every seed.
        confidence: of the interval.

    Raises:
        DataError: no common seed, or episodes that are not the same in both arms and all seeds.
    """
    return _paired(treated, control, confidence, relative=False)


def paired_error(
    treated: SeedOutcomes, control: SeedOutcomes, *, confidence: float = 0.95
) -> PairedDifference:
    """`paired_difference` of errors, as a part of the control's mean error.

    Raises:
        DataError: as `paired_difference`, or a control without any error.
    """
    return _paired(treated, control, confidence, relative=True)


def _paired(
    treated: SeedOutcomes, control: SeedOutcomes, confidence: float, *, relative: bool
) -> PairedDifference:
    seeds = sorted(treated.keys() & control.keys())
    columns = _differences(treated, control, seeds)
    level = float(np.mean([macro_average(control[s]) for s in seeds])) if relative else 1.0
    if level <= 0:
        raise DataError("the control's error is 0, so that no difference can be a part of it.")
    columns = {task: values / level for task, values in columns.items()}
    by_task = np.stack([values.mean(1) for values in columns.values()], 1)
    by_seed = by_task.mean(1)
    value, episodes = float(by_seed.mean()), sum(values.shape[1] for values in columns.values())
    within = np.stack([values.var(1) for values in columns.values()], 1)
    sizes = np.array([values.shape[1] for values in columns.values()])
    noise = float((within / sizes).sum(1).mean() / len(columns) ** 2)
    if len(seeds) > 1:
        freedom = len(seeds) - 1
        error = sqrt((float(by_seed.var()) + noise) / freedom)
    else:
        freedom = max(1, episodes - len(columns))
        error = sqrt(noise * episodes / freedom)
    if not relative:
        error = max(error, least_error(value, len(seeds), episodes))
    low, high, p_value = _student(value, error, freedom, confidence)
    return PairedDifference(
        value=value,
        low=low if relative else max(-1.0, low),
        high=high if relative else min(1.0, high),
        p_value=p_value,
        per_seed=dict(zip(seeds, map(float, by_seed), strict=True)),
        per_task=dict(zip(columns, map(float, by_task.mean(0)), strict=True)),
        seed_sd=sqrt(max(0.0, float(by_seed.var(ddof=1)) - noise)) if len(seeds) > 1 else 0.0,
        episode_sd=sqrt(float(within.mean())),
        episodes=episodes,
        relative=relative,
    )


def _differences(
    treated: SeedOutcomes, control: SeedOutcomes, seeds: list[int]
) -> dict[str, NDArray[np.float64]]:
    """By task, (seeds, episodes): treated minus control. Raises as `paired_difference`."""
    if not seeds:
        raise DataError(
            f"the arms share no training seed (one has {sorted(treated)}, the other {sorted(control)}); run "
            "both with the same."
        )
    wanted = treated[seeds[0]].keys()
    if not wanted:
        raise DataError(f"training seed {seeds[0]} has no episode; evaluate it before arms are compared.")
    for seed in seeds:
        for arm in (treated, control):
            if odd := sorted(arm[seed].keys() ^ wanted)[:3]:
                raise DataError(
                    f"the arms were not evaluated on the same episodes with training seed {seed} (only one "
                    f"has, for instance, {odd}); evaluate both on the same tasks and episode seeds."
                )
    keys = sorted(wanted)
    return {
        task: np.array(
            [[float(treated[s][k]) - float(control[s][k]) for k in keys if k[0] == task] for s in seeds]
        )
        for task in sorted({task for task, _ in keys})
    }


def least_error(value: float, seeds: int, episodes: int) -> float:
    """The least standard error of a mean difference of success, however well seeds and episodes agree.

    Two bounds. Success is a count, so each seed may be off by half an episode (the continuity correction,
    Yates 1934). And S seeds that all agree are no stronger than S policies of each arm that solve all or
    nothing: p is at least 2 * 4^-S, that of Barnard's exact test (1945, Nature 156:177) for S of S against 0
        of S.
    """
    least = half_episode(seeds, episodes)
    if seeds == 1:
        return least
    return max(least, abs(value) / float(stats.t.isf(by_chance(seeds), seeds - 1)))


def half_episode(seeds: int, episodes: int) -> float:
    """Standard error of a mean over seeds of which each may be off by half an episode."""
    return 0.5 / episodes / sqrt(seeds)


def by_chance(seeds: int) -> float:
    """Half of Barnard's p-value for S of S against 0 of S; see `least_error`."""
    return 4.0**-seeds


def _student(value: float, error: float, freedom: int, confidence: float) -> tuple[float, float, float]:
    """Interval and two-sided p-value of a mean with this standard error."""
    if error == 0:
        # Every error of every seed differs by the same. The sign-flip test is then all that can be said.
        return value, value, 1.0 if value == 0 else 2.0**-freedom
    reach = float(stats.t.ppf((1 + confidence) / 2, freedom)) * error
    p_value = 2 * float(stats.t.sf(abs(value) / error, freedom))
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
        return NOT_SHOWN
    return "better" if gain > 0 else "worse"


def spread(arm: SeedOutcomes, confidence: float = 0.95) -> Spread:
    """How the success of an arm varies over its training seeds.

    The interval is Student's over seeds. That of one seed is over its episodes (`statistics.macro_mean`).
    Where all seeds agree it is narrow, and says nothing of seeds that may turn out unlike them.
    """
    values = np.array([macro_average(measured) for measured in arm.values()])
    if not len(values):
        raise DataError("no training seed has been evaluated.")
    mean, sd = float(values.mean()), 0.0
    if len(values) > 1:
        sd = float(values.std(ddof=1))
        least = half_episode(len(values), min(map(len, arm.values()))) * sqrt(len(values))
        reach = mean_reach(max(sd, least), len(values), confidence)
        low, high = max(0.0, mean - reach), min(1.0, mean + reach)
    else:
        by_task: dict[str, list[float]] = {}
        for (task, _), won in next(iter(arm.values())).items():
            by_task.setdefault(task, []).append(won)
        rate = macro_mean([wilson(int(sum(won)), len(won), confidence) for won in by_task.values()])
        low, high = rate.low, rate.high
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
    only_first = sum(bool(first[key] and not second[key]) for key in first)
    only_second = sum(bool(second[key] and not first[key]) for key in first)
    discordant = only_first + only_second
    p_value = float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return McNemar(only_first, only_second, len(first), p_value)
