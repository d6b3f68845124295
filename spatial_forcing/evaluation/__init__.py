"""Closed-loop rollouts in parallel, success with intervals, videos."""

from spatial_forcing.evaluation.results import (
    EpisodeError,
    EpisodeResult,
    EvaluationResult,
    read_results,
    success_table,
)
from spatial_forcing.evaluation.rollout import Policy, evaluate
from spatial_forcing.evaluation.statistics import Rate, macro_mean, wilson
from spatial_forcing.evaluation.video import write_video
from spatial_forcing.evaluation.workers import WorkerPool

__all__ = [
    "EpisodeError",
    "EpisodeResult",
    "EvaluationResult",
    "Policy",
    "Rate",
    "WorkerPool",
    "evaluate",
    "macro_mean",
    "read_results",
    "success_table",
    "wilson",
    "write_video",
]
