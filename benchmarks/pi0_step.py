"""Time and memory of a pi0 training step: the control, and Spatial Forcing with its teacher live or cached.

python -m benchmarks.pi0_step                                              # small, CPU
python -m benchmarks.pi0_step --size base --device cuda --batch-size 16 --teacher facebook/VGGT-1B
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
import tyro

from benchmarks.common import show
from spatial_forcing.alignment import Views
from spatial_forcing.forcing import ForcingConfig, SpatialForcing
from spatial_forcing.protocols import Teacher
from spatial_forcing.students import LoraSettings, LoraStudent, Pi0, Pi0Config
from spatial_forcing.students.pi0 import PI0_BASE, Pi0Size
from spatial_forcing.teachers import load_teacher
from spatial_forcing.training.optim import OptimConfig, make_optimizer

SMALL = Pi0Size(128, 6, 256, 8, 1, 16, 64, 128, 64, 4, 4, 128, 224, 14, 1024)
CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")


class Replayed:
    """A teacher whose features were computed once: what is left of its cost is reading them."""

    def __init__(self, teacher: Teacher, views: Views) -> None:
        self.dim, self.depth, self.features_once = teacher.dim, teacher.depth, teacher.features(views)

    def features(self, views: Views, layers: Sequence[int] = (-1,)) -> tuple[torch.Tensor, ...]:
        """The recorded features, whatever is asked."""
        return self.features_once

    def to(self, device: torch.device | str) -> Replayed:
        """They lie where they were computed."""
        return self


def main(
    size: Literal["small", "base"] = "small",
    teacher: str = "vggt-nano",
    device: str = "cpu",
    batch_size: int = 4,
    steps: int = 5,
    repeats: int = 3,
    lora_rank: int = 0,
) -> None:
    """Alternate the three arms on one random batch.

    Args:
        size: `base` is the published architecture (random weights; 14 GB in float32).
        teacher: registered name, folder or hub id.
        device: cpu or cuda; on cuda the forward runs under bfloat16 autocast and peak memory is shown.
        batch_size: samples a step, three views each.
        steps: per measurement.
        repeats: alternations.
        lora_rank: 0 trains all weights.
    """
    shape = PI0_BASE if size == "base" else SMALL
    config = Pi0Config(CAMERAS, chunk=50 if size == "base" else 8, tokenizer="hashed", size=shape)
    guide = load_teacher(teacher, device=device, dtype="bf16" if device == "cuda" else "fp32")
    batch = random_batch(config, batch_size, device)
    seconds: dict[str, list[float]] = {"control": [], "live": [], "cached": []}
    memory = dict.fromkeys(seconds, 0.0)
    for _ in range(repeats):
        for arm, values in seconds.items():
            student: Any = Pi0(config).to(device)
            if lora_rank:
                student = LoraStudent(student, LoraSettings(rank=lora_rank), base="random").to(device)
            used = None if arm == "control" else guide
            if arm == "cached":
                used = Replayed(guide, student.alignment(batch).views)
            forcing = SpatialForcing(student, used, ForcingConfig(alpha=0.0 if used is None else 0.5))
            spent, peak = step_seconds(forcing, batch, steps, device)
            values.append(spent)
            memory[arm] = max(memory[arm], peak)
            del student, forcing
    for arm, values in seconds.items():
        note = f"peak {memory[arm]:.1f} GiB" if device == "cuda" else ""
        show(f"pi0 {size}, {arm}, s/step", values, note)


def step_seconds(
    forcing: SpatialForcing, batch: dict[str, Any], steps: int, device: str
) -> tuple[float, float]:
    """Mean seconds of a whole step after two unmeasured ones, and peak GiB on the device."""
    optimizer = make_optimizer(forcing.train(), OptimConfig(lr=2.5e-5))
    gpu = device == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    for step in range(-2, steps):
        if step == 0:
            if gpu:
                torch.cuda.synchronize()
            started = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=gpu):
            loss, _ = forcing(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if gpu:
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
    return (time.perf_counter() - started) / steps, peak


def random_batch(config: Pi0Config, size: int, device: str) -> dict[str, Any]:
    """Three 480 x 640 views a sample, as ALOHA records them."""
    batch: dict[str, Any] = {
        f"observation.images.{camera}": torch.randint(
            0, 255, (size, 3, 480, 640), dtype=torch.uint8, device=device
        )
        for camera in CAMERAS
    }
    batch["observation.state"] = torch.randn(size, config.state_dim, device=device)
    batch["action"] = torch.randn(size, config.chunk, config.action_dim, device=device)
    batch["task"] = ["lift the pot"] * size
    return batch


if __name__ == "__main__":
    tyro.cli(main)
