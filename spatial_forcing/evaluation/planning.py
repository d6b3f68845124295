"""How many seeds and episodes a comparison needs, and how soon arms reach a level of success."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt

import numpy as np
from scipy import stats

from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.evaluation.paired import by_chance, half_episode

MOST_SEEDS = 1000
"""More seeds than this are reported as out of reach."""
DRAWS = 2000
"""Equally likely values of the variance between seeds that a power is averaged over."""
INTERVAL_SEEDS = 5
"""Fewer seeds have no 95 % interval of a median: with four even their range holds it 7 times of 8 only."""


@dataclass(frozen=True)
class Plan:
    """A size of a comparison that has the wanted power: training seeds, and episodes of each."""

    seeds: int
    episodes: int
    power: float


def power(
    effect: float, seeds: int, episodes: int, *, seed_sd: float, episode_sd: float, alpha: float
) -> float:
    """Probability that `paired.paired_difference` finds a true difference of `effect`.

    That test is Student's over seeds, made careful: its bootstrap adds the noise of the episodes to a spread
    between seeds that holds some of it already. With few episodes it therefore needs more seeds than a plain
    paired t-test.

    Args:
        effect: true difference of success rates.
        seeds, episodes: training seeds, and evaluation episodes of each (over all tasks).
        seed_sd: standard deviation of the true paired difference over training seeds.
        episode_sd: standard deviation of one episode's paired difference (treated minus control).
        alpha: two-sided level, after any correction.
    """
    if seeds < 2 or 2 * by_chance(seeds) > alpha:
        return 0.0
    noise = episode_sd**2 / episodes
    variance = max(seed_sd**2 + noise, 1e-12)  # of one seed's observed difference
    # What the variance between the seeds may turn out to be, and the reach of the interval that it gives.
    likely = stats.chi2.ppf((np.arange(DRAWS) + 0.5) / DRAWS, seeds - 1) / (seeds - 1)
    error = np.sqrt(variance * likely / seeds + noise / (seeds - 1)).clip(min=half_episode(seeds, episodes))
    reach = stats.t.ppf(1 - alpha / 2, seeds - 1) * error
    true = sqrt(variance / seeds)
    found = stats.norm.sf((reach - effect) / true) + stats.norm.cdf((-reach - effect) / true)
    return float(found.mean())


def seeds_needed(
    effect: float,
    episodes: int,
    *,
    seed_sd: float,
    episode_sd: float,
    power_wanted: float = 0.8,
    alpha: float = 0.05,
) -> Plan | None:
    """The fewest seeds with which `effect` is found with `power_wanted`; None beyond `MOST_SEEDS`.

    Raises:
        ConfigError: an effect that is 0 or beyond 1, a negative spread, no episode, or a probability outside
            (0, 1).
    """
    _check(effect, episodes, power_wanted, alpha)
    if not (0 <= seed_sd < inf and 0 <= episode_sd < inf):
        raise ConfigError(f"seed_sd is {seed_sd} and episode_sd {episode_sd}; expected 0 or more.")

    def reached(seeds: int) -> float:
        return power(abs(effect), seeds, episodes, seed_sd=seed_sd, episode_sd=episode_sd, alpha=alpha)

    low, high = 1, 2
    while reached(high) < power_wanted:
        low, high = high, 2 * high
        if low >= MOST_SEEDS:
            return None
    while high - low > 1:  # power grows with the seeds
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) >= power_wanted else (middle, high)
    return Plan(high, episodes, reached(high)) if high <= MOST_SEEDS else None


def sample_sizes(
    effect: float,
    *,
    seed_sd: float,
    episode_sd: float,
    episodes: Sequence[int] = (40, 80, 160, 320),
    power_wanted: float = 0.8,
    alpha: float = 0.05,
) -> list[Plan | None]:
    """`seeds_needed` for several numbers of episodes a seed; see there."""
    if not episodes:
        raise ConfigError("episodes is empty; name at least one number of evaluation episodes.")
    return [
        seeds_needed(
            effect, n, seed_sd=seed_sd, episode_sd=episode_sd, power_wanted=power_wanted, alpha=alpha
        )
        for n in episodes
    ]


def independent_episode_sd(rate: float) -> float:
    """`episode_sd` where nothing is known but a success rate: the arms' outcomes count as independent.

    Raises:
        ConfigError: a rate outside [0, 1].
    """
    if not 0 <= rate <= 1:
        raise ConfigError(f"rate is {rate}; expected a success rate in [0, 1], e.g. 0.5 for 50 %.")
    return sqrt(2 * rate * (1 - rate))


def _check(effect: float, episodes: int, power_wanted: float, alpha: float) -> None:
    if not 0 < abs(effect) <= 1 or episodes < 1:
        raise ConfigError(
            f"effect is {effect} and episodes {episodes}; expected a difference of success rates other than "
            "0 (0.05 for five points), and 1 or more episodes."
        )
    if not (0 < alpha < power_wanted < 1):
        raise ConfigError(f"power is {power_wanted} and alpha {alpha}; expected 0 < alpha < power < 1.")


@dataclass(frozen=True)
class StepsToThreshold:
    """Training steps until success first reaches a threshold, over training seeds.

    Seeds that never reach it within the evaluated steps are censored: they count as later than the last step.
    Those that have it at the first evaluated step reached it then or before.

    Attributes:
        threshold: success rate.
        first_step, last_step: evaluated steps between which is observed.
        per_seed: steps by seed, None where censored.
        median: None where half of the seeds or more never reach it.
        low, high: percentile-bootstrap interval of the median over seeds; None: later than `last_step`. Not
            shown with fewer than `INTERVAL_SEEDS`.
    """

    threshold: float
    first_step: int
    last_step: int
    per_seed: Mapping[int, float | None]
    median: float | None
    low: float | None
    high: float | None

    @property
    def reached(self) -> int:
        """Seeds that reach the threshold."""
        return sum(step is not None for step in self.per_seed.values())

    def __str__(self) -> str:
        def text(value: float | None) -> str:
            if value is None:
                return f"> {self.last_step}"
            return f"{'<= ' if value <= self.first_step else ''}{value:.0f}"

        known = len(self.per_seed) >= INTERVAL_SEEDS
        interval = f" [{text(self.low)}, {text(self.high)}]" if known else ""
        return f"{text(self.median)}{interval} ({self.reached} of {len(self.per_seed)} seeds)"


def first_reach(curve: Mapping[int, float], threshold: float) -> float | None:
    """The step at which a curve (success by step) first reaches `threshold`, between checkpoints linearly."""
    threshold -= 1e-9  # a mean of rates is not exact, and a rate that equals it has reached it
    before: tuple[int, float] | None = None
    for step, value in sorted(curve.items()):
        if value >= threshold:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (threshold - before[1]) / (value - before[1])
        before = (step, value)
    return None


def steps_to_threshold(
    curves: Mapping[int, Mapping[int, float]],
    threshold: float,
    *,
    confidence: float = 0.95,
    bootstraps: int = 4000,
    seed: int = 0,
) -> StepsToThreshold:
    """Steps to `threshold` over training seeds; `curves` are success by step, by seed.

    Raises:
        DataError: no seed, or one without an evaluated step.
    """
    if not curves or not all(curves.values()):
        raise DataError("steps to a threshold need at least one evaluated step of every training seed.")
    last = min(max(curve) for curve in curves.values())
    found = {
        s: first_reach({step: v for step, v in curve.items() if step <= last}, threshold)
        for s, curve in curves.items()
    }
    steps = np.array([inf if step is None else step for step in found.values()])
    drawn = np.random.default_rng(seed).choice(steps, (bootstraps, len(steps)))
    medians = _median(drawn)
    low, high = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2], method="nearest")

    def limit(value: float) -> float | None:
        return None if value == inf else float(value)

    first = max(min(curve) for curve in curves.values())
    return StepsToThreshold(
        threshold, first, last, found, limit(float(_median(steps[None])[0])), limit(low), limit(high)
    )


def _median(values: np.ndarray) -> np.ndarray:
    """Medians of rows that may hold infinities; between a number and infinity lies infinity."""
    ordered = np.sort(values, axis=1)
    middle = ordered.shape[1] // 2
    if ordered.shape[1] % 2:
        return ordered[:, middle]
    return (ordered[:, middle - 1] + ordered[:, middle]) / 2
