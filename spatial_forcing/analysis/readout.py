"""Readouts of the depth probe: from frozen tokens to a depth map, linear (closed form) or a small DPT head.

Shapes: N frame, h x w tokens, C channels, R pixels on a side of the depth maps compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from spatial_forcing.teachers.dpt import FusionBlock

Head = Literal["linear", "dpt"]
RIDGES = tuple(10.0**k for k in range(-5, 3))
"""Penalties tried, relative to the features' mean variance."""
DPT_CHANNELS, DPT_STEPS, DPT_BATCH, DPT_LR = 24, 240, 32, 2e-3
CHECKS = 8
"""How often the DPT probe is measured on the tuning episodes; the best of these states is used."""


@dataclass(frozen=True)
class Split:
    """Row numbers of the frames: `fit` and `tune` (both training episodes), `test`, and test episodes."""

    fit: Tensor
    tune: Tensor
    test: Tensor
    test_episode: NDArray[np.int64]

    @property
    def train(self) -> Tensor:
        """Rows of all training episodes."""
        return torch.cat([self.fit, self.tune])


def linear_readout(features: Tensor, residual: Tensor, split: Split) -> Tensor:
    """Every token predicts its own patch of `residual` (N, R, R) linearly; (test frames, R, R)."""
    h, w = features.shape[1:3]
    R = residual.shape[-1]
    q = max(1, round(R / h))  # every token predicts a q x q patch
    target = F.interpolate(residual[:, None], (h * q, w * q), mode="nearest-exact")
    target = F.pixel_unshuffle(target, q).permute(0, 2, 3, 1)
    patches = ridge(features, target, split)
    image = F.pixel_shuffle(patches.permute(0, 3, 1, 2), q)
    if image.shape[-2:] != (R, R):
        image = F.interpolate(image, (R, R), mode="bilinear", align_corners=False)
    return image[:, 0]


def ridge(features: Tensor, target: Tensor, split: Split) -> Tensor:
    """Fit `target` (N, h, w, P) on `features` (N, h, w, C) linearly; predict the test frames.

    Closed form for all penalties by one eigendecomposition; the penalty is chosen on `split.tune`, whose
    episodes then join the final fit.
    """

    def solve(rows: Tensor, penalties: Sequence[float]) -> list[Tensor]:
        x = (features[rows] - mean).flatten(0, 2).double()
        y = target[rows].flatten(0, 2).double()
        values, vectors = torch.linalg.eigh(x.T @ x)
        projected = vectors.T @ (x.T @ y)
        scale = values.clamp(min=0).mean().clamp(min=1e-12)
        return [vectors @ (projected / (values.clamp(min=0) + p * scale)[:, None]) for p in penalties]

    mean = features[split.fit].mean(0)
    tune_x, tune_y = (features[split.tune] - mean).double(), target[split.tune]
    errors = [float((tune_x @ weight - tune_y).square().mean()) for weight in solve(split.fit, RIDGES)]
    best = RIDGES[int(np.argmin(errors))]
    mean = features[split.train].mean(0)
    (weight,) = solve(split.train, [best])
    return ((features[split.test] - mean).double() @ weight).float()


class DPTProbe(nn.Module):
    """A small DPT head (arXiv 2103.13413) on the tokens of one layer, brought to three resolutions.

    (N, h, w, C) -> (N, R, R). Its last convolution starts at zero: untrained it predicts the mean image.
    """

    def __init__(self, channels: int, side: int, width: int = DPT_CHANNELS) -> None:
        super().__init__()
        self.side = side
        self.project = nn.Conv2d(channels, width, 1)
        self.finer = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.coarser = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.low = FusionBlock(width, has_residual=False)
        self.middle, self.high = FusionBlock(width), FusionBlock(width)
        self.out = nn.Conv2d(width, 1, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        assert self.out.bias is not None
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict a map from standardised tokens."""
        x = self.project(tokens.permute(0, 3, 1, 2))
        fine = self.finer(x)
        h, w = fine.shape[-2:]
        y = self.low(self.coarser(x), None, (x.shape[-2], x.shape[-1]))
        y = self.middle(y, x, (h, w))
        y = self.out(self.high(y, fine, (2 * h, 2 * w)))
        return F.interpolate(y, (self.side, self.side), mode="bilinear", align_corners=False)[:, 0]


def dpt_readout(
    features: Tensor,
    residual: Tensor,
    measured: Tensor,
    split: Split,
    *,
    steps: int = DPT_STEPS,
    seed: int = 0,
) -> Tensor:
    """A DPT head trained on `residual` (N, R, R) where `measured`; (test frames, R, R).

    It is fitted on `split.fit` and stopped where it is best on `split.tune`, the untrained state included:
    without anything to find it predicts the mean depth image.
    """
    mean = features[split.train].mean(0)
    scale = (features[split.train] - mean).std().clamp(min=1e-6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = DPTProbe(features.shape[-1], residual.shape[-1])
    optimizer = torch.optim.AdamW(probe.parameters(), lr=DPT_LR, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, DPT_LR, total_steps=steps)
    rng = np.random.default_rng(seed)

    def run(rows: Tensor) -> Tensor:
        return probe((features[rows] - mean) / scale)

    @torch.no_grad()
    def error() -> float:
        parts = [loss(run(rows), rows) * len(rows) for rows in split.tune.split(256)]
        return float(torch.stack(parts).sum()) / len(split.tune)

    def loss(predicted: Tensor, rows: Tensor) -> Tensor:
        keep = measured[rows]
        wrong = (predicted - residual[rows]).abs() * keep
        return wrong.sum() / keep.sum().clamp(min=1)

    best, kept = error(), {k: v.clone() for k, v in probe.state_dict().items()}
    with torch.enable_grad():
        for step in range(1, steps + 1):
            rows = split.fit[torch.from_numpy(rng.integers(len(split.fit), size=DPT_BATCH))]
            optimizer.zero_grad()
            loss(run(rows), rows).backward()
            optimizer.step()
            schedule.step()
            if step % max(1, steps // CHECKS) == 0 and (now := error()) < best:
                best, kept = now, {k: v.clone() for k, v in probe.state_dict().items()}
    probe.load_state_dict(kept)
    with torch.no_grad():
        return torch.cat([run(rows) for rows in split.test.split(256)])
