"""The cached target follows the student's crop; how well, is measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from spatial_forcing.alignment import transform
from spatial_forcing.data.augment import Augment
from spatial_forcing.errors import DataError
from spatial_forcing.forcing import layout_from_offset
from spatial_forcing.forcing.target import make_targets, token_validity
from spatial_forcing.teachers import load_teacher
from spatial_forcing.teachers.cache import CachedTeacher
from spatial_forcing.teachers.crops import augmented, crop_agreement
from tests.fakes import CAMERAS, FakeTeacher
from tests.teachers.cache.cache_fakes import FakeSource, build, views_of

NONE = Augment(crop_area=(1.0, 1.0))
STRONG = Augment(crop_area=(0.4, 0.6), rotation=15.0)


class SmoothSource(FakeSource):
    """Images whose colour is a gradient of its own for each camera and frame, so that sampling is exact."""

    size = 40

    def _image(self, index, camera):
        y, x = np.meshgrid(np.linspace(0, 1, self.size), np.linspace(0, 1, self.size), indexing="ij")
        shift = (index % 5) / 10
        planes = [x, y, 0.5 * x + shift] if camera == CAMERAS[0] else [1 - x, 0.3 * y + shift, y]
        return np.clip(255 * np.stack(planes, -1), 0, 255).astype(np.uint8)


def test_without_a_crop_both_agree():
    found = crop_agreement(FakeTeacher(), SmoothSource(), NONE, frames=6)
    assert (found.frames, found.tokens) == (6, 6 * 2 * 25)
    for figure in (found.cosine, found.cosine_mean_removed, found.unmoved, found.unmoved_mean_removed):
        assert figure == pytest.approx(1, abs=1e-6)


def test_the_sampling_rule_follows_the_crop_where_the_teacher_is_local():
    """The fake's features are its patches' colours: what is left is the context and the patches' size."""
    found = crop_agreement(FakeTeacher(resolution=40), SmoothSource(), STRONG, frames=14)
    assert found.cosine_mean_removed > 0.97
    assert found.unmoved_mean_removed < found.cosine_mean_removed - 0.1
    assert found.tokens < 14 * 2 * 100  # corners of turned crops lie outside


def test_the_nano_teacher_follows_crops_better_than_standing_still():
    source = FakeSource(lengths=(4,))
    light = crop_agreement(load_teacher("vggt-nano"), source, Augment((0.8, 0.8)), frames=4)
    assert light.unmoved_mean_removed < light.cosine_mean_removed <= light.cosine <= 1


def test_colours_count():
    jittered = Augment(crop_area=(1.0, 1.0), brightness=0.5)
    found = crop_agreement(FakeTeacher(), SmoothSource(), jittered, frames=6)
    assert found.cosine_mean_removed < 0.999
    assert found.cosine == found.unmoved


def test_crops_that_show_nothing_are_refused(monkeypatch):
    drawn = NONE.draw(np.random.default_rng(0), CAMERAS[0], (40, 40))

    def outside(self, rng, camera, size):
        return replace(drawn, affine=torch.tensor([[1.0, 0, 5], [0, 1, 5]]))

    monkeypatch.setattr(Augment, "draw", outside)
    with pytest.raises(DataError, match="no token of these crops"):
        crop_agreement(FakeTeacher(), SmoothSource(), STRONG, frames=2)


def test_view_order_and_validity_survive_in_cached_targets(tmp_path):
    """Every view's target is read through its own map, from its own camera; absent views stay invalid."""
    source = SmoothSource(absent=[(3, "wrist")])
    cached = CachedTeacher(build(FakeTeacher(resolution=40), source, tmp_path))
    views = views_of(source, [0, 3, 7])
    rng = np.random.default_rng(0)
    _, moved = augmented(views, STRONG, rng)
    layout = layout_from_offset(3, 2, (6, 6), start=0)
    valid = token_validity(layout, moved)
    assert not valid[1, 1].any()
    assert valid[:, 0].any()
    (features,) = cached.features(moved)
    (target,) = make_targets([features], moved, layout, valid=valid, pe_scale=0.0)
    assert target[~valid].abs().max() == 0
    line = torch.linspace(-1, 1, 6)
    y, x = torch.meshgrid(line, line, indexing="ij")
    for b, v in [(0, 0), (0, 1), (1, 0), (2, 1)]:
        points = transform(moved.student_to_view[b, v], torch.stack([x, y], -1).flatten(0, 1)).view(6, 6, 2)
        grid = features[b, v].permute(2, 0, 1)[None]
        expected = torch.nn.functional.grid_sample(
            grid, points[None], align_corners=True, padding_mode="border"
        )[0].permute(1, 2, 0)
        torch.testing.assert_close(target[b, v][valid[b, v]], expected[valid[b, v]], atol=1e-5, rtol=1e-5)


def test_the_same_frames_in_another_order_give_the_same_targets(tmp_path):
    source = SmoothSource()
    cached = CachedTeacher(build(FakeTeacher(), source, tmp_path))
    (forward,), (backward,) = (cached.features(views_of(source, order)) for order in ([2, 9], [9, 2]))
    assert torch.equal(forward, backward.flip(0))
