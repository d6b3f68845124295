"""Training: one loop on Accelerate, presets, exact resumption. `loop` is the place to start reading."""

from spatial_forcing.training.checkpoint import Checkpoint
from spatial_forcing.training.config import TrainConfig
from spatial_forcing.training.fields import override
from spatial_forcing.training.loop import Trainer, train
from spatial_forcing.training.metrics import DivergedError, read_metrics
from spatial_forcing.training.optim import OptimConfig, lr_factor
from spatial_forcing.training.parts import Batches, Parts, build_parts
from spatial_forcing.training.presets import METAWORLD_TASKS, PRESETS, preset
from spatial_forcing.training.run import RunResult

__all__ = [
    "METAWORLD_TASKS",
    "PRESETS",
    "Batches",
    "Checkpoint",
    "DivergedError",
    "OptimConfig",
    "Parts",
    "RunResult",
    "TrainConfig",
    "Trainer",
    "build_parts",
    "lr_factor",
    "override",
    "preset",
    "read_metrics",
    "train",
]
