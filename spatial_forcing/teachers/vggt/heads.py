"""The iterative camera head (arXiv 2503.11651, sec. 3.3).

Shapes: B batch, S views, D channels of an aggregator output (2C).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatial_forcing.teachers.layers import Block, Mlp
from spatial_forcing.teachers.vggt.config import CameraHeadConfig

POSE_DIM = 9
"""Translation (3), quaternion x y z w (4), vertical and horizontal field of view (2)."""


class CameraHead(nn.Module):
    """Camera tokens of all views to pose encodings, refined over a few passes of one small trunk."""

    def __init__(self, dim: int, config: CameraHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.token_norm = nn.LayerNorm(dim)
        self.trunk = nn.ModuleList(
            Block(dim, config.num_heads, config.mlp_ratio, config.init_values, qk_norm=False)
            for _ in range(config.trunk_depth)
        )
        self.trunk_norm = nn.LayerNorm(dim)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, POSE_DIM))
        self.embed_pose = nn.Linear(POSE_DIM, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.adaln_norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.pose_branch = Mlp(dim, dim // 2, POSE_DIM)
        with torch.no_grad():
            # The fields of view pass a ReLU: start them in the open half, else they may never train.
            self.pose_branch.fc2.bias[7:] = 1.0

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Aggregator output (B, S, P, D) -> one pose encoding (B, S, 9) for each iteration, last one best.

        The estimate is detached between iterations, so each is trained to improve on a given one.
        Fields of view (radians) are never negative.
        """
        camera = self.token_norm(tokens[:, :, 0])
        plain = self.adaln_norm(camera)
        estimate: Tensor | None = None
        encodings = []
        for _ in range(self.config.iterations):
            known = (
                self.empty_pose_tokens.expand(*camera.shape[:2], -1)
                if estimate is None
                else estimate.detach()
            )
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(known)).chunk(3, dim=-1)
            x = camera + gate * (plain * (1 + scale) + shift)
            for block in self.trunk:
                x = block(x)
            delta = self.pose_branch(self.trunk_norm(x))
            estimate = delta if estimate is None else known + delta
            encodings.append(_activate(estimate))
        return encodings


def _activate(encoding: Tensor) -> Tensor:
    """Clamp the fields of view only; the running estimate keeps its sign."""
    return torch.cat([encoding[..., :7], F.relu(encoding[..., 7:])], dim=-1)
