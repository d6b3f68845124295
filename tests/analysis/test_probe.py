import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_forcing.analysis.features import Frames, student_features, teacher_features
from spatial_forcing.analysis.probe import MEAN_IMAGE, TEACHER, depth_metrics, probe_depth
from spatial_forcing.errors import ConfigError, DataError
from tests.analysis.rooms import SIZE, SeeingStudent, write_rooms
from tests.fakes import FakeTeacher


class RoomTeacher(FakeTeacher):
    """A teacher whose grid is finer than the student's."""

    def __init__(self):
        super().__init__(resolution=24)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    return write_rooms(tmp_path_factory.mktemp("rooms") / "data")


@pytest.fixture(scope="module")
def result(rooms):
    return probe_depth(
        {"seeing": SeeingStudent()},
        rooms,
        layers=(0, 2),
        floors={"blind": SeeingStudent(blind=True)},
        teacher=RoomTeacher(),
        panels=2,
        side=12,
    )


def find(result, name, layer=None, camera="all"):
    (row,) = [m for m in result.metrics if (m.name, m.layer, m.camera) == (name, layer, camera)]
    return row


def test_depth_that_is_in_the_tokens_is_found_and_depth_that_is_not_is_not(result):
    floor = find(result, MEAN_IMAGE)
    seeing, blind = find(result, "seeing", 0), find(result, "blind", 0)
    assert seeing.abs_rel < 0.02 < 0.4 * floor.abs_rel
    assert seeing.delta > 0.99 > floor.delta
    assert seeing.rmse < 0.1 * floor.rmse
    assert blind.abs_rel == pytest.approx(floor.abs_rel, rel=0.05)
    assert find(result, TEACHER).abs_rel < 0.5 * floor.abs_rel


def test_every_readout_is_reported_by_camera_and_layer(result):
    rows = {(m.name, m.kind, m.layer) for m in result.metrics}
    assert rows == {
        (MEAN_IMAGE, "floor", None),
        ("blind", "floor", 0),
        ("blind", "floor", 2),
        ("seeing", "student", 0),
        ("seeing", "student", 2),
        (TEACHER, "ceiling", None),
    }
    assert {m.camera for m in result.metrics} == {"front", "wrist", "all"}
    front, wrist = (find(result, "seeing", 2, c) for c in ("front", "wrist"))
    assert find(result, "seeing", 2).abs_rel == pytest.approx((front.abs_rel + wrist.abs_rel) / 2)
    assert front.abs_rel_error > 0
    assert front.abs_rel_changing == pytest.approx(front.abs_rel, rel=1e-5)  # every pixel of a room changes
    assert json.loads(json.dumps(result.to_json()))["metrics"][0]["name"] == MEAN_IMAGE


def test_held_out_episodes_are_disjoint_and_counted(result):
    assert result.test_episodes == 2
    assert (result.train_frames, result.test_frames) == (64, 16)


def test_panels_show_held_out_frames(result, rooms):
    assert len(result.panels) == 4
    for panel in result.panels:
        np.testing.assert_array_equal(panel.image, rooms.image(panel.index, panel.camera))
        assert panel.truth.shape == (12, 12)
        centre = rooms.depth(panel.index, panel.camera)[1::2, 1::2]
        np.testing.assert_allclose(panel.truth, np.minimum(centre, 3.0), atol=1e-3)
        assert set(panel.predictions) == {MEAN_IMAGE, "blind", "seeing", TEACHER}
        assert np.abs(panel.predictions["seeing"] - panel.truth).mean() < 0.05


def test_the_probe_leaves_the_student_as_it_was(rooms):
    student = SeeingStudent().train()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    probe_depth({"student": student}, rooms, layers=(4,), frames=20, side=6)
    assert student.training
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())
    assert not any(m._forward_pre_hooks for m in student.modules())


def test_features_are_the_residual_stream_at_the_visual_tokens(rooms):
    student = SeeingStudent().eval()
    frames = Frames.read(rooms, [0, 11, 30], ("front", "wrist"))
    tokens = student_features(student, frames, (0,), batch_size=2)[0]
    assert tokens.shape == (3, 2, 3, 3, 16)
    image = torch.from_numpy(rooms.image(11, "wrist").copy()).permute(2, 0, 1)[None].float() / 255
    patches = torch.nn.functional.adaptive_avg_pool2d(image, (3, 3))[0].permute(1, 2, 0)
    torch.testing.assert_close(tokens[1, 1], student.embed(patches).detach(), atol=1e-5, rtol=1e-5)
    assert teacher_features(RoomTeacher(), frames, batch_size=2).shape == (3, 2, 6, 6, 8)


def test_padded_views_are_refused(rooms):
    class Padding(SeeingStudent):
        def layout(self, batch):
            layout = super().layout(batch)
            return replace(layout, valid=torch.zeros_like(layout.valid))

    student = Padding()
    frames = Frames.read(rooms, [0], ("front", "wrist"))
    with pytest.raises(DataError, match="pads its views"):
        student_features(student, frames, (0,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"students": {}}, "no student"),
        ({"students": {TEACHER: SeeingStudent()}}, "used twice or reserved"),
        ({"floors": {"seeing": SeeingStudent()}}, "used twice or reserved"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"layers": (0, 9)}, r"layers \[9\] are not 0..4"),
    ],
)
def test_bad_settings_are_refused(rooms, change, message):
    arguments = {"students": {"seeing": SeeingStudent()}, "dataset": rooms, "layers": (0,), "frames": 20}
    with pytest.raises(ConfigError, match=message):
        probe_depth(**(arguments | change))


def test_too_few_episodes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="has 3 episodes"):
        probe_depth({"s": SeeingStudent()}, write_rooms(tmp_path / "few", 3, 2), layers=(0,))


def test_an_unknown_camera_is_refused(rooms):
    with pytest.raises(DataError, match="left"):
        probe_depth({"s": SeeingStudent()}, rooms, layers=(0,), cameras=("left",), frames=20)


def test_depth_metrics_by_hand():
    predicted = torch.tensor([[[1.0, 2.0], [3.0, 9.0]]])
    truth = torch.tensor([[[1.0, 1.0], [2.0, 0.0]]])
    found = depth_metrics(predicted, truth, truth > 0)
    assert float(found["abs_rel"]) == pytest.approx((0 + 1 + 0.5) / 3)
    assert float(found["rmse"]) == pytest.approx(math.sqrt(2 / 3))
    assert float(found["delta"]) == pytest.approx(1 / 3)


@given(st.floats(0.3, 3.0), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_abs_rel_of_a_scaled_truth_is_the_scale(scale, seed):
    truth = torch.rand(2, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) + 0.1
    found = depth_metrics(truth * scale, truth, torch.ones_like(truth, dtype=torch.bool))
    torch.testing.assert_close(found["abs_rel"], torch.full((2,), abs(scale - 1)), atol=1e-5, rtol=1e-4)
