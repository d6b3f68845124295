"""Pretraining of the small VGGT that ships with the package: scenes, losses, metrics and the loop."""

from spatial_forcing.nano_teacher.evaluate import evaluate_teacher
from spatial_forcing.nano_teacher.pretrain import pretrain
from spatial_forcing.nano_teacher.recipe import PretrainConfig
from spatial_forcing.nano_teacher.tasks import (
    RESERVED_TASKS,
    TRAIN_TASKS,
    VALIDATION_TASKS,
    check_held_out,
)

__all__ = [
    "RESERVED_TASKS",
    "TRAIN_TASKS",
    "VALIDATION_TASKS",
    "PretrainConfig",
    "check_held_out",
    "evaluate_teacher",
    "pretrain",
]
