"""Correspondences of an analytic scene, and features that agree over views or do not."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spatial_forcing.analysis.agreement import correspondences, view_agreement
from spatial_forcing.errors import DataError

SIZE, WALL = 32, 2.0
K = np.array([[32.0, 0, SIZE / 2], [0, 32.0, SIZE / 2], [0, 0, 1]])
CAMERAS = ("left", "right")
FRAMES = SimpleNamespace(index=np.array([3, 5]), cameras=CAMERAS)


def pose(x):
    found = np.eye(4, dtype=np.float32)
    found[0, 3] = x
    return found


class Wall:
    """Two cameras side by side look at a wall 2 m away; a post may hide a part of it from the left one."""

    def __init__(self, post=False, posed=True):
        self.post, self.posed = post, posed

    def depth(self, index, camera):
        depth = np.full((SIZE, SIZE), WALL, np.float32)
        if self.post and camera == "left":
            depth[:, 16:20] = 0.5
        return depth

    def intrinsics(self, camera):
        return K

    def extrinsics(self, index, camera):
        if not self.posed:
            raise DataError("no extrinsics")
        return pose({"left": 0.0, "right": 0.5}[camera])


def stream():
    return torch.Generator().manual_seed(0)


def test_a_point_of_the_wall_is_found_in_the_other_view():
    found = correspondences(Wall(), FRAMES)
    assert [(p.frame, p.source, p.target) for p in found] == [(0, 0, 1), (0, 1, 0), (1, 0, 1), (1, 1, 0)]
    # Half a metre at 2 m and 32 px of focal length are 8 px, half of the half image.
    for pair in found:
        shift = -0.5 if pair.source == 0 else 0.5
        torch.testing.assert_close(pair.seen, pair.at + torch.tensor([shift, 0.0]), atol=1e-5, rtol=0)
        assert float(pair.seen.abs().max()) < 1


def test_hidden_points_do_not_correspond():
    free, hidden = (correspondences(Wall(post), FRAMES)[1] for post in (False, True))
    # From the right, wall points that the left camera would see at columns 16 to 19 are behind the post.
    assert len(hidden.at) < len(free.at)
    column = (hidden.seen[:, 0] + 1) / 2 * SIZE
    assert not ((column >= 16) & (column < 20)).any()


def world_features(side=8, noise=0.0):
    """(2, 2, side, side, 8): waves of the place on the wall."""
    centres = ((torch.arange(side) + 0.5) / side * SIZE - SIZE / 2) / 32.0 * WALL
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    found = []
    for shift in (0.0, 0.5):
        angles = torch.stack([f * v for f in (2.0, 3.0) for v in (x + shift, y)], -1)
        found.append(torch.cat([angles.sin(), angles.cos()], -1))
    features = torch.stack(found).expand(2, 2, side, side, 8)
    return features + noise * torch.randn(features.shape, generator=stream())


def test_features_of_the_place_agree_and_features_of_the_pixel_do_not():
    pairs = correspondences(Wall(), FRAMES)
    world = view_agreement(world_features(), pairs, stream())
    assert world.same > 0.85
    assert abs(world.other) < 0.2
    assert world.points == sum(len(p.at) for p in pairs)
    pixel = world_features()[:, :1].expand(-1, 2, -1, -1, -1)
    assert view_agreement(pixel, pairs, stream()).same < world.same - 0.3
    noise = torch.randn(2, 2, 8, 8, 8, generator=stream())
    assert abs(view_agreement(noise, pairs, stream()).same) < 0.1


def test_what_says_which_camera_it_is_does_not_count():
    features = world_features()
    pairs = correspondences(Wall(), FRAMES)
    marked = features + 10 * torch.tensor([1.0, -1.0])[None, :, None, None, None]
    torch.testing.assert_close(
        view_agreement(marked, pairs, stream()).same, view_agreement(features, pairs, stream()).same
    )


def test_rows_of_zeros_say_nothing():
    features = world_features()
    features = torch.where(torch.arange(8)[:, None] < 4, 0.0, features)
    found = view_agreement(features, correspondences(Wall(), FRAMES), stream())
    assert 0 < found.points < sum(len(p.at) for p in correspondences(Wall(), FRAMES))
    assert found.same > 0.5
    assert view_agreement(torch.zeros(2, 2, 8, 8, 8), correspondences(Wall(), FRAMES), stream()) is None


@pytest.mark.parametrize("scene", [Wall(posed=False)])
def test_without_poses_or_a_second_camera_there_is_nothing_to_compare(scene):
    assert correspondences(scene, FRAMES) == []
    assert correspondences(Wall(), SimpleNamespace(index=np.array([0]), cameras=("left",))) == []
    assert view_agreement(world_features(), [], stream()) is None
