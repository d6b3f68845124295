"""Geometry of the target: identity, crops, composition, continuity, padding, standardisation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_forcing.alignment import Views, compose, transform
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.forcing import TokenLayout, layout_from_offset
from spatial_forcing.forcing.extras.cell_mean import CellMean
from spatial_forcing.forcing.extras.standardise import Standardiser
from spatial_forcing.forcing.target import (
    make_targets,
    sincos_table,
    token_points,
    token_validity,
)

few = settings(max_examples=25, deadline=None)
numbers = st.floats(-1, 1)


def affine(scale_x, scale_y, angle, shift_x, shift_y):
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[scale_x * c, -scale_y * s, shift_x], [scale_x * s, scale_y * c, shift_y]])


# Crops that stay inside the frame: |scale| * sqrt(2) + |shift| <= 1.
inner = st.builds(
    affine, st.floats(0.2, 0.5), st.floats(0.2, 0.5), st.floats(-0.5, 0.5), *[st.floats(-0.25, 0.25)] * 2
)


def views_of(affine_map=None, valid=None, present=None, size=(12, 16), V=1):
    maps = None if affine_map is None else affine_map.expand(1, V, 2, 3)
    return Views.create(torch.rand(1, V, 3, *size), student_to_view=maps, valid=valid, present=present)


def sample(features, views, grid, registration="corner"):
    layout = layout_from_offset(*views.present.shape, grid, start=0)
    valid = torch.ones_like(layout.valid)
    (target,) = make_targets([features], views, layout, valid=valid, registration=registration, pe_scale=0.0)
    return target


def coordinate_features(rows, columns):
    """Features that are their own coordinates, (1, 1, rows, columns, 2); sampling is exact on them."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
    return torch.stack([x, y], -1)[None, None]


@few
@given(st.integers(1, 7), st.integers(1, 7))
def test_identity_on_the_same_grid_returns_the_features(rows, columns):
    features = torch.randn(1, 1, rows, columns, 3)
    torch.testing.assert_close(sample(features, views_of(), (rows, columns)), features)


@few
@given(inner, st.integers(2, 6), st.integers(2, 6))
def test_tokens_are_sampled_where_the_map_takes_them(matrix, rows, columns):
    target = sample(coordinate_features(9, 11), views_of(matrix), (rows, columns))
    points = token_points(torch.tensor([rows, columns]), (rows, columns)).flatten(0, 1)
    expected = transform(matrix, points).view(rows, columns, 2)
    torch.testing.assert_close(target[0, 0], expected, atol=1e-5, rtol=0)


@few
@given(inner, inner)
def test_maps_compose(outer, crop):
    """A crop of a crop samples what the composed map samples."""
    both = sample(coordinate_features(9, 9), views_of(compose(outer, crop)), (4, 4))
    first = sample(coordinate_features(9, 9), views_of(crop), (4, 4))
    torch.testing.assert_close(both.flatten(0, 3), transform(outer, first.flatten(0, 3)), atol=1e-5, rtol=0)


@few
@given(st.builds(affine, *[st.floats(-2, 2)] * 5), st.lists(numbers, min_size=6, max_size=6))
def test_continuous_in_the_crop(matrix, direction):
    """Inside, at and beyond the border, the target moves no faster than the features' steepest cell."""
    features = torch.randn(1, 1, 5, 7, 3, generator=torch.Generator().manual_seed(0))
    step = 1e-3 * torch.tensor(direction).view(2, 3)
    change = (
        sample(features, views_of(matrix + step), (4, 5)) - sample(features, views_of(matrix), (4, 5))
    ).abs()
    slope = features.diff(dim=2).abs().max() * 2 + features.diff(dim=3).abs().max() * 3
    assert float(change.max()) <= float(slope) * float(step.abs().sum()) + 1e-5


def test_one_token_sits_in_the_middle():
    assert token_points(torch.tensor([1, 3]), (1, 3)).tolist() == [[[-1, 0], [0, 0], [1, 0]]]


def test_pixel_registration_samples_at_centres():
    points = token_points(torch.tensor([2, 4]), (2, 4), "pixel")
    assert points[0, :, 0].tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert points[:, 0, 1].tolist() == [-0.5, 0.5]
    target = sample(coordinate_features(5, 5), views_of(), (2, 4), "pixel")
    torch.testing.assert_close(target[0, 0], points)


