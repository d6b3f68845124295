"""Cameras of Depth Anything 3: decoded from camera tokens, or given ones encoded into tokens.

Conventions: extrinsics are camera-from-world, (..., 4, 4) or (..., 3, 4), OpenCV axes; intrinsics in pixels.
An encoding is world-from-camera: translation (3), quaternion x y z w (4), vertical and horizontal fov.

Shapes: B scenes, S views, C channels of a token, D channels of a layer's output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spatial_forcing.teachers.da3.config import DA3Config
from spatial_forcing.teachers.layers import Block, Mlp
from spatial_forcing.teachers.pose import encode_pose, quaternion_to_matrix

POSE_DIM = 9
SMALLEST_TANGENT = 1e-6
"""A field of view of zero, which a ReLU may give, has a very long focal length instead of none."""
SMALLEST_DISTANCE = 0.1


class CameraDecoder(nn.Module):
    """The camera token of each view to its pose and field of view."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU())
        self.fc_t = nn.Linear(dim, 3)
        self.fc_qvec = nn.Linear(dim, 4)
        self.fc_fov = nn.Sequential(nn.Linear(dim, 2), nn.ReLU())

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, S, D) -> encodings (B, S, 9)."""
        x = self.backbone(tokens)
        return torch.cat([self.fc_t(x), self.fc_qvec(x), self.fc_fov(x)], dim=-1)


class CameraEncoder(nn.Module):
    """Given cameras to tokens, which take the place of the learned camera tokens."""

    def __init__(self, config: DA3Config) -> None:
        super().__init__()
        dim = config.embed_dim
        self.token_norm = nn.LayerNorm(dim)
        self.trunk = nn.Sequential(
            *(Block(dim, config.encoder_heads, 4.0, 0.01, qk_norm=False) for _ in range(config.encoder_depth))
        )
        self.trunk_norm = nn.LayerNorm(dim)
        self.pose_branch = Mlp(POSE_DIM, dim // 2, dim)

    def forward(self, extrinsics: Tensor, intrinsics: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Cameras (B, S, 4, 4) and (B, S, 3, 3) of views of (H, W) pixels to tokens (B, S, C)."""
        encoding = encode_pose(invert(extrinsics), intrinsics, image_size)
        return self.trunk_norm(self.trunk(self.token_norm(self.pose_branch(encoding))))


def invert(pose: Tensor) -> Tensor:
    """The inverse of rigid transforms (..., 3 or 4, 4), as (..., 3, 4)."""
    rotation = pose[..., :3, :3].transpose(-1, -2)
    return torch.cat([rotation, -rotation @ pose[..., :3, 3:]], dim=-1)


def decode_cameras(encoding: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Encodings (..., 9) to extrinsics (..., 3, 4) and intrinsics (..., 3, 3) in pixels of (H, W)."""
    height, width = image_size
    world_from_camera = torch.cat([quaternion_to_matrix(encoding[..., 3:7]), encoding[..., :3, None]], dim=-1)
    tangents = (encoding[..., 7:9] / 2).tan().clamp(min=SMALLEST_TANGENT)
    intrinsics = encoding.new_zeros(*encoding.shape[:-1], 3, 3)
    intrinsics[..., 0, 0] = width / 2 / tangents[..., 1]
    intrinsics[..., 1, 1] = height / 2 / tangents[..., 0]
    intrinsics[..., 0, 2], intrinsics[..., 1, 2], intrinsics[..., 2, 2] = width / 2, height / 2, 1.0
    return invert(world_from_camera), intrinsics


def normalise_extrinsics(extrinsics: Tensor) -> Tensor:
    """Extrinsics (B, S, 4, 4) as the model was trained on: relative to view 0, distances near one.

    Translations are divided by the lower median, over the batch, of the cameras' distances from view 0.
    """
    last = extrinsics.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*extrinsics.shape[:2], 1, 4)
    first = torch.cat([invert(extrinsics[:, :1]), last[:, :1]], dim=-2)
    relative = extrinsics @ first
    distance = invert(relative)[..., 3].norm(dim=-1).median().clamp(min=SMALLEST_DISTANCE)
    scaled = relative.clone()
    scaled[..., :3, 3] /= distance
    return scaled
