"""Does a merged policy act like the unmerged one it was made from?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spatial_forcing.errors import CheckpointError
from spatial_forcing.protocols import Observation
from spatial_forcing.students.lora import LoraStudent, merge

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest accepted difference of an action, relative to the largest action, by the weights' type. Rounding
alone: in bfloat16 a weight keeps 8 bits, and the adapters are added before that rounding, not after."""


@dataclass(frozen=True)
class Parity:
    """Largest difference of an action between both forms, and the largest action."""

    difference: float
    scale: float
    dtype: torch.dtype

    @property
    def relative(self) -> float:
        """`difference` over `scale`."""
        return self.difference / max(self.scale, 1e-12)

    @property
    def tolerance(self) -> float:
        """The largest `relative` that passes."""
        return TOLERANCE.get(self.dtype, 1e-4)

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"merged and unmerged actions differ by at most {self.difference:.3g} ({self.relative:.2g} of "
            f"the largest; {kind} weights allow {self.tolerance:g})"
        )


def merge_checked(
    student: LoraStudent, observations: list[Observation] | None = None
) -> tuple[nn.Module, Parity]:
    """Merge in place and compare the actions of both forms on `observations` (default: synthetic ones).

    Raises:
        CheckpointError: the difference exceeds what rounding explains; the merged policy is not handed out.
    """
    seen = example_observations(student.config) if observations is None else observations
    dtype = next(p.dtype for p in student.parameters() if not p.requires_grad)
    before = _actions(student, seen)
    merged = merge(student)
    after = _actions(merged, seen)
    found = Parity(float((after - before).abs().max()), float(before.abs().max()), dtype)
    if not found.relative <= found.tolerance:  # also catches NaN
        raise CheckpointError(f"{found}. Export the adapters alone (--form adapter) and run them unmerged.")
    return merged, found


def example_observations(config: Any, count: int = 4, seed: int = 0) -> list[Observation]:
    """Observations of the right shapes for a student's `config`: smooth random images, small states."""
    rng = np.random.default_rng(seed)
    side = int(config.image_size)
    found: list[Observation] = []
    for _ in range(count):
        coarse = rng.integers(0, 255, (len(config.cameras), 4, 4, 3), dtype=np.uint8)
        fine = coarse.repeat(-(-side // 4), axis=1).repeat(-(-side // 4), axis=2)[:, :side, :side]
        state = rng.uniform(-0.1, 0.1, int(config.state_dim)).astype(np.float32)
        images = dict(zip(config.cameras, fine, strict=True))
        found.append({"images": images, "state": state, "task": "pick up the red cube"})
    return found


def _actions(student: Any, observations: list[Observation]) -> Tensor:
    # Before a gripper is binarised, where the student can say it: rounding may flip it, which is no fault.
    policy: Any = student.policy if isinstance(student, LoraStudent) else student
    if hasattr(policy, "act_normalised"):
        return torch.stack([policy.act_normalised([o])[0].float().cpu() for o in observations])
    generators = [torch.Generator().manual_seed(row) for row in range(len(observations))]
    return torch.stack([student.act([o], [g])[0] for o, g in zip(observations, generators, strict=True)])
