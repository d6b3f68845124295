"""Caches with fewer channels than their teacher."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.forcing import ForcingConfig, SpatialForcing
from spatial_forcing.teachers.cache import CachedTeacher, cache_info
from spatial_forcing.teachers.cache.basis import Moments, fit_basis
from tests.fakes import CAMERAS, FakeStudent, FakeTeacher
from tests.teachers.cache.cache_fakes import FakeSource, build, views_of


def tokens_in(directions, count=500, width=12, seed=0, noise=0.0):
    """Tokens about a large mean that vary in a few directions only."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(directions, width, generator=generator)
    mean = 30 * torch.randn(width, generator=generator)
    mixed = torch.randn(count, directions, generator=generator) @ basis
    return mean + mixed + noise * torch.randn(count, width, generator=generator)


def fitted(tokens, channels, standardise=False):
    moments = Moments()
    for part in tokens.split(64):
        moments.add(part)
    return fit_basis(moments, channels, standardise)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(0, 100), st.booleans())
def test_what_varies_in_few_directions_is_kept_exactly(directions, seed, standardise):
    tokens = tokens_in(directions, seed=seed)
    basis = fitted(tokens, 8, standardise)
    reference = basis.reference(tokens)
    torch.testing.assert_close(basis.expand(basis.project(tokens)), reference, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(basis.vectors.T @ basis.vectors, torch.eye(8), atol=1e-5, rtol=0)
    if standardise:
        torch.testing.assert_close(reference.var(0, correction=0), torch.ones(12), atol=1e-3, rtol=0)
    else:
        assert torch.equal(reference, tokens)


def test_moments_do_not_depend_on_the_parts():
    tokens = tokens_in(12, noise=1.0)
    moments = Moments()
    for part in tokens.split(37):
        moments.add(part)
    mean, covariance = moments.result()
    torch.testing.assert_close(mean, tokens.double().mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(covariance, torch.cov(tokens.double().T, correction=0), atol=1e-3, rtol=1e-4)


def test_the_mean_has_a_direction_of_its_own_and_the_rest_is_principal():
    tokens = tokens_in(12, noise=1.0)
    basis = fitted(tokens, 4)
    along = torch.nn.functional.normalize(tokens.mean(0), dim=0)
    assert float(basis.vectors[:, 0] @ along) == pytest.approx(1, abs=1e-4)
    across = tokens - tokens.mean(0)
    across = across - (across @ along)[:, None] * along
    lost = (across - across @ basis.vectors @ basis.vectors.T).square().sum()
    best = torch.linalg.svdvals(across)[3:].square().sum()
    assert float(lost) == pytest.approx(float(best), rel=1e-3)


def test_delivered_coordinates_have_the_cosines_of_the_projected_features():
    tokens = tokens_in(12, noise=1.0)
    basis = fitted(tokens, 8)
    stored = basis.project(tokens)
    delivered, expanded = (stored + basis.offset) * basis.gain, basis.expand(stored)
    ours = torch.cosine_similarity(delivered[:-1], delivered[1:], dim=-1)
    theirs = torch.cosine_similarity(expanded[:-1], expanded[1:], dim=-1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    # A channel's mean square stays, so a positional embedding weighs as much as before.
    assert float(delivered.square().mean() / expanded.square().mean()) == pytest.approx(1, rel=1e-4)


def test_small_samples_and_wide_bases_are_refused():
    with pytest.raises(DataError, match="8 channels has 5 tokens"):
        fitted(tokens_in(3, count=5), 8)
    with pytest.raises(ConfigError, match="fewer than the teacher's 12"):
        fitted(tokens_in(3), 12)


@pytest.fixture
def source():
    return FakeSource(absent=[(4, "wrist"), (6, "front")])


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("standardise", [False, True])
def test_a_cache_delivers_k_channels(source, tmp_path, dtype, standardise):
    """The fake's features have three directions about a constant: four channels hold them."""
    teacher = FakeTeacher(dim=12)
    options = {"layers": (-1, 0), "channels": 4, "standardise": standardise, "dtype": dtype}
    cached = CachedTeacher(build(teacher, source, tmp_path, **options))
    assert (cached.dim, cached.depth, cached.projected) == (4, 3, True)
    views = views_of(source, [13, 4, 0, 6, 7])
    with torch.autocast("cpu", torch.bfloat16):  # as in a training step; the numbers are not touched by it
        delivered = cached.features(views, (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(delivered, cached.features(views, (0, 2)), strict=True))
    whole = CachedTeacher(tmp_path, all_channels=True)
    assert (whole.dim, whole.projected) == (12, False)
    expanded = whole.features(views, (0, 2))
    present = views.present
    for layer, ours, theirs, fresh in zip(
        (0, 2), delivered, expanded, teacher.features(views, (0, 2)), strict=True
    ):
        assert ours.shape == (5, 2, 5, 5, 4)
        assert ours[~present].abs().max() == theirs[~present].abs().max() == 0
        reference = cached.reference(layer, fresh)[present]
        assert torch.cosine_similarity(theirs[present], reference, dim=-1).min() > 0.99
        norms = ours[present].norm(dim=-1) / cached.bases[layer].gain, theirs[present].norm(dim=-1)
        torch.testing.assert_close(*norms, atol=1e-3, rtol=1e-3)
    info = cache_info(tmp_path)
    assert info.header.basis["frames"] == len(source)
    assert [len(mean) for mean in info.header.basis["mean"].values()] == [12, 12]
    for figures in info.header.fidelity.values():
        assert 0.99 < figures["cosine"] <= 1 + 1e-9
        assert 0.99 < figures["cosine_mean_removed"] <= 1 + 1e-9


def test_too_few_channels_show_in_the_fidelity_and_are_warned_of(source, tmp_path, caplog):
    teacher = FakeTeacher(dim=16)
    teacher.weight = torch.randn(3, 3, 16)
    wide = torch.randn(16, 16)
    plain = teacher.features
    teacher.features = lambda views, layers=(-1,): tuple(
        torch.sin(50 * f @ wide) * views.present[:, :, None, None, None] for f in plain(views, layers)
    )
    header = cache_info(build(teacher, source, tmp_path, channels=4)).header
    assert header.fidelity["2"]["cosine_mean_removed"] < 0.95
    assert "agree with fresh ones only to cosine" in caplog.text


def test_a_later_build_keeps_the_basis(source, tmp_path):
    build(FakeTeacher(dim=12), FakeSource((3, 5)), tmp_path, channels=4)
    before = (tmp_path / "basis.safetensors").read_bytes()
    (first,) = CachedTeacher(tmp_path).features(views_of(FakeSource(), [2]))
    build(FakeTeacher(dim=12), FakeSource(), tmp_path, channels=4)
    assert (tmp_path / "basis.safetensors").read_bytes() == before
    cached = CachedTeacher(tmp_path)
    assert len(cached) == 14
    assert torch.equal(cached.features(views_of(FakeSource(), [2]))[0], first)


def test_a_build_killed_before_its_header_fits_anew(source, tmp_path, monkeypatch):
    build(FakeTeacher(dim=12), source, tmp_path / "whole", channels=4)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "basis.safetensors").write_bytes(b"torn")
    build(FakeTeacher(dim=12), source, tmp_path / "cache", channels=4)
    views = views_of(source, [0, 9])
    ours, theirs = (CachedTeacher(tmp_path / name).features(views)[0] for name in ("cache", "whole"))
    assert torch.equal(ours, theirs)


def test_another_basis_and_a_damaged_one_are_refused(source, tmp_path):
    teacher = FakeTeacher(dim=12)
    build(teacher, source, tmp_path, channels=4)
    with pytest.raises(DataError, match="channels: 4 cached, 8 asked for"):
        build(teacher, source, tmp_path, channels=8)
    with pytest.raises(DataError, match="standardised: False cached, True asked for"):
        build(teacher, source, tmp_path, channels=4, standardise=True)
    path = tmp_path / "basis.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    for refuse in (lambda: CachedTeacher(tmp_path), lambda: build(teacher, source, tmp_path, channels=4)):
        with pytest.raises(DataError, match=r"basis.safetensors is not the basis that the header names"):
            refuse()
    path.unlink()
    with pytest.raises(DataError, match=r"basis\.safetensors .*No such file"):
        CachedTeacher(tmp_path)


@pytest.mark.parametrize("channels", [0, 6, 12, 16])
def test_impossible_channels_are_refused(source, tmp_path, channels):
    with pytest.raises(ConfigError, match=rf"channels is {channels}; .* below the 12 channels of 'fake'"):
        build(FakeTeacher(dim=12), source, tmp_path / "cache", channels=channels)
    with pytest.raises(ConfigError, match="standardise belongs to a cache with fewer channels"):
        build(FakeTeacher(dim=12), source, tmp_path / "cache", standardise=True)
    with pytest.raises(ConfigError, match="int4 stores leading directions more exactly than others; set"):
        build(FakeTeacher(dim=12), source, tmp_path / "cache", dtype="int4")
    assert not (tmp_path / "cache").exists()


def test_training_aligns_with_k_channels_and_does_not_standardise_them_again(source, tmp_path):
    cached = CachedTeacher(build(FakeTeacher(dim=12), source, tmp_path, channels=4))
    forcing = SpatialForcing(FakeStudent(), cached)
    assert forcing.projector.fc2.out_features == 4
    rng = np.random.default_rng(0)
    images = {c: torch.from_numpy(source.images([0, 3], c)).movedim(-1, 1) for c in CAMERAS}
    batch = {f"observation.images.{c}": pixels for c, pixels in images.items()}
    batch |= {"observation.state": torch.from_numpy(rng.normal(size=(2, 4))).float()}
    batch |= {"action": torch.zeros(2, 2, 3), "index": torch.tensor([0, 3])}
    loss, metrics = forcing(batch)
    loss.backward()
    assert math.isfinite(float(metrics["align_loss"]))
    assert forcing.projector.fc1.weight.grad.abs().sum() > 0
    with pytest.raises(ConfigError, match="standardise would rescale the cached coordinates of 'fake'"):
        SpatialForcing(FakeStudent(), cached, ForcingConfig(standardise=True))


def test_headers_of_older_caches_are_read(source, tmp_path):
    """Without the keys that came later."""
    build(FakeTeacher(), source, tmp_path)
    path = tmp_path / "header.json"
    content = json.loads(path.read_text())
    del content["standardised"]
    path.write_text(json.dumps(content))
    for record in tmp_path.glob("shard-*.json"):
        old = json.loads(record.read_text())
        del old["data"]
        record.write_text(json.dumps(old))
    assert len(CachedTeacher(tmp_path)) == len(source)
