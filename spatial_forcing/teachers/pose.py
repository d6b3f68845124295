"""VGGT's pose encoding and camera matrices.

Conventions: extrinsics are camera-from-world, (..., 3, 4), OpenCV axes (x right, y down, z forward);
intrinsics are in pixels with the principal point at the image centre. An encoding is translation (3),
quaternion x y z w (4), vertical and horizontal field of view in radians (2).
"""

from __future__ import annotations

import torch
from torch import Tensor


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """(..., 4) as x y z w, of any non-zero length, to rotation matrices (..., 3, 3)."""
    x, y, z, w = quaternion.unbind(-1)
    s = 2 / quaternion.square().sum(-1)
    rows = [
        1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w),
        s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w),
        s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def matrix_to_quaternion(rotation: Tensor) -> Tensor:
    """(..., 3, 3) to unit quaternions x y z w with w >= 0, (..., 4)."""
    m = rotation.flatten(-2)
    m00, m01, m02, m10, m11, m12, m20, m21, m22 = m.unbind(-1)
    # Row i is 4 q_i (x, y, z, w): all four are the same quaternion, and the one with the largest q_i
    # divides by the largest number.
    rows = [
        torch.stack([1 + m00 - m11 - m22, m10 + m01, m02 + m20, m21 - m12], -1),
        torch.stack([m10 + m01, 1 - m00 + m11 - m22, m12 + m21, m02 - m20], -1),
        torch.stack([m20 + m02, m21 + m12, 1 - m00 - m11 + m22, m10 - m01], -1),
        torch.stack([m21 - m12, m02 - m20, m10 - m01, 1 + m00 + m11 + m22], -1),
    ]
    candidates = torch.stack(rows, dim=-2)
    best = candidates.diagonal(dim1=-2, dim2=-1).argmax(-1)
    quaternion = candidates.gather(-2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(-2)
    quaternion = torch.nn.functional.normalize(quaternion, dim=-1)
    return torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def encode_pose(extrinsics: Tensor, intrinsics: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Camera matrices to pose encodings (..., 9).

    Args:
        extrinsics: (..., 3, 4) or (..., 4, 4), camera from world.
        intrinsics: (..., 3, 3) in pixels of an image of `image_size` = (H, W).
    """
    height, width = image_size
    fov_y = 2 * torch.atan(height / 2 / intrinsics[..., 1, 1])
    fov_x = 2 * torch.atan(width / 2 / intrinsics[..., 0, 0])
    rotation = matrix_to_quaternion(extrinsics[..., :3, :3])
    return torch.cat([extrinsics[..., :3, 3], rotation, torch.stack([fov_y, fov_x], -1)], dim=-1)


def decode_pose(encoding: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pose encodings (..., 9) to extrinsics (..., 3, 4) and intrinsics (..., 3, 3) in pixels of (H, W)."""
    height, width = image_size
    rotation = quaternion_to_matrix(encoding[..., 3:7])
    extrinsics = torch.cat([rotation, encoding[..., :3, None]], dim=-1)
    focal_y = height / 2 / torch.tan(encoding[..., 7] / 2)
    focal_x = width / 2 / torch.tan(encoding[..., 8] / 2)
    zero, one = torch.zeros_like(focal_x), torch.ones_like(focal_x)
    rows = [focal_x, zero, one * (width / 2), zero, focal_y, one * (height / 2), zero, zero, one]
    return extrinsics, torch.stack(rows, dim=-1).unflatten(-1, (3, 3))
