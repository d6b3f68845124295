"""The geometry of MuJoCo's cameras.

Conventions: metres; OpenCV camera axes (x right, y down, z forward); the centre of pixel (row i, column j)
is at (x, y) = (j + 0.5, i + 0.5), so that the principal point of an H x W image is (W / 2, H / 2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.errors import ConfigError
from spatial_forcing.registry import unknown

Camera = str | int | Any
"""A camera's name, its id, or a `mujoco.MjvCamera`."""

_OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0])


def _camera_id(model: Any, camera: str | int) -> int:
    names = [model.camera(i).name for i in range(model.ncam)]
    if isinstance(camera, str):
        if camera not in names:
            raise unknown("camera", camera, names)
        return names.index(camera)
    if not 0 <= camera < model.ncam:
        raise ConfigError(f"camera id {camera} is out of range; the model has {model.ncam} cameras: {names}.")
    return int(camera)


def view_of(model: Any, camera: Camera) -> Any:
    """The `mujoco.MjvCamera` that `camera` means. Raises `ConfigError` for an unknown one."""
    import mujoco

    if isinstance(camera, mujoco.MjvCamera):
        return camera
    view = mujoco.MjvCamera()
    view.type = mujoco.mjtCamera.mjCAMERA_FIXED
    view.fixedcamid = _camera_id(model, camera)
    return view


def intrinsics(model: Any, camera: Camera, height: int, width: int) -> NDArray[np.float64]:
    """(3, 3) pinhole matrix of an image of `height` x `width` pixels, also if it is turned by 180 degrees.

    Raises:
        ConfigError: unknown camera.
    """
    import mujoco

    view = view_of(model, camera)
    fixed = view.type == mujoco.mjtCamera.mjCAMERA_FIXED
    fovy = model.cam_fovy[view.fixedcamid] if fixed else model.vis.global_.fovy
    focal = 0.5 * height / np.tan(np.deg2rad(fovy) / 2)
    return np.array([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])


def extrinsics(data: Any, camera: Camera, *, rotated: bool = False) -> NDArray[np.float64]:
    """(4, 4) world-from-camera, OpenCV axes, metres.

    Args:
        data: a `mujoco.MjData` after `mj_forward`.
        camera: name, id, or a fixed or free `mujoco.MjvCamera`.
        rotated: the image was turned by 180 degrees (`image[::-1, ::-1]`) after rendering.

    Raises:
        ConfigError: unknown camera, or an MjvCamera that tracks a body.
    """
    import mujoco

    view = view_of(data.model, camera)
    pose = np.eye(4)
    if view.type == mujoco.mjtCamera.mjCAMERA_FIXED:
        pose[:3, :3] = data.cam_xmat[view.fixedcamid].reshape(3, 3) @ _OPENGL_TO_OPENCV
        pose[:3, 3] = data.cam_xpos[view.fixedcamid]
    elif view.type == mujoco.mjtCamera.mjCAMERA_FREE:
        azimuth, elevation = np.deg2rad(view.azimuth), np.deg2rad(view.elevation)
        level = np.array([np.cos(azimuth), np.sin(azimuth), 0.0])
        forward = np.cos(elevation) * level + [0.0, 0.0, np.sin(elevation)]
        right = np.array([np.sin(azimuth), -np.cos(azimuth), 0.0])
        pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
        pose[:3, 3] = view.lookat - view.distance * forward
    else:
        raise ConfigError("extrinsics are known for fixed and free cameras only, not for tracking ones.")
    if rotated:
        pose[:3, :2] *= -1
    return pose


def backproject(
    depth: NDArray[np.floating[Any]], K: NDArray[np.float64], world_from_camera: NDArray[np.float64]
) -> NDArray[np.float64]:
    """World point of every pixel's centre: (H, W) metres -> (H, W, 3) metres."""
    height, width = depth.shape
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    rays = np.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], np.ones_like(x)], axis=-1)
    points: NDArray[np.float64] = (rays * depth[..., None]) @ world_from_camera[:3, :3].T + world_from_camera[
        :3, 3
    ]
    return points


def project(
    points: NDArray[np.float64], K: NDArray[np.float64], world_from_camera: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """World points (..., 3) -> pixels (x, y) (..., 2) and depth (...,) in metres, negative when behind."""
    local = (points - world_from_camera[:3, 3]) @ world_from_camera[:3, :3]
    image = local @ K.T
    return image[..., :2] / image[..., 2:], local[..., 2]
