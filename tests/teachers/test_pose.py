"""Pose encodings and camera matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_forcing.teachers.pose import matrix_to_quaternion, quaternion_to_matrix
from spatial_forcing.teachers.vggt import decode_pose, encode_pose
from tests.golden import golden

number = st.floats(-1, 1, width=32)


@pytest.mark.golden
def test_decoding_equals_the_original():
    vectors = golden("vggt_heads").tensors
    H, W = vectors["sq.images"].shape[-2:]
    extrinsics, intrinsics = decode_pose(vectors["sq.pose_enc.3"], (H, W))
    torch.testing.assert_close(extrinsics, vectors["sq.extrinsics"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(intrinsics, vectors["sq.intrinsics"], atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    quaternion=st.tuples(number, number, number, number).filter(lambda q: sum(v * v for v in q) > 1e-3),
    translation=st.tuples(number, number, number),
    fov=st.tuples(st.floats(0.2, 2.5), st.floats(0.2, 2.5)),
)
def test_encoding_then_decoding_returns_the_camera(quaternion, translation, fov):
    q = torch.tensor(quaternion, dtype=torch.float64)
    rotation = quaternion_to_matrix(q)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3, dtype=torch.float64), atol=1e-9, rtol=0)
    assert torch.linalg.det(rotation) == pytest.approx(1.0)
    extrinsics = torch.cat([rotation, torch.tensor(translation, dtype=torch.float64)[:, None]], dim=1)
    H, W = 48, 64
    intrinsics = torch.eye(3, dtype=torch.float64)
    intrinsics[1, 1], intrinsics[0, 0] = H / 2 / math.tan(fov[0] / 2), W / 2 / math.tan(fov[1] / 2)
    intrinsics[0, 2], intrinsics[1, 2] = W / 2, H / 2
    encoding = encode_pose(extrinsics, intrinsics, (H, W))
    assert encoding.shape == (9,)
    assert encoding[6] >= 0
    assert encoding[7:].tolist() == pytest.approx(fov)
    again, camera = decode_pose(encoding, (H, W))
    torch.testing.assert_close(again, extrinsics, atol=1e-7, rtol=0)
    torch.testing.assert_close(camera, intrinsics)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_half_turns_have_a_quaternion(axis):
    rotation = -torch.eye(3)
    rotation[axis, axis] = 1
    torch.testing.assert_close(matrix_to_quaternion(rotation).abs(), torch.eye(4)[axis])
    torch.testing.assert_close(quaternion_to_matrix(matrix_to_quaternion(rotation)), rotation)
