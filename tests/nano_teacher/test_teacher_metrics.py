import pytest
import torch

from spatial_forcing.errors import DataError
from spatial_forcing.nano_teacher.evaluate import clipped_depth_metrics, pose_metrics


def test_depth_metrics_of_known_errors():
    truth = torch.full((2, 4, 4), 1.0)
    predicted = torch.stack([torch.full((4, 4), 1.1), torch.full((4, 4), 0.7)])
    metrics = clipped_depth_metrics(predicted, truth)
    assert metrics["abs_rel"].tolist() == pytest.approx([0.1, 0.3], abs=1e-6)
    assert metrics["abs_rel_scaled"].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert metrics["delta_1.25"].tolist() == [1.0, 0.0]


def test_depth_is_clipped_at_three_metres_on_both_sides():
    metrics = clipped_depth_metrics(torch.full((1, 2, 2), 50.0), torch.full((1, 2, 2), 113.0))
    assert float(metrics["abs_rel"]) == 0


def test_images_weigh_the_same():
    truth = torch.stack([torch.full((2, 2), 0.1), torch.full((2, 2), 2.0)])
    metrics = clipped_depth_metrics(truth * torch.tensor([1.2, 1.0])[:, None, None], truth)
    assert float(metrics["abs_rel"].mean()) == pytest.approx(0.1, abs=1e-6)


def test_bad_depth_is_refused():
    with pytest.raises(DataError, match="expected"):
        clipped_depth_metrics(torch.ones(1, 2, 2), torch.ones(2, 2, 2))
    with pytest.raises(DataError, match="not finite"):
        clipped_depth_metrics(torch.full((1, 2, 2), float("nan")), torch.ones(1, 2, 2))


def test_pose_metrics_of_known_errors():
    truth = torch.eye(4)[None].repeat(2, 1, 1)
    truth[:, 0, 3] = 1.0
    predicted = truth.clone()
    angle = torch.tensor(0.2)
    predicted[0, :2, :2] = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    predicted[1, :3, 3] = torch.tensor([0.0, 1.0, 0.0])
    metrics = pose_metrics(predicted, truth)
    assert metrics["rotation_deg"].tolist() == pytest.approx([11.459, 0], abs=0.05)
    assert metrics["translation_angle_deg"].tolist() == pytest.approx([0, 90], abs=0.05)
    assert metrics["translation_m"].tolist() == pytest.approx([0, 2**0.5], abs=1e-5)
