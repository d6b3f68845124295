import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_forcing.nano_teacher.cameras import (
    Camera,
    corner_camera,
    look_at,
    moved_camera,
    orbit_camera,
)

seeds = st.integers(0, 10_000)


def is_rigid(pose):
    rotation = pose[:3, :3]
    return np.allclose(rotation.T @ rotation, np.eye(3), atol=1e-9) and np.isclose(np.linalg.det(rotation), 1)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_random_cameras_are_rigid_and_look_down_at_the_table(seed):
    rng = np.random.default_rng(seed)
    for camera in (orbit_camera(rng), corner_camera(rng)):
        assert is_rigid(camera.pose)
        assert camera.pose[2, 2] < 0  # the optical axis goes down
        assert camera.pose[2, 1] < 0  # the image's y axis too: it is upright
        assert 20 < camera.fovy < 90
        moved = moved_camera(rng, camera)
        assert is_rigid(moved.pose)
        assert np.linalg.norm(moved.pose[:3, 3] - camera.pose[:3, 3]) < 0.1


def test_look_at_puts_the_target_on_the_optical_axis():
    position, target = np.array([0.8, -0.1, 0.9]), np.array([0.0, 0.6, 0.1])
    pose = look_at(position, target, roll=0.3)
    local = np.linalg.inv(pose) @ np.append(target, 1)
    assert np.allclose(local[:3], [0, 0, np.linalg.norm(target - position)])


def test_intrinsics_put_the_field_of_view_on_the_border():
    matrix = Camera(np.eye(4), fovy=90).intrinsics(128)
    assert np.allclose(matrix, [[64, 0, 64], [0, 64, 64], [0, 0, 1]])
