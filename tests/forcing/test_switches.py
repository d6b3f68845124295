"""Switches that the paper does not have (losses, projections, stop, rates), and bugs that others had."""

import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_forcing.errors import ConfigError
from spatial_forcing.forcing import ForcingConfig, SpatialForcing
from spatial_forcing.forcing.extras.losses import distance_loss, gram_distances
from spatial_forcing.forcing.extras.projections import ConvProjector, spatial_norm
from spatial_forcing.forcing.schedule import AlphaSchedule
from spatial_forcing.training.optim import OptimConfig, make_optimizer
from tests.fakes import FakeStudent, FakeTeacher, fake_batch

few = settings(max_examples=20, deadline=None)


def forcing_of(**options):
    torch.manual_seed(0)
    return SpatialForcing(FakeStudent(), FakeTeacher(), ForcingConfig(**options))


def tokens(seed, B=2, N=6, C=5):
    return torch.randn(B, N, C, generator=torch.Generator().manual_seed(seed))


# ---- losses


@pytest.mark.parametrize(("kind", "plain"), [("mse", F.mse_loss), ("smooth_l1", F.smooth_l1_loss)])
def test_distances_are_torchs_mean_over_valid_tokens(kind, plain):
    ours, theirs = tokens(0), tokens(1)
    valid = torch.tensor([[True] * 6, [True, True, False, False, False, False]])
    expected = (plain(ours[0], theirs[0]) + plain(ours[1, :2], theirs[1, :2])) / 2
    torch.testing.assert_close(distance_loss(kind, ours, theirs, valid), expected)
    moved = ours.clone()
    moved[1, 2:] = 100.0
    torch.testing.assert_close(distance_loss(kind, moved, theirs, valid), expected)


def test_gram_compares_relations_within_a_view():
    ours, theirs, valid = tokens(0), tokens(1), torch.ones(2, 6, dtype=torch.bool)
    valid[1, 4] = False
    expected = []
    for b in range(2):
        gaps = []
        for view in range(2):
            cut = slice(3 * view, 3 * view + 3)
            kept = valid[b, cut]
            parts = [t[b, cut][kept] for t in (ours, theirs)]
            cosines = [F.cosine_similarity(t[:, None], t[None], dim=-1) for t in parts]
            gaps.append((cosines[0] - cosines[1]).square().flatten())
        expected.append(torch.cat(gaps).mean())
    torch.testing.assert_close(gram_distances(ours, theirs, valid, 2), torch.stack(expected))


@few
@given(st.integers(0, 1000), st.floats(0.1, 10))
def test_gram_does_not_see_rotations_and_scales_and_mse_does(seed, scale):
    theirs, valid = tokens(seed), torch.ones(2, 6, dtype=torch.bool)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)))[0]
    moved = scale * theirs @ turn
    assert float(distance_loss("gram", moved, theirs, valid, views=2)) < 1e-8
    assert float(distance_loss("mse", moved, theirs, valid)) > 1e-3
    assert float(distance_loss("gram", tokens(seed + 1), theirs, valid, views=2)) > 1e-3


@pytest.mark.parametrize("kind", ["cosine", "smooth_l1", "mse", "gram"])
def test_every_loss_trains_student_and_projector_and_no_sample_is_no_error(kind):
    forcing, batch = forcing_of(loss=kind), fake_batch()
    _, align, metrics = forcing.losses(batch)
    align.backward()
    assert float(align) > 0
    assert -1 <= float(metrics["cosine"]) <= 1
    assert forcing.projector.fc1.weight.grad.abs().sum() > 0
    assert sum(float(p.grad.abs().sum()) for p in forcing.student.parameters() if p.grad is not None) > 0
    empty = torch.zeros(2, 6, dtype=torch.bool)
    ours = tokens(0).requires_grad_()
    loss = distance_loss("mse" if kind == "cosine" else kind, ours, tokens(1), empty, views=2)
    loss.backward()
    assert float(loss) == 0
    assert (ours.grad == 0).all()


# ---- projections


def test_a_frozen_projector_stays_and_the_student_still_learns():
    forcing = forcing_of(projection="frozen")
    before = {name: value.clone() for name, value in forcing.projector.state_dict().items()}
    optimizer = make_optimizer(forcing, OptimConfig(lr=0.1))
    _, align, _ = forcing.losses(fake_batch())
    align.backward()
    assert sum(float(p.grad.abs().sum()) for p in forcing.student.parameters() if p.grad is not None) > 0
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in forcing.projector.state_dict().items())
    fresh = forcing_of().projector.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in fresh.items())


def test_a_convolution_sees_neighbours_in_its_view_only():
    projector = ConvProjector(4, 3)
    valid = torch.ones(1, 2, 3, 4, dtype=torch.bool)
    hidden = torch.randn(1, 24, 4)
    first = projector(hidden, valid)
    image = hidden[0, 12:].view(3, 4, 4).permute(2, 0, 1)
    expected = F.conv2d(image[None], projector.conv.weight, projector.conv.bias, padding=1)
    torch.testing.assert_close(first[0, 12:], expected[0].permute(1, 2, 0).flatten(0, 1))
    hidden[0, 5] += 1  # row 1, column 1 of the first view
    changed = (projector(hidden, valid) - first)[0].abs().sum(-1) > 1e-6
    rows = changed.view(2, 3, 4)
    assert rows[0, :, :3].all()
    assert not rows[0, :, 3].any()
    assert not rows[1].any()
    valid[0, 0, 1, 1] = False
    hidden[0, 5] = torch.nan
    assert projector(hidden, valid).isfinite().all()