def test_padded_grids_sample_like_their_own_size():
    """A 2 x 3 and a 4 x 4 grid in one layout: each gets the targets it would get alone."""
    features = torch.randn(1, 2, 6, 6, 8)
    views = views_of(affine(0.5, 0.6, 0.1, 0.1, 0.0), V=2)
    index = torch.full((1, 2, 4, 4), -1)
    index[0, 0, :2, :3] = torch.arange(6).view(2, 3)
    index[0, 1] = 6 + torch.arange(16).view(4, 4)
    layout = TokenLayout(index, index >= 0)
    valid = token_validity(layout, views)
    assert torch.equal(valid, index >= 0)
    (target,) = make_targets([features], views, layout, valid=valid, pe_scale=0.1)
    alone = views_of(views.student_to_view[:, :1])
    small = layout_from_offset(1, 1, (2, 3), start=0)
    (expected,) = make_targets([features[:, :1]], alone, small, valid=small.valid, pe_scale=0.1)
    torch.testing.assert_close(target[:, :1, :2, :3], expected)
    assert target[0, 0, 2:].abs().max() == 0


def test_geometry_is_exact_under_autocast():
    features, matrix = torch.randn(1, 1, 9, 9, 4), affine(0.4, 0.4, 0.1, 0.123, -0.2)
    expected = sample(features, views_of(matrix), (7, 7))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sample(features, views_of(matrix), (7, 7)), expected)


class TestValidity:
    def layout(self, grid=(3, 3), V=1):
        return layout_from_offset(1, V, grid, start=0)

    @few
    @given(inner)
    def test_inside_is_valid(self, matrix):
        assert bool(token_validity(self.layout(), views_of(matrix)).all())

    def test_half_a_cell_outside_is_the_limit(self):
        # 3 tokens: a cell is 1 wide, so the last column may be shifted by up to 0.5.
        for shift, expected in [(0.49, True), (0.5, True), (0.51, False)]:
            valid = token_validity(self.layout(), views_of(affine(1, 1, 0, shift, 0)))
            assert valid[..., 2].all() == expected
            assert valid[..., :2].all()

    def test_the_cell_shrinks_with_the_crop(self):
        # Scale 0.5: cells are 0.5 wide; the last column lies at 0.5 + shift, the limit is 1.25.
        for shift, expected in [(0.74, True), (0.76, False)]:
            assert (
                token_validity(self.layout(), views_of(affine(0.5, 0.5, 0, shift, 0)))[..., 2].all()
                == expected
            )

    def test_padding_of_the_frame_follows_the_map(self):
        """Only the left half of a 4 x 8 frame is real; the student sees its right, then its left half."""
        valid = torch.zeros(1, 1, 4, 8, dtype=torch.bool)
        valid[..., :4] = True
        left, right = (affine(3 / 7, 1, 0, sign * 4 / 7, 0) for sign in (-1, 1))
        for matrix, expected in [(left, True), (right, False)]:
            views = views_of(matrix, valid=valid, size=(4, 8))
            assert bool((token_validity(self.layout((2, 4)), views) == expected).all())

    def test_absent_views(self):
        views = views_of(V=2, present=torch.tensor([[True, False]]))
        valid = token_validity(self.layout(V=2), views)
        assert valid[0, 0].all()
        assert not valid[0, 1].any()


class TestPositionalEmbedding:
    def test_width_must_divide_by_four(self):
        with pytest.raises(ConfigError, match="multiple of 4, not 6"):
            sincos_table(2, 2, 6, torch.device("cpu"))

    def test_describes_the_students_framing(self):
        """The embedding does not move with the crop; the features do."""
        features = torch.zeros(1, 1, 5, 5, 8)
        layout = layout_from_offset(1, 1, (3, 3), start=0)
        here, there = (
            make_targets([features], views_of(m), layout, valid=layout.valid)[0]
            for m in (None, affine(0.5, 0.5, 0.3, 0.2, 0))
        )
        assert torch.equal(here, there)
        assert here.abs().max() == pytest.approx(0.1, abs=1e-6)


class TestGarbage:
    @pytest.mark.parametrize("garbage", [math.nan, math.inf])
    def test_absent_rows_of_the_teacher_do_not_leak(self, garbage):
        features = torch.randn(1, 2, 4, 4, 8)
        views = views_of(V=2, present=torch.tensor([[True, False]]))
        layout = layout_from_offset(1, 2, (3, 3), start=0)
        valid = token_validity(layout, views)
        features[0, 1] = garbage
        standardiser = Standardiser(1, 8)
        (target,) = make_targets([features], views, layout, valid=valid, standardiser=standardiser)
        assert bool(target.isfinite().all())
        assert target[0, 1].abs().max() == 0
        assert all(bool(b.isfinite().all()) for b in standardiser.buffers())

    def test_wrong_shape_is_refused(self):
        layout = layout_from_offset(1, 1, (3, 3), start=0)
        with pytest.raises(DataError, match=r"\(1, 16, 8\)"):
            make_targets([torch.zeros(1, 16, 8)], views_of(), layout, valid=layout.valid)


