"""Success rates with intervals.

Success counts of a task are binomial; their interval is Wilson's score interval (Wilson 1927), which stays
inside [0, 1] and is honest at 0 % and 100 %. A mean over tasks combines the tasks' intervals by the method of
variance estimates recovery (Zou and Donner 2008). Differences between arms: see `paired`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean

from scipy.stats import binomtest

from spatial_forcing.errors import DataError


@dataclass(frozen=True)
class Rate:
    """A success rate in [0, 1] with a two-sided interval.

    Attributes:
        value: the point estimate.
        low, high: interval limits.
        successes, trials: the counts behind it (summed over tasks for a mean).
    """

    value: float
    low: float
    high: float
    successes: int
    trials: int

    def __str__(self) -> str:
        return f"{100 * self.value:.0f} % [{100 * self.low:.0f}, {100 * self.high:.0f}]"


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Rate:
    """Wilson's score interval of `successes` out of `trials`.

    Raises:
        DataError: no trials, or a count outside 0..trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise DataError(
            f"{successes} successes in {trials} trials: need 0 <= successes <= trials, trials >= 1."
        )
    rate = successes / trials
    interval = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    # At 0 and at `trials` successes one limit is exact; rounding must not push it past the estimate.
    return Rate(rate, min(float(interval.low), rate), max(float(interval.high), rate), successes, trials)


def macro_mean(rates: Sequence[Rate]) -> Rate:
    """The unweighted mean over tasks, whatever their numbers of trials, with its interval.

    Raises:
        DataError: `rates` is empty.
    """
    if not rates:
        raise DataError("no task has a finished episode: there is no mean success to report.")
    mean, weight = fmean(r.value for r in rates), 1 / len(rates)
    below = weight * sqrt(sum((r.value - r.low) ** 2 for r in rates))
    above = weight * sqrt(sum((r.high - r.value) ** 2 for r in rates))
    successes, trials = sum(r.successes for r in rates), sum(r.trials for r in rates)
    return Rate(mean, max(0.0, mean - below), min(1.0, mean + above), successes, trials)
