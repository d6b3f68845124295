"""Random camera poses around the workspace, in OpenCV axes (x right, y down, z forward)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Camera:
    """A pinhole camera with square pixels and a centred principal point.

    Attributes:
        pose: (4, 4) world from camera, OpenCV axes, metres.
        fovy: vertical field of view in degrees.
    """

    pose: Array
    fovy: float

    def intrinsics(self, size: int) -> NDArray[np.float32]:
        """(3, 3) matrix for a `size` x `size` image whose pixel (0, 0) is centred at (0.5, 0.5)."""
        focal = 0.5 * size / np.tan(np.deg2rad(self.fovy) / 2)
        return np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]], np.float32)


def rotation_about(axis: Array, angle: float) -> Array:
    """(3, 3) rotation by `angle` radians about `axis` (3,) (Rodrigues' formula)."""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)


def look_at(position: Array, target: Array, roll: float = 0.0) -> Array:
    """(4, 4) pose of a camera at `position` (3,) with `target` (3,) in its centre; `roll` in radians."""
    forward = (target - position) / np.linalg.norm(target - position)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= max(float(np.linalg.norm(right)), 1e-6)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, :3] = pose[:3, :3] @ rotation_about(np.array([0.0, 0.0, 1.0]), roll)
    pose[:3, 3] = position
    return pose


def orbit_camera(rng: np.random.Generator) -> Camera:
    """A camera in front of the workspace or beside it, at 0.6 to 1.3 m, where people mount cameras.

    What one view shows does not tell its field of view, so that is kept within a camera family's range.
    """
    target = rng.uniform([-0.25, 0.45, 0.0], [0.25, 0.85, 0.25])
    # Azimuth 0 looks along +y from the robot's side; the arc behind the robot is left out.
    azimuth = rng.uniform(np.deg2rad(80), np.deg2rad(280))
    elevation = rng.uniform(np.deg2rad(20), np.deg2rad(65))
    direction = np.array(
        [-np.sin(azimuth) * np.cos(elevation), -np.cos(azimuth) * np.cos(elevation), np.sin(elevation)]
    )
    position = target + rng.uniform(0.6, 1.3) * direction
    return Camera(look_at(position, target, rng.normal(0, np.deg2rad(4))), rng.uniform(45, 65))


def corner_camera(rng: np.random.Generator, spread: float = 0.1) -> Camera:
    """A camera near a front corner of the table, on either side, as manipulation benchmarks mount it."""
    side = rng.choice([1.0, 1.0, -1.0])
    position = np.array([0.75 * side, 0.075, 0.7]) + rng.normal(0, spread, 3)
    target = np.array([0.08 * side, 0.63, 0.05]) + rng.normal(0, spread / 2, 3)
    return Camera(look_at(position, target, rng.normal(0, np.deg2rad(2))), 60 + rng.normal(0, 4))


def moved_camera(
    rng: np.random.Generator, camera: Camera, *, metres: float = 0.01, degrees: float = 3.0
) -> Camera:
    """`camera` moved and turned at random (standard deviations on each axis); its fovy changes by about 3."""
    pose = camera.pose.copy()
    pose[:3, 3] += rng.normal(0, metres, 3)
    pose[:3, :3] = pose[:3, :3] @ rotation_about(rng.normal(0, 1, 3), rng.normal(0, np.deg2rad(degrees)))
    return Camera(pose, camera.fovy + rng.normal(0, 3))
