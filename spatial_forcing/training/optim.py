"""Parameter groups, the optimizer, and a learning-rate schedule whose warm-up and decay compose."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from spatial_forcing.errors import ConfigError

logger = logging.getLogger(__name__)

PROJECTOR = "projector."
"""What the names of the projector's parameters begin with in `SpatialForcing`."""
Decay = Literal["cosine", "linear", "constant", "step"]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule.

    Attributes:
        lr: peak learning rate.
        warmup_steps: the rate rises linearly from `lr / (warmup_steps + 1)` to the decay's value.
        decay: "cosine" and "linear" fall from the end of the warm-up to `final_lr_ratio` at the end,
            "step" multiplies by `milestone_factor` at each milestone (the released recipe), "constant"
            stays. Warm-up multiplies the decay, so neither cancels the other.
        final_lr_ratio: in [0, 1].
        milestones: optimizer steps, increasing; for "step" only.
        milestone_factor: in (0, 1].
        projector_lr: rate of the projector over `lr`; 1: the same.
        weight_decay: on matrices; norms, biases and other vectors are never decayed.
        betas: of AdamW.
        eps: of AdamW.
        clip_norm: largest norm of the gradient of student and projector together; None: not clipped.
    """

    lr: float = 1e-3
    warmup_steps: int = 0
    decay: Decay = "cosine"
    final_lr_ratio: float = 0.0
    milestones: tuple[int, ...] = ()
    milestone_factor: float = 0.1
    projector_lr: float = 1.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        self._check(self.lr > 0 and math.isfinite(self.lr), "lr", "a positive number")
        self._check(self.warmup_steps >= 0, "warmup_steps", "0 or more")
        self._check(self.decay in get_args(Decay), "decay", f"one of {', '.join(get_args(Decay))}")
        self._check(0 <= self.final_lr_ratio <= 1, "final_lr_ratio", "a number in [0, 1]")
        self._check(0 < self.milestone_factor <= 1, "milestone_factor", "a number in (0, 1]")
        self._check(
            self.projector_lr > 0 and math.isfinite(self.projector_lr), "projector_lr", "a positive number"
        )
        self._check(self.weight_decay >= 0, "weight_decay", "0 or more")
        self._check(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", "two in [0, 1)")
        self._check(self.eps > 0, "eps", "a positive number")
        self._check(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "a positive number or none")
        rising = all(a < b for a, b in zip((0, *self.milestones), self.milestones, strict=False))
        self._check(rising, "milestones", "increasing positive steps")
        if (self.decay == "step") != bool(self.milestones):
            raise ConfigError(
                f"optim.decay is {self.decay!r} with milestones {self.milestones}; "
                "'step' needs milestones, and only 'step' uses them."
            )

    def _check(self, good: bool, name: str, wanted: str) -> None:
        if not good:
            raise ConfigError(f"optim.{name} is {getattr(self, name)!r}; expected {wanted}.")


def lr_factor(config: OptimConfig, step: int, steps: int) -> float:
    """The factor of `config.lr` at optimizer step `step` (0-based) of `steps`."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    return warmup * _decay_factor(config, step, steps)


def _decay_factor(config: OptimConfig, step: int, steps: int) -> float:
    if config.decay == "constant":
        return 1.0
    if config.decay == "step":
        return config.milestone_factor ** sum(step >= milestone for milestone in config.milestones)
    # The decay spans what follows the warm-up, so that the peak rate is reached exactly once.
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    done = min(1.0, max(0.0, done))
    shape = 1 - done if config.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * shape


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices with `weight_decay`, vectors and scalars without.

    Raises:
        ConfigError: nothing is trainable.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    if not trainable:
        raise ConfigError("no parameter of the student is trainable; unfreeze some, or add LoRA.")
    groups: Sequence[tuple[list[nn.Parameter], float]] = (
        ([p for p in trainable if p.ndim >= 2], weight_decay),
        ([p for p in trainable if p.ndim < 2], 0.0),
    )
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


def make_optimizer(module: nn.Module, config: OptimConfig) -> AdamW:
    """AdamW over `parameter_groups`. Warns where 16-bit weights are trained, which lose small steps."""
    half = [p for p in module.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if half:
        logger.warning(
            "%s M parameters are trained in %s, which rounds a step away that is below 0.2 %% of a weight "
            "(lr is %g): train in float32 with mixed_precision bf16, or with LoRA.",
            round(sum(p.numel() for p in half) / 1e6, 2),
            half[0].dtype,
            config.lr,
        )
    groups = parameter_groups(module, config.weight_decay)
    if config.projector_lr != 1:
        own = {id(p) for name, p in module.named_parameters() if name.startswith(PROJECTOR)}
        groups = [
            {**group, "params": part, "lr": config.lr * factor}
            for group in groups
            for part, factor in (
                ([p for p in group["params"] if id(p) not in own], 1.0),
                ([p for p in group["params"] if id(p) in own], config.projector_lr),
            )
            if part
        ]
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def make_scheduler(optimizer: Optimizer, config: OptimConfig, steps: int, done: int = 0) -> LambdaLR:
    """The schedule after `done` steps; step it once an optimizer step, whatever the number of processes."""
    return LambdaLR(optimizer, lambda step: lr_factor(config, step, steps), last_epoch=done - 1)
