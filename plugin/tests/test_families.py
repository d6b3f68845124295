"""Each family that can be built small: tap, token grid, loss, and the stock policy's equality at weight 0."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lerobot_policy_spatial_forcing import guards

from plugin.tests.builders import FAMILIES, parameters_of
from spatial_forcing.alignment import transform
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.forcing.tap import first_norm

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def first_input(policy, batch):
    """What enters the first decoder block, (B, L, D)."""
    seen = []
    norm = first_norm(policy.forcing.student.blocks[0])
    hook = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    torch.manual_seed(0)
    policy.stock_forward(batch)
    hook.remove()
    assert len(seen) == 1
    sequence = policy.forcing.student.family.sequence
    return seen[0] if sequence is None else sequence(seen)


@families
def test_the_tap_fires_once(family):
    policy = family.forced().train()
    calls = []
    block = policy.forcing.student.blocks[policy.forcing.pairs[0].blocks]
    first_norm(block).register_forward_pre_hook(lambda *_: calls.append(1))
    loss, metrics = policy(family.batch())
    assert len(calls) == 1
    assert {"align_loss", "cosine", "alpha"} <= metrics.keys()
    loss.backward()
    below = [p for part in policy.forcing.student.blocks[:2] for p in part.parameters()]
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in below)


@families
@pytest.mark.parametrize("shape", ["token image", "wide", "tall"])
def test_token_grids_point_at_the_right_patches(family, shape):
    """Painting one patch changes most the position that the layout claims, at the first block's input."""
    policy = family.forced().eval()
    family.steady(policy)
    side = family.token_image
    size = {"token image": (side, side), "wide": (side // 2, side), "tall": (side, side // 2)}[shape]
    batch = family.batch(size=size, B=1)
    student = policy.forcing.student
    layout, views = student.alignment(batch).layout, student.alignment(batch).views
    _, V, h, w = layout.index.shape
    assert family.views == V
    before = first_input(policy, batch)
    for view in range(V):
        tokens = layout.valid[0, view].nonzero().tolist()
        padded = family.bars and shape != "token image"
        assert len(tokens) == h * w if not padded else h * w // 4 <= len(tokens) < h * w
        chosen = tokens[:: max(1, len(tokens) // 6)]
        assert len(chosen) >= min(5, len(tokens))
        for y, x in chosen:
            painted = paint(batch, views, student, view, (y, x), (h, w))
            change = (first_input(policy, family.finish(painted)) - before).norm(dim=-1)[0]
            assert change.argmax() == layout.index[0, view, y, x], (view, y, x)


def paint(batch, views, student, view, token, grid):
    """Black out the pixels of one token, found through the map from the token image to the view."""
    key = student._shown(batch)[view]
    image = batch[key].clone()
    H, W = image.shape[-2:]
    low, high = (torch.tensor([(token[1] + d) / grid[1], (token[0] + d) / grid[0]]) * 2 - 1 for d in (0, 1))
    corners = transform(views.student_to_view[0, view], torch.stack([low, high]))
    pixels = (corners + 1) / 2 * torch.tensor([W - 1, H - 1])
    (x0, y0), (x1, y1) = pixels.round().long().clamp(min=0).tolist()
    assert x1 > x0, "the painted patch has no pixels"
    assert y1 > y0, "the painted patch has no pixels"
    image[..., y0:y1, x0:x1] = 1 - image[..., y0:y1, x0:x1].round()
    return {**batch, key: image}


@families
def test_both_losses_fall(family):
    policy = family.forced().train()
    parameters = parameters_of(policy)
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    batch, history = family.batch(), []
    torch.manual_seed(0)
    for _ in range(40):
        loss, metrics = policy(dict(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        policy.update()
        history.append((metrics["action_loss"], metrics["align_loss"]))
    first, last = (torch.tensor(part).mean(0) for part in (history[:8], history[-8:]))
    assert last[0] < 0.9 * first[0]
    assert last[1] < 0.7 * first[1]


def train(policy, family, steps=3):
    """Losses of a few steps with a fixed seed, and the weights after them."""
    policy.train()
    optimizer = torch.optim.AdamW(parameters_of(policy), lr=1e-3)
    torch.manual_seed(1)
    losses = []
    for step in range(steps):
        loss, _ = policy(family.batch(seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, policy.state_dict()


@families
def test_weight_zero_is_the_stock_policy_step_by_step(family):
    expected, weights = train(family.stock(), family)
    control = family.forced({"alpha": 0.0, "teacher": "does-not-exist"})
    assert control.forcing is None
    losses, ours = train(control, family)
    assert losses == expected
    assert ours.keys() == weights.keys()
    assert all(torch.equal(ours[name], weights[name]) for name in weights)


@families
def test_the_projector_shifts_no_random_number(family):
    """Same seed: same initial weights, same action loss, and in eval mode the stock loss alone."""
    stock, forced = family.stock(), family.forced()
    own = forced.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in stock.state_dict().items())
    assert all("spatial_forcing" in name for name in own.keys() - stock.state_dict().keys())
    torch.manual_seed(3)
    loss, _ = stock.train()(family.batch())
    torch.manual_seed(3)
    total, metrics = forced.train()(family.batch())
    assert metrics["action_loss"] == loss.item()
    assert total.item() == pytest.approx(loss.item() + 0.5 * metrics["align_loss"], rel=1e-5)
    torch.manual_seed(3)
    loss, _ = stock.eval()(family.batch())
    torch.manual_seed(3)
    assert torch.equal(forced.eval()(family.batch())[0], loss)


@families
def test_no_optimizer_parameter_twice_and_the_projector_among_them(family):
    policy = family.forced()
    ids = [id(p) for p in parameters_of(policy)]
    assert len(ids) == len(set(ids))
    assert {id(p) for p in policy.forcing.projector.parameters()} <= set(ids)
    assert not [name for name, _ in policy.named_modules() if "teacher" in name.lower()]


@families
def test_views_follow_the_policys_order_and_a_choice(family):
    both, batch = family.forced().forcing.student, family.batch()
    assert both.alignment(batch).views.cameras == ("front", "wrist")[: family.views]
    if family.views == 2:
        student = family.forced({"cameras": ["wrist"]}).forcing.student
        assert student.alignment(batch).views.cameras == ("wrist",)
        assert torch.equal(
            student.alignment(batch).layout.index[:, 0], both.alignment(batch).layout.index[:, 1]
        )
        del batch["observation.images.wrist"]
        assert both.alignment(family.finish(batch)).views.cameras == ("front",)


def test_xvla_trains_the_projector_at_the_full_rate():
    """Its optimizer gives a tenth to whatever has "vlm" in its name, as the projector's norm has."""
    policy = FAMILIES["xvla"].forced()
    groups = policy.config.get_optimizer_preset().build(policy.get_optim_params()).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    projector = {rates[id(p)] for p in policy.forcing.projector.parameters()}
    assert projector == {policy.config.optimizer_lr}
    assert rates[id(policy.forcing.student.blocks[0].fc1.weight)] < policy.config.optimizer_lr


@pytest.mark.parametrize("name", ["pi0", "pi0_fast", "eo1"])
def test_activation_checkpointing_changes_neither_loss_nor_gradients(name):
    family, found = FAMILIES[name], []
    for checkpointing in (False, True):
        policy = family.forced(gradient_checkpointing=checkpointing).train()
        torch.manual_seed(4)
        loss, _ = policy(family.batch())
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}))
    (plain, expected), (other, gradients) = found
    torch.testing.assert_close(other, plain)
    assert gradients.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(gradients[key], value, atol=1e-6, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", ["pi0", "smolvla"])
def test_losses_of_single_samples_share_the_alignment(name):
    family = FAMILIES[name]
    policy, batch = family.forced().train(), family.batch()
    torch.manual_seed(4)
    losses, metrics = policy(batch, reduction="none")
    assert losses.shape == (2,)
    torch.manual_seed(4)
    stock, _ = policy.stock_forward(batch, reduction="none")
    torch.testing.assert_close(losses, stock + 0.5 * metrics["align_loss"])


def test_act_refuses_cameras_of_different_sizes():
    family = FAMILIES["act"]
    batch = family.batch()
    batch["observation.images.wrist"] = torch.rand(2, 3, 64, 128)
    with pytest.raises(DataError, match=r"\(64, 128\), \(128, 128\)"):
        family.forced().train()(batch)


def test_act_needs_imagenet_statistics():
    """With the dataset's own, the teacher would see other colours than the camera's."""
    policy = FAMILIES["act"].forced().config
    plain = SimpleNamespace(enable=False)

    def training(imagenet):
        dataset = SimpleNamespace(image_transforms=plain, use_imagenet_stats=imagenet)
        return SimpleNamespace(policy=policy, steps=5, dataset=dataset, peft=None)

    guards.check_training(training(True))
    with pytest.raises(ConfigError, match="use_imagenet_stats=true"):
        guards.check_training(training(False))


@families
def test_cameras_of_different_sizes_are_shown_as_token_images(family):
    if family.name in ("xvla", "eo1", "act"):
        pytest.skip("one view is aligned, or any size becomes tokens without bars")
    policy = family.forced().train()
    batch = family.batch()
    wide = torch.rand(2, 3, 30, 60, generator=torch.Generator().manual_seed(1))
    batch["observation.images.wrist"] = wide
    views = policy.forcing.student.alignment(batch).views
    side = family.token_image
    assert views.images.shape == (2, 2, 3, side, side)
    assert views.valid[:, 0].all()
    assert 0.4 < views.valid[:, 1].float().mean() < 0.6
    assert torch.isfinite(policy(batch)[0])