def test_spatial_norm_is_over_the_tokens_of_a_view():
    """Over channels or over the batch it would be another normalisation (GeometryForcing's issue 4)."""
    valid = torch.ones(2, 2, 3, 4, dtype=torch.bool)
    valid[0, 0, 0] = False
    target = torch.randn(2, 2, 3, 4, 5) * 7 + torch.randn(2, 2, 1, 1, 5) * 50
    target[~valid] = 0
    found = spatial_norm(target, valid)
    for b in range(2):
        for v in range(2):
            kept = found[b, v][valid[b, v]]
            torch.testing.assert_close(kept.mean(0), torch.zeros(5), atol=1e-4, rtol=0)
            torch.testing.assert_close(kept.std(0, correction=0), torch.ones(5), atol=1e-4, rtol=0)
    assert (found[~valid] == 0).all()
    shifted = target + torch.where(valid[..., None], torch.randn(2, 2, 1, 1, 5), 0.0)
    torch.testing.assert_close(spatial_norm(shifted, valid), found, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("projectors", ["shared", "independent"])
def test_a_convolution_trains_resumes_and_leaves_no_trace(projectors):
    options = {"projection": "conv", "projectors": projectors, "pairs": ((1, -1), (2, -1))}
    forcing, batch = forcing_of(**options), fake_batch()
    optimizer = make_optimizer(forcing, OptimConfig(lr=0.05, weight_decay=0.0))
    losses = []
    for _ in range(15):
        _, align, _ = forcing.losses(batch)
        align.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(align))
    assert losses[-1] < losses[0] - 0.05
    again = forcing_of(**options)
    again.load_projector_state_dict(forcing.projector_state_dict())
    again.student.load_state_dict(forcing.student.state_dict())
    assert float(again.losses(batch)[1]) == pytest.approx(float(forcing.losses(batch)[1]))
    assert not any("conv" in name for name in forcing.export().state_dict())


def test_what_a_convolution_lacks_is_refused():
    with pytest.raises(ConfigError, match=r"'conv' has no hidden layer for forcing\.gate or forcing\.widths"):
        ForcingConfig(projection="conv", gate=True)
    with pytest.raises(ConfigError, match="choose one of mlp, frozen, conv"):
        ForcingConfig(projection="linear")
    with pytest.raises(ConfigError, match="choose one of cosine, smooth_l1, mse, gram"):
        ForcingConfig(loss="l2")


# ---- when, and how fast


def test_the_alignment_ends_at_once_and_the_teacher_rests():
    schedule = AlphaSchedule(stop_at=0.4)
    assert [schedule.factor(p) for p in (0, 0.39, 0.4, 1)] == [1, 1, 0, 0]
    assert AlphaSchedule("linear", stop_at=0.5).factor(0.25) == 0.75
    assert schedule.needs_progress
    with pytest.raises(ConfigError, match=r"stop_at \(0\.1\) must come after warmup \(0\.2\)"):
        AlphaSchedule(warmup=0.2, stop_at=0.1)
    forcing = forcing_of(stop_at=0.5)
    forcing.set_progress(4, 10)
    assert "align_loss" in forcing(fake_batch())[1]
    forcing.set_progress(5, 10)
    loss, metrics = forcing(fake_batch())
    assert "align_loss" not in metrics
    assert float(loss) == pytest.approx(float(metrics["action_loss"]))


def test_the_projector_has_a_rate_of_its_own():
    forcing = forcing_of()
    optimizer = make_optimizer(forcing, OptimConfig(lr=0.01, projector_lr=10.0))
    own = {id(p) for p in forcing.projector.parameters()}
    rates = {id(p) in own: set() for p in forcing.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rates[id(parameter) in own].add(round(group["lr"], 6))
    assert rates == {True: {0.1}, False: {0.01}}
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in forcing.parameters())
    with pytest.raises(ConfigError, match="projector_lr is 0"):
        OptimConfig(projector_lr=0)


# ---- silent bugs that others had


def steps_of(forcing, parameters, count=3):
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    for _ in range(count):
        forcing(fake_batch())[0].backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_projector_that_no_optimizer_holds_is_said_once(caplog):
    """LingBot-VLA's issue 58: the projector stayed at its random start."""
    forcing = forcing_of()
    with caplog.at_level(logging.WARNING):
        steps_of(forcing, forcing.student.parameters())
    said = [record for record in caplog.records if "forcing.parameters()" in record.getMessage()]
    assert len(said) == 1


@pytest.mark.parametrize("options", [{}, {"projection": "frozen"}, {"projection": "conv"}])
def test_a_projector_that_trains_is_not_warned_of(options, caplog):
    forcing = forcing_of(**options)
    with caplog.at_level(logging.WARNING):
        steps_of(forcing, [p for p in forcing.parameters() if p.requires_grad])
    assert "forcing.parameters()" not in caplog.text


def test_a_target_is_of_its_own_frame():
    """LeRobot's issue 4153: a target looked into the future."""
    teacher, seen = FakeTeacher(), []
    original = teacher.features
    teacher.features = lambda views, layers=(-1,): (seen.append(views), original(views, layers))[1]
    forcing, batch = SpatialForcing(FakeStudent(), teacher), fake_batch()
    forcing.losses(batch)
    (views,) = seen
    expected = forcing.student.alignment(batch).views
    assert torch.equal(views.images, expected.images)
    if expected.keys is not None:
        assert torch.equal(views.keys, expected.keys)


def test_independent_projectors_name_rockets_figure(caplog):
    with caplog.at_level(logging.WARNING):
        forcing_of(projectors="independent", pairs=((1, -1), (2, -1)))
    assert "80.0" in caplog.text
    assert "98.2" in caplog.text
