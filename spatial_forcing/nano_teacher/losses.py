"""Losses that teach a VGGT depth, point maps and cameras in metres (cf. arXiv 2503.11651, sec. 3.4).

Shapes: B scenes, V views, h x w pixels of the dense maps (the images' size over `dpt.down_ratio`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_forcing.nano_teacher.scenes import DEPTH_MAX, SceneBatch
from spatial_forcing.teachers.pose import encode_pose

NEAREST = 0.02
"""Metres; nothing nearer than this counts (it is inside the near plane)."""
SMALLEST_ERROR = 0.005
"""Errors below it do not raise the confidence further: the best one is 0.2 over the error, so 40 at most."""


@dataclass(frozen=True)
class Targets:
    """The values that the heads should predict.

    Attributes:
        depth: (B, V, h, w) metres, clipped at `DEPTH_MAX`.
        points: (B, V, h, w, 3) metres in the first view's camera frame (OpenCV axes).
        solid: (B, V, h, w) bool: nearer than the clip, so that the point is known.
        pose: (B, V, 9) pose encodings relative to the first view.
    """

    depth: Tensor
    points: Tensor
    solid: Tensor
    pose: Tensor


def make_targets(batch: SceneBatch, size: tuple[int, int]) -> Targets:
    """Targets on a grid of `size` = (h, w) whose corners lie on the image's corner pixels.

    Depth is picked from the nearest pixel: averages across an object's edge are depths of nothing.
    """
    height, width = batch.depth.shape[-2:]
    rows = torch.linspace(0, height - 1, size[0], device=batch.depth.device).round().long()
    columns = torch.linspace(0, width - 1, size[1], device=batch.depth.device).round().long()
    depth = batch.depth[..., rows[:, None], columns].clamp(NEAREST, DEPTH_MAX)
    camera_from_first = torch.linalg.inv(batch.poses) @ batch.poses[:, :1]
    points = unproject(depth, batch.intrinsics, rows + 0.5, columns + 0.5)
    first_from_camera = torch.linalg.inv(camera_from_first)
    rotation, shift = first_from_camera[..., :3, :3], first_from_camera[..., :3, 3]
    points = torch.einsum("bvij,bvhwj->bvhwi", rotation, points) + shift[:, :, None, None]
    pose = encode_pose(camera_from_first, batch.intrinsics, (height, width))
    return Targets(depth, points, depth < DEPTH_MAX - 1e-3, pose)


def unproject(depth: Tensor, intrinsics: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Depth (..., h, w) at pixel coordinates `rows` (h,), `columns` (w,) to camera points (..., h, w, 3)."""
    focal_x, focal_y = intrinsics[..., 0, 0, None, None], intrinsics[..., 1, 1, None, None]
    x = (columns - intrinsics[..., 0, 2, None, None]) / focal_x
    y = (rows[:, None] - intrinsics[..., 1, 2, None, None]) / focal_y
    return torch.stack([x * depth, y * depth, depth], dim=-1)


def teacher_loss(
    output: dict[str, Tensor],
    targets: Targets,
    *,
    point_weight: float = 0.3,
    camera_weight: float = 1.0,
    relative: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum over the heads in `output` (of `VGGT.forward`) and its parts, detached.

    `relative` is `depth_loss`'s.
    """
    parts: dict[str, Tensor] = {}
    if "depth" in output:
        parts["depth"] = depth_loss(output["depth"][..., 0], output["depth_conf"], targets, relative=relative)
    if "world_points" in output:
        parts["point"] = point_weight * point_loss(
            output["world_points"], output["world_points_conf"], targets
        )
    if "pose_enc_iterations" in output:
        parts["camera"] = camera_weight * camera_loss(output["pose_enc_iterations"], targets.pose)
    return torch.stack(list(parts.values())).sum(), {name: value.detach() for name, value in parts.items()}


def depth_loss(depth: Tensor, confidence: Tensor, targets: Targets, *, relative: bool = False) -> Tensor:
    """L1 and gradient L1 of log depth, plus the confidence's own likelihood.

    L1 of the logarithm is AbsRel to first order only: between a near and a far surface it is content with
    either, while AbsRel punishes the far guess. With `relative` the first term is AbsRel itself. Beyond the
    clip any prediction is right. The confidence (> 1) is trained on the detached error, so that it never
    weakens the depth's own gradient.
    """
    depth = depth.clamp(1e-4, DEPTH_MAX)
    error = depth.log() - targets.depth.log()
    absolute = ((depth - targets.depth) / targets.depth if relative else error).abs()
    return absolute.mean() + 0.5 * _gradient_l1(error) + 0.02 * _confidence_loss(absolute, confidence)


def point_loss(points: Tensor, confidence: Tensor, targets: Targets) -> Tensor:
    """Distance relative to the depth, over pixels whose point is known; zero where there is none."""
    distance = (points - targets.points).abs().sum(-1) / targets.depth
    # A few absurd early predictions (the activation is exponential) must not rule the batch.
    error = torch.where(distance < 1, distance, 1 + torch.log(distance.clamp(min=1))) * targets.solid
    share = targets.solid.float().mean().clamp(min=1e-6)
    return error.mean() / share + 0.02 * _confidence_loss(error, confidence)


def camera_loss(iterations: Tensor, pose: Tensor, gamma: float = 0.6) -> Tensor:
    """L1 of the pose encodings of every iteration (n, B, V, 9), later ones weighing more."""
    weights = gamma ** torch.arange(len(iterations) - 1, -1, -1, device=pose.device)
    # A quaternion and its negative are the same rotation; the targets have w >= 0.
    errors = F.l1_loss(iterations, pose.expand_as(iterations), reduction="none").mean((1, 2, 3))
    return (weights * errors).sum() / weights.sum()


def _gradient_l1(error: Tensor, scales: int = 3) -> Tensor:
    total = error.new_zeros(())
    for scale in range(scales):
        step = error[..., :: 2**scale, :: 2**scale]
        total = total + step.diff(dim=-1).abs().mean() + step.diff(dim=-2).abs().mean()
    return total / scales


def _confidence_loss(error: Tensor, confidence: Tensor) -> Tensor:
    # Beyond the clip the error is exactly 0, which would reward any confidence, up to overflow.
    error = error.detach().clamp(min=SMALLEST_ERROR)
    return (confidence * error - 0.2 * confidence.log()).mean()
