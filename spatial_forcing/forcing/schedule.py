"""How the weight of the alignment loss changes over training (beyond the paper, which keeps it constant)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from spatial_forcing.errors import ConfigError

Kind = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class AlphaSchedule:
    """A factor in [0, 1] on alpha, as a function of training progress in [0, 1].

    Attributes:
        kind: `constant` stays at 1 after the warm-up; `linear` and `cosine` fall to `floor`.
        warmup: fraction of training over which the factor rises linearly from 0 to 1.
        end: fraction of training at which a falling schedule reaches `floor`; it stays there.
        floor: the final factor of a falling schedule.
        stop_at: fraction of training at which the alignment ends at once (HASTE); 1: never.

    Raises:
        ConfigError: a fraction outside [0, 1], or `end` not after `warmup`.
    """

    kind: Kind = "constant"
    warmup: float = 0.0
    end: float = 1.0
    floor: float = 0.0
    stop_at: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "linear", "cosine"):
            raise ConfigError(f"alpha schedule is {self.kind!r}; choose constant, linear or cosine.")
        for name in ("warmup", "end", "floor", "stop_at"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"alpha schedule: {name} is {value}; expected a fraction in [0, 1].")
        if self.stop_at <= self.warmup:
            raise ConfigError(
                f"alpha schedule: stop_at ({self.stop_at}) must come after warmup ({self.warmup}); raise it."
            )
        if self.kind != "constant" and self.end <= self.warmup:
            raise ConfigError(
                f"alpha schedule: end ({self.end}) must come after warmup ({self.warmup}); raise end."
            )

    @property
    def needs_progress(self) -> bool:
        """Whether the factor depends on progress at all."""
        return self.kind != "constant" or self.warmup > 0 or self.stop_at < 1

    def factor(self, progress: float) -> float:
        """The factor at `progress`, clamped to [0, 1]."""
        progress = min(max(progress, 0.0), 1.0)
        if self.stop_at < 1 and progress >= self.stop_at:
            return 0.0
        if progress < self.warmup:
            return progress / self.warmup
        if self.kind == "constant":
            return 1.0
        fallen = min((progress - self.warmup) / (self.end - self.warmup), 1.0)
        if self.kind == "cosine":
            fallen = (1 - math.cos(math.pi * fallen)) / 2
        return 1 - (1 - self.floor) * fallen
