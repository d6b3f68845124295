import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_forcing.alignment import TokenLayout, Views
from spatial_forcing.analysis.depth import depth_metrics
from spatial_forcing.analysis.features import (
    Frames,
    on_frame,
    predicted_depth,
    randomised,
    student_features,
    teacher_features,
)
from spatial_forcing.analysis.layers import suggest_layer
from spatial_forcing.analysis.probe import MEAN_IMAGE, TEACHER, ProbeMetrics, probe_depth
from spatial_forcing.analysis.probe_page import metrics_csv, probe_page
from spatial_forcing.analysis.report import render
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.teachers import load_teacher
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


class Letterboxed(SeeingStudent):
    """Sees the frame between black bars: of a 5 x 3 token grid the middle rows show it."""

    def __init__(self):
        super().__init__()
        self.grid = (5, 3)

    def views(self, batch):
        views = super().views(batch)
        bars = torch.nn.functional.pad(views.images, (0, 0, 8, 8))
        valid = torch.zeros(bars.shape[:2] + bars.shape[3:], dtype=torch.bool)
        valid[:, :, 8:32] = True
        return Views.create(bars, views.cameras, valid=valid)

    def layout(self, batch):
        layout = super().layout(batch)
        valid = torch.zeros_like(layout.valid)
        valid[:, :, 1:4] = True
        return replace(layout, valid=valid)

    def act(self, observations, generator=None):
        images = torch.stack(
            [
                torch.stack([torch.from_numpy(o["images"][c].copy()).permute(2, 0, 1) for c in self.cameras])
                for o in observations
            ]
        )
        barred = torch.nn.functional.pad(images.float() / 255, (0, 0, 8, 8))
        return self.predict(barred, torch.zeros(len(images), 4))


