"""Do two cameras' features agree where the cameras see the same point?

A token of one view is carried into another by recorded depth and poses, and compared with what lies there.
A feature that describes the scene, and not the camera, agrees.

Shapes: N frames, V views, h x w tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from spatial_forcing.errors import DataError
from spatial_forcing.teachers.recorded import DepthDataset

NEAREST = 0.02
"""Metres; nearer than that nothing was measured."""
SURFACE = 0.02
"""A point is visible where the other camera's depth is its own within this share, and as many metres."""


class Indexed(Protocol):
    """The part of `features.Frames` that is needed."""

    @property
    def index(self) -> NDArray[np.int64]:
        """Absolute frame indices."""
        ...

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names, in the order of the views."""
        ...


@dataclass(frozen=True)
class Correspondence:
    """Where the tokens of one view are in another.

    Attributes:
        frame, source, target: row of the frame, and numbers of the two views.
        at: (P, 2) the tokens' centres in the source, x first, in [-1, 1] from edge to edge.
        seen: (P, 2) the same points in the target.
    """

    frame: int
    source: int
    target: int
    at: Tensor
    seen: Tensor


@dataclass(frozen=True)
class Agreement:
    """Mean cosines after each view's mean feature is removed, which says which camera it is.

    Attributes:
        same: of two views' features of one point.
        other: of the same features in a random order: what agrees everywhere.
        points: pairs compared.
    """

    same: float
    other: float
    points: int


def correspondences(dataset: DepthDataset, frames: Indexed, side: int = 16) -> list[Correspondence]:
    """Points of a `side` x `side` grid in every view that another camera of the same frame sees, too.

    Empty with one camera, or where depth, intrinsics or extrinsics are not recorded.
    """
    found = []
    centres = (2 * torch.arange(side) + 1) / side - 1
    grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), dim=-1).flatten(0, 1)
    for row, index in enumerate(frames.index.tolist()):
        try:
            cameras = [_Camera.read(dataset, index, name) for name in frames.cameras]
        except DataError:
            return []
        for a, b in permutations(range(len(cameras)), 2):
            world, known = cameras[a].lift(grid)
            seen, visible = cameras[b].project(world)
            keep = known & visible
            if bool(keep.any()):
                found.append(Correspondence(row, a, b, grid[keep], seen[keep]))
    return found


def view_agreement(
    features: Tensor, pairs: Sequence[Correspondence], generator: torch.Generator
) -> Agreement | None:
    """Agreement of features (N, V, h, w, C) over `pairs`; None where there is nothing to compare.

    Rows of zeros say nothing (see `protocols.PartialTeacher`) and are left out.
    """
    if not pairs:
        return None
    known = (features != 0).any(-1, keepdim=True)
    mean = features.sum((0, 2, 3)) / known.sum((0, 2, 3)).clamp(min=1)
    mine, theirs = [], []
    for pair in pairs:
        ends = [
            _read(features[pair.frame, view], points)
            for view, points in ((pair.source, pair.at), (pair.target, pair.seen))
        ]
        both = (ends[0] != 0).any(-1) & (ends[1] != 0).any(-1)
        mine.append(ends[0][both] - mean[pair.source])
        theirs.append(ends[1][both] - mean[pair.target])
    first, second = torch.cat(mine), torch.cat(theirs)
    if len(first) < 2:
        return None
    order = torch.randperm(len(first), generator=generator)
    return Agreement(
        same=float(F.cosine_similarity(first, second, dim=-1).mean()),
        other=float(F.cosine_similarity(first, second[order], dim=-1).mean()),
        points=len(first),
    )


@dataclass(frozen=True)
class _Camera:
    """One camera at one moment: depth (H, W), matrix (3, 3) in pixels, world from camera (4, 4)."""

    depth: Tensor
    matrix: Tensor
    pose: Tensor

    @classmethod
    def read(cls, dataset: DepthDataset, index: int, name: str) -> _Camera:
        return cls(
            torch.from_numpy(dataset.depth(index, name)).float(),
            torch.from_numpy(dataset.intrinsics(name)).float(),
            torch.from_numpy(dataset.extrinsics(index, name)).float(),
        )

    def lift(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Image points (P, 2) in [-1, 1] to world points (P, 3), and where their depth is known."""
        z = self._depth_at(points)
        pixels = (points + 1) / 2 * self._size
        rays = torch.cat([pixels, torch.ones_like(z)[:, None]], dim=-1) @ torch.linalg.inv(self.matrix).T
        world = (rays * z[:, None]) @ self.pose[:3, :3].T + self.pose[:3, 3]
        return world, z >= NEAREST

    def project(self, world: Tensor) -> tuple[Tensor, Tensor]:
        """World points (P, 3) to image points (P, 2) in [-1, 1], and which of them this camera sees."""
        points = (world - self.pose[:3, 3]) @ self.pose[:3, :3]
        z = points[:, 2]
        pixels = points @ self.matrix.T
        image = 2 * pixels[:, :2] / z.clamp(min=1e-6)[:, None] / self._size - 1
        inside = (z >= NEAREST) & (image.abs() < 1).all(-1)
        measured = self._depth_at(image.clamp(-1, 1))
        near = (measured - z).abs() <= SURFACE * (1 + z)
        return image, inside & (measured >= NEAREST) & near

    @property
    def _size(self) -> Tensor:
        return torch.tensor([self.depth.shape[1], self.depth.shape[0]], dtype=torch.float32)

    def _depth_at(self, points: Tensor) -> Tensor:
        # Nearest, not bilinear: a mean over an edge is a depth that is nowhere in the scene.
        column, row = ((points + 1) / 2 * self._size).long().unbind(-1)
        height, width = self.depth.shape
        return self.depth[row.clamp(0, height - 1), column.clamp(0, width - 1)]


def _read(grid: Tensor, points: Tensor) -> Tensor:
    """A token grid (h, w, C) read bilinearly at points (P, 2) in [-1, 1] from edge to edge, (P, C)."""
    planes = grid.permute(2, 0, 1)[None]
    read = F.grid_sample(planes, points[None, None], padding_mode="border", align_corners=False)
    return read[0, :, 0].T
