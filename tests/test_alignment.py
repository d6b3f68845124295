from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_forcing.alignment import Views, compose, identity_map, invert, transform, views_from_batch
from spatial_forcing.errors import DataError
from tests.fakes import CAMERAS, fake_batch

angles = st.floats(-math.pi, math.pi)
scales = st.floats(0.3, 2.0)
shifts = st.floats(-1.0, 1.0)


@st.composite
def affine_maps(draw):
    angle, sx, sy = draw(angles), draw(scales), draw(scales)
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor(
        [[sx * cos, -sy * sin, draw(shifts)], [sx * sin, sy * cos, draw(shifts)]], dtype=torch.float64
    )


POINTS = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [0.2, 0.7], [1.0, 1.0]], dtype=torch.float64)


@settings(deadline=None, max_examples=50)
@given(affine_maps(), affine_maps())
def test_compose_applies_the_inner_map_first(outer, inner):
    expected = transform(outer, transform(inner, POINTS))
    torch.testing.assert_close(transform(compose(outer, inner), POINTS), expected)


@settings(deadline=None, max_examples=50)
@given(affine_maps())
def test_invert_undoes_a_map(affine):
    torch.testing.assert_close(transform(invert(affine), transform(affine, POINTS)), POINTS)


def test_invert_refuses_a_singular_map():
    with pytest.raises(DataError, match="singular"):
        invert(torch.zeros(2, 3))


def test_create_completes_defaults():
    views = Views.create(torch.rand(2, 3, 3, 8, 6))
    assert views.cameras == ("view0", "view1", "view2")
    assert views.present.all()
    assert views.valid.shape == (2, 3, 8, 6)
    assert torch.equal(views.student_to_view, identity_map(2, 3))


def test_uint8_is_scaled_to_the_unit_range():
    views = Views.create(torch.full((1, 1, 3, 2, 2), 255, dtype=torch.uint8))
    assert torch.equal(views.images, torch.ones(1, 1, 3, 2, 2))


def test_overshoot_within_the_tolerance_is_clamped():
    assert Views.create(torch.full((1, 1, 3, 2, 2), 1.003)).images.max() == 1


@pytest.mark.parametrize("bad", [1.01, -0.01, float("nan"), float("inf")])
def test_pixels_out_of_range_are_refused_with_the_remedy(bad):
    images = torch.rand(1, 1, 3, 4, 4)
    images[0, 0, 1, 2, 3] = bad
    with pytest.raises(DataError, match=r"expected \[0, 1\].*Undo the student's normalisation"):
        _ = Views.create(images).images


def test_pixels_are_made_when_they_are_read_and_checked_then():
    asked = []

    def make():
        asked.append(1)
        return torch.full((1, 2, 3, 4, 4), 128, dtype=torch.uint8)

    views = Views.create(make, ("a", "b"), shape=(1, 2, 4, 4), device="cpu")
    assert views.valid.shape == (1, 2, 4, 4)
    moved = replace(views.to("cpu"), keys=torch.zeros(1, dtype=torch.long))
    assert asked == []
    assert views.images.max() == pytest.approx(128 / 255)
    assert views.images is views.images
    assert torch.equal(moved.images, views.images)
    assert len(asked) == 1
    with pytest.raises(DataError, match=r"images is \(1, 2, 3, 4, 4\)"):
        _ = Views.create(make, shape=(1, 2, 5, 5), device="cpu").images
    with pytest.raises(DataError, match="`shape` and `device`"):
        Views.create(make)


def test_absent_views_may_hold_anything_and_are_blanked():
    images = torch.rand(1, 2, 3, 4, 4)
    images[0, 1] = float("nan")
    views = Views.create(images, present=torch.tensor([[True, False]]))
    assert views.images[0, 1].abs().max() == 0
    assert not views.valid[0, 1].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": ("a", "a")}, "distinct names"),
        ({"cameras": ("a",)}, "distinct names"),
        ({"present": torch.ones(1, 2)}, "Views.present"),
        ({"valid": torch.ones(1, 2, 4, 3, dtype=torch.bool)}, "Views.valid"),
        ({"student_to_view": torch.zeros(1, 2, 3, 3)}, "Views.student_to_view"),
        ({"student_to_view": torch.full((1, 2, 2, 3), torch.nan)}, "not finite"),
        ({"keys": torch.zeros(2, dtype=torch.long)}, "Views.keys"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(DataError, match=message):
        Views.create(torch.rand(1, 2, 3, 4, 4), **change)


def test_wrong_image_shape_names_the_expected_one():
    with pytest.raises(DataError, match=r"\(B, V, 3, H, W\)"):
        Views.create(torch.rand(2, 3, 8, 8))
    with pytest.raises(DataError, match="uint8"):
        Views.create(torch.zeros(1, 1, 3, 8, 8, dtype=torch.int32))


def test_views_from_batch_is_live_by_default():
    batch = fake_batch()
    views = views_from_batch(batch, CAMERAS)
    assert torch.equal(views.images[:, 1], batch["observation.images.wrist"])
    assert torch.equal(views.student_to_view, identity_map(4, 2))
    assert views.keys is not None
    assert torch.equal(views.keys, batch["index"])


def test_views_from_batch_uses_the_stored_frame_and_its_geometry():
    batch = fake_batch()
    frame, crop = torch.rand(4, 3, 24, 24), identity_map(4) * 0.5
    batch |= {
        f"{kind}.{camera}": value
        for camera in CAMERAS
        for kind, value in (("frame", frame), ("geometry", crop))
    }
    views = views_from_batch(batch, CAMERAS)
    assert torch.equal(views.images[:, 0], frame)
    assert torch.equal(views.student_to_view[:, 0], crop)


def test_views_from_batch_marks_padding_views_absent():
    batch = fake_batch()
    batch["observation.images.wrist_is_pad"] = torch.tensor([True, False, False, True])
    views = views_from_batch(batch, CAMERAS)
    assert views.present[:, 1].tolist() == [False, True, True, False]


def test_a_missing_camera_is_named_with_those_there():
    with pytest.raises(DataError, match=r"'left'.*\['front', 'wrist'\]"):
        views_from_batch(fake_batch(), ("front", "left"))


def test_cameras_of_different_sizes_are_refused():
    batch = fake_batch()
    batch["observation.images.wrist"] = torch.rand(4, 3, 12, 12)
    with pytest.raises(DataError, match=r"differ in shape.*wrist.*12"):
        views_from_batch(batch, CAMERAS)


def test_cameras_of_different_types_are_refused():
    """Stacked, bytes up to 255 would pass for floats."""
    batch = fake_batch()
    batch["observation.images.wrist"] = (batch["observation.images.wrist"] * 255).byte()
    with pytest.raises(DataError, match=r"differ in type.*front.*float32.*wrist.*uint8"):
        views_from_batch(batch, CAMERAS)
