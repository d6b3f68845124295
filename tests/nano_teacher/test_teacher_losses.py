import pytest
import torch

from spatial_forcing.nano_teacher.losses import (
    camera_loss,
    depth_loss,
    make_targets,
    point_loss,
    teacher_loss,
    unproject,
)
from spatial_forcing.nano_teacher.scenes import DEPTH_MAX, SceneBatch


def plane_batch(views=2, size=16):
    """Cameras 1 m above a floor at z = 0, looking straight down, each moved along x."""
    down = torch.diag(torch.tensor([1.0, -1, -1, 1]))
    poses = down.repeat(1, views, 1, 1)
    poses[0, :, 2, 3] = 1.0
    poses[0, :, 0, 3] = 0.1 * torch.arange(views)
    matrix = torch.tensor([[20.0, 0, size / 2], [0, 20.0, size / 2], [0, 0, 1]]).repeat(1, views, 1, 1)
    images = torch.zeros(1, views, 3, size, size, dtype=torch.uint8)
    return SceneBatch(images, torch.ones(1, views, size, size), matrix, poses)


def perfect_output(targets):
    confidence = torch.full_like(targets.depth, 1.5)
    return {
        "depth": targets.depth[..., None].clone(),
        "depth_conf": confidence,
        "world_points": targets.points.clone(),
        "world_points_conf": confidence.clone(),
        "pose_enc_iterations": targets.pose.expand(2, -1, -1, -1).clone(),
    }


def test_points_of_all_views_lie_on_the_plane_in_the_first_frame():
    targets = make_targets(plane_batch(), (16, 16))
    assert torch.allclose(targets.points[..., 2], torch.ones(1, 2, 16, 16), atol=1e-6)
    # the second camera stands 10 cm to the right of the first
    assert torch.allclose(targets.points[:, 1, ..., 0] - targets.points[:, 0, ..., 0], torch.tensor(0.1))
    assert torch.allclose(targets.pose[0, 0, :7], torch.tensor([0.0, 0, 0, 0, 0, 0, 1]), atol=1e-6)
    assert torch.allclose(targets.pose[0, 1, :3], torch.tensor([-0.1, 0, 0]), atol=1e-6)


def test_smaller_targets_pick_pixels_and_do_not_average():
    batch = plane_batch()
    batch.depth[..., 8:] = 2.0
    assert set(make_targets(batch, (8, 8)).depth.unique().tolist()) == {1.0, 2.0}


def test_unproject_inverts_projection():
    batch = plane_batch()
    rows = torch.arange(16) + 0.5
    depth = torch.rand(1, 2, 16, 16) + 0.5
    points = unproject(depth, batch.intrinsics, rows, rows)
    pixels = torch.einsum("bvij,bvhwj->bvhwi", batch.intrinsics, points)
    pixels = pixels[..., :2] / pixels[..., 2:]
    assert torch.allclose(pixels[..., 0], rows.expand(1, 2, 16, 16), atol=1e-4)
    assert torch.allclose(pixels[..., 1], rows[:, None].expand(1, 2, 16, 16), atol=1e-4)


def test_a_perfect_prediction_beats_every_perturbed_one():
    targets = make_targets(plane_batch(), (16, 16))
    best, _ = teacher_loss(perfect_output(targets), targets)
    for name in ("depth", "world_points", "pose_enc_iterations"):
        output = perfect_output(targets)
        output[name] = output[name] + 0.05
        worse, parts = teacher_loss(output, targets)
        assert worse > best + 0.001, name
        assert set(parts) == {"depth", "point", "camera"}


def test_only_the_heads_in_the_output_count():
    targets = make_targets(plane_batch(), (16, 16))
    output = {k: v for k, v in perfect_output(targets).items() if k.startswith("depth")}
    assert set(teacher_loss(output, targets)[1]) == {"depth"}


def test_nothing_is_asked_beyond_the_clip():
    batch = plane_batch()
    batch.depth[:] = DEPTH_MAX
    targets = make_targets(batch, (16, 16))
    far = torch.full((1, 2, 16, 16), 80.0, requires_grad=True)
    confidence = torch.full_like(targets.depth, 1.1)
    depth_loss(far, confidence, targets).backward()
    assert float(far.grad.abs().max()) == 0
    assert not targets.solid.any()
    loss = point_loss(targets.points + 1, confidence, targets)
    assert torch.isfinite(loss)


def test_relative_errors_prefer_the_near_side_of_an_edge_and_logarithmic_ones_the_likelier():
    batch = plane_batch()
    batch.depth[:] = 0.2
    batch.depth[..., ::5] = batch.depth[..., 1::5] = batch.depth[..., 2::5] = 1.5  # ten of sixteen columns
    targets = make_targets(batch, (16, 16))
    confidence = torch.full_like(targets.depth, 1.5)

    def error(guess, relative):
        depth = torch.full_like(targets.depth, guess)
        return float(depth_loss(depth, confidence, targets, relative=relative))

    assert error(1.5, relative=False) < error(0.2, relative=False)
    assert error(0.2, relative=True) < error(1.5, relative=True)


def test_confidence_never_weakens_the_depth_gradient():
    targets = make_targets(plane_batch(), (16, 16))
    gradients = []
    for level in (1.1, 9.0):
        depth = (targets.depth + 0.2).requires_grad_()
        depth_loss(depth, torch.full_like(targets.depth, level), targets).backward()
        gradients.append(depth.grad)
    assert torch.equal(*gradients)


def test_later_camera_iterations_weigh_more():
    pose = torch.zeros(1, 2, 9)
    error = torch.zeros(2, 1, 2, 9)
    error[0] = 1
    early = camera_loss(error, pose)
    late = camera_loss(error.flip(0), pose)
    assert late > early
    assert float(early + late) == pytest.approx(1.0)


def test_a_perfect_prediction_does_not_reward_any_confidence():
    """Beyond the clip the error is exactly 0; the confidence then grew until it overflowed."""
    targets = make_targets(plane_batch(), (16, 16))
    confidence = torch.full_like(targets.depth, 100.0, requires_grad=True)
    depth_loss(targets.depth, confidence, targets).backward()
    assert bool((confidence.grad > 0).all())
