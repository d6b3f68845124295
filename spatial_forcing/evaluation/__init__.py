"""Closed-loop rollouts in parallel, success with intervals, videos."""

from spatial_forcing.evaluation.results import (
    CurvePoint,
    EpisodeError,
    EpisodeResult,
    EvaluationResult,
    read_results,
    success_curve,
    success_table,
)
from spatial_forcing.evaluation.rollout import Policy, evaluate
from spatial_forcing.evaluation.statistics import Rate, difference, macro_mean, wilson
from spatial_forcing.evaluation.video import write_video
from spatial_forcing.evaluation.workers import WorkerPool

__all__ = [
    "CurvePoint",
    "EpisodeError",
    "EpisodeResult",
    "EvaluationResult",
    "Policy",
    "Rate",
    "WorkerPool",
    "difference",
    "evaluate",
    "macro_mean",
    "read_results",
    "success_curve",
    "success_table",
    "wilson",
    "write_video",
]
