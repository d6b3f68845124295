"""Simulated environments, by task name."""

from spatial_forcing.envs.base import (
    DEMONSTRATION_SEEDS,
    EVALUATION_SEEDS,
    LazyImages,
    Suite,
    list_tasks,
    make_env,
)

__all__ = ["DEMONSTRATION_SEEDS", "EVALUATION_SEEDS", "LazyImages", "Suite", "list_tasks", "make_env"]