def test_tokens_of_padded_views_are_brought_back_onto_the_frame(rooms):
    """Rows 1 to 3 of the tokens show the frame: a letterboxed student sees what a plain one sees."""
    frames = Frames.read(rooms, [0, 11], ("front", "wrist"))
    student = Letterboxed()
    tokens = student_features(student, frames, (0,))[0]
    assert tokens.shape == (2, 2, 5, 3, 16)
    image = torch.from_numpy(rooms.image(11, "wrist").copy()).permute(2, 0, 1)[None].float() / 255
    seen = torch.nn.functional.adaptive_avg_pool2d(image, (3, 3))[0].permute(1, 2, 0)
    expected = student.embed(seen).detach()
    # Five samples over three rows: the one in the middle falls on the middle row, none on the bars.
    torch.testing.assert_close(tokens[1, 1, 2], expected[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tokens[1, 1, 1], 0.6 * expected[0] + 0.4 * expected[1], atol=1e-4, rtol=1e-4)
    found = probe_depth({"boxed": student}, rooms, layers=(0,), side=12)
    assert find(found, "boxed", 0).abs_rel < 0.6 * find(found, MEAN_IMAGE).abs_rel


def test_views_that_are_absent_or_wholly_invalid_are_refused(rooms):
    class Padding(SeeingStudent):
        def layout(self, batch):
            layout = super().layout(batch)
            return replace(layout, valid=torch.zeros_like(layout.valid))

    frames = Frames.read(rooms, [0], ("front", "wrist"))
    with pytest.raises(DataError, match="no valid token"):
        student_features(Padding(), frames, (0,))


def test_valid_box_and_crops_by_hand():
    """A student that sees the left half of the frame has its tokens stretched from there."""
    tokens = torch.arange(4.0).view(1, 1, 1, 4, 1)
    index = torch.arange(4).view(1, 1, 1, 4)
    layout = TokenLayout(index, torch.ones_like(index, dtype=torch.bool))
    half = torch.tensor([[[[0.5, 0.0, -0.5], [0.0, 1.0, 0.0]]]])
    views = Views.create(torch.zeros(1, 1, 3, 8, 8), student_to_view=half)
    seen = on_frame(tokens, layout, views)[0, 0, 0, :, 0]
    torch.testing.assert_close(seen, torch.tensor([0.5, 2.5, 3.0, 3.0]))
    plain = Views.create(torch.zeros(1, 1, 3, 8, 8))
    assert on_frame(tokens, layout, plain) is tokens


def test_dpt_finds_depth_that_is_there_and_falls_back_to_the_mean_image_where_it_is_not(rooms):
    found = probe_depth(
        {"seeing": SeeingStudent()},
        rooms,
        layers=(0,),
        floors={"blind": SeeingStudent(blind=True)},
        heads=("linear", "dpt"),
        side=12,
        panels=1,
    )
    rows = {(m.name, m.head): m for m in found.metrics if m.camera == "all"}
    floor = rows[MEAN_IMAGE, "linear"].abs_rel
    assert rows["seeing", "dpt"].abs_rel < 0.7 * floor
    assert rows["blind", "dpt"].abs_rel == pytest.approx(floor, rel=0.1)
    assert metrics_csv(found.metrics).count("\n") == 1 + len(found.metrics)


def test_depth_of_a_teacher_can_be_what_is_looked_for(rooms):
    teacher = load_teacher("vggt-nano", heads=True)
    frames = Frames.read(rooms, [0, 9], ("front", "wrist"))
    depth = predicted_depth(teacher, frames, 12, 3.0)
    assert {c: d.shape for c, d in depth.items()} == dict.fromkeys(("front", "wrist"), (2, 12, 12))
    assert all(bool((d > 0).all()) and float(d.max()) <= 3.0 for d in depth.values())

    def brightness(read, side, clip):
        return {
            c: torch.from_numpy(read.images[c][..., 0].copy()).float()[:, ::2, ::2] / 100 + 0.2 for c in depth
        }

    found = probe_depth({"s": SeeingStudent()}, rooms, layers=(0,), side=12, depth_source=brightness)
    assert find(found, "s", 0).abs_rel < 0.5 * find(found, MEAN_IMAGE).abs_rel


def metric(layer, abs_rel, kind="student", name="s", error=0.01, head="linear"):
    return ProbeMetrics(name, kind, layer, "all", abs_rel, error, 0.1, 0.5, None, head)


def test_the_layer_with_the_least_depth_is_suggested_and_ties_follow_the_published_rule():
    ceiling = metric(None, 0.05, "ceiling", TEACHER)
    clear = [metric(k, v) for k, v in enumerate((0.5, 0.20, 0.30, 0.22, 0.60))]
    found = suggest_layer([*clear, ceiling], "s", 4)
    assert (found.layer, found.clear) == (2, True)  # 0 has nothing below it, 4 nothing above it
    assert found.gaps[2] == pytest.approx(0.25)
    assert "against the teacher" in found.reason
    flat = [metric(k, 0.2 + 0.001 * (k == 1)) for k in range(9)]
    found = suggest_layer(flat, "s", 8)
    assert (found.layer, found.clear) == (6, False)
    assert "three quarters" in found.reason
    # Layer 0 holds less still, but has nothing below it.
    assert (
        "every other layer between two blocks is more than one standard error"
        in suggest_layer(clear, "s", 4).reason
    )


def test_a_probe_of_other_layers_or_heads_is_kept_without_a_suggestion_that_it_cannot_make():
    assert suggest_layer([metric(0, 0.2)], "s", 4) is None
    only = suggest_layer([metric(0, 0.2), metric(2, 0.3)], "s", 4)
    assert only.layer == 2
    assert "only probed layer" in only.reason
    assert "after 4 of 4 blocks" in suggest_layer([metric(4, 0.3)], "s", 4).reason  # nothing lies above it
    dense = [metric(k, 0.2 + 0.1 * (k == 1), head="dpt") for k in range(4)]
    assert suggest_layer(dense, "s", 4).layer == 1
    both = [*dense, *(metric(k, 0.2 + 0.1 * (k == 2)) for k in range(4))]
    assert suggest_layer(both, "s", 4).layer == 2  # the linear readout decides


def test_a_randomised_student_keeps_its_scale_and_loses_what_it_knows():
    student = SeeingStudent()
    other = randomised(student)
    for (name, a), (_, b) in zip(student.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a.flatten().sort()[0], b.flatten().sort()[0])
        assert torch.equal(a, b) == (a.ndim < 2), name


def test_the_page_shows_curves_the_suggestion_and_panels(result):
    page = render(probe_page(result, {"seeing": suggest_layer(result.metrics, "seeing", 4)}, "rooms"))
    assert "seeing: align layer 2" in page
    assert page.count('class="chart"') == 3  # AbsRel, RMSE and delta, each once
    assert "(floor)" in page
    assert "(ceiling)" in page


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