class TestCellMean:
    def features(self, frames=6, noise=1.0):
        generator = torch.Generator().manual_seed(0)
        places = 10 * torch.randn(1, 2, 3, 4, 5, generator=generator)
        return places + noise * torch.randn(frames, 2, 3, 4, 5, generator=generator)

    def test_what_every_frame_says_at_a_place_is_taken_away(self):
        features = self.features()
        mean = CellMean(2)
        for half in features.split(3):
            result = mean([half, -half], torch.ones(3, 2, dtype=torch.bool))
        expected = features[3:] - features.mean(0)
        torch.testing.assert_close(result[0], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(result[1], -expected, atol=1e-5, rtol=1e-5)

    def test_absent_views_count_nothing(self):
        features = self.features()
        present = torch.ones(6, 2, dtype=torch.bool)
        present[2:, 1] = False
        features[2:, 1] = math.nan
        mean = CellMean(1)
        (result,) = mean([features], present)
        torch.testing.assert_close(result[:2, 1], features[:2, 1] - features[:2, 1].mean(0))
        torch.testing.assert_close(result[:, 0], features[:, 0] - features[:, 0].mean(0))
        assert mean.count.tolist() == [6, 2]
        assert bool(mean.total.isfinite().all())

    def test_it_comes_before_sampling_so_crops_are_centred_too(self):
        features = self.features()[:, :1]
        mean = CellMean(1)
        mean([features], torch.ones(6, 1, dtype=torch.bool))
        mean.eval()
        layout = layout_from_offset(6, 1, (3, 3), start=0)
        crop = affine(0.5, 0.5, 0.3, 0.2, 0).expand(6, 1, 2, 3)
        views = Views.create(torch.rand(6, 1, 3, 12, 16), student_to_view=crop)
        (there,) = make_targets([features], views, layout, valid=layout.valid, pe_scale=0, cell_mean=mean)
        (plain,) = make_targets([features], views, layout, valid=layout.valid, pe_scale=0)
        torch.testing.assert_close(there, plain - plain.mean(0), atol=1e-5, rtol=1e-5)

    def test_evaluation_changes_nothing(self):
        features, everything = self.features(), torch.ones(6, 2, dtype=torch.bool)
        mean = CellMean(1).eval()
        assert torch.equal(mean([features], everything)[0], features)
        assert mean.count.tolist() == [0, 0]

    def test_another_grid_is_refused(self):
        mean = CellMean(1)
        mean([self.features()], torch.ones(6, 2, dtype=torch.bool))
        with pytest.raises(DataError, match=r"\(2, 3, 4, 5\).*\(2, 3, 3, 5\)"):
            mean([self.features()[:, :, :, :3]], torch.ones(6, 2, dtype=torch.bool))


class TestStandardiser:
    def tokens(self, n=400):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(n, 3, generator=generator) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor(
            [9.0, 0.0, -2]
        )

    def test_moments_of_valid_tokens(self):
        tokens, valid = self.tokens(), torch.arange(400) < 300
        (result,) = Standardiser(1, 3)([tokens], valid)
        torch.testing.assert_close(result[valid].mean(0), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(result[valid].var(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)

    def test_moments_accumulate_over_batches_and_layers(self):
        tokens, everything = self.tokens(), torch.ones(200, dtype=torch.bool)
        parts = Standardiser(2, 3)
        for half in tokens.split(200):
            result = parts([half, -half], everything)
        expected = (tokens[200:] - tokens.mean(0)) / tokens.std(0, correction=0)
        torch.testing.assert_close(result[0], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(result[1], -expected, atol=1e-4, rtol=1e-4)

    def test_evaluation_changes_nothing_and_an_untrained_one_passes_through(self):
        standardiser = Standardiser(1, 3).eval()
        tokens = self.tokens()
        assert torch.equal(standardiser([tokens], torch.ones(400, dtype=torch.bool))[0], tokens)
        assert float(standardiser.count) == 0

    def test_a_constant_channel_becomes_zero(self):
        tokens = torch.full((50, 1), 1000.1)
        (result,) = Standardiser(1, 1)([tokens], torch.ones(50, dtype=torch.bool))
        assert result.abs().max() < 1e-2
