import pytest
import torch

from spatial_forcing.errors import ConfigError
from spatial_forcing.students.heads import FlowHead, L1Head, masked_mean, row_noise


def test_masked_mean_ignores_padding_and_survives_all_padding():
    error = torch.tensor([[[1.0, 3.0], [float("nan"), 9.0]]])
    is_pad = torch.tensor([[False, True]])
    assert masked_mean(error, is_pad) == 2
    assert masked_mean(error, torch.ones(1, 2, dtype=torch.bool)) == 0


@pytest.mark.parametrize("head", [L1Head(16, 3), FlowHead(16, 3, heads=2)])
def test_padded_steps_do_not_reach_the_loss_or_the_gradient(head):
    hidden = torch.randn(2, 4, 16)
    actions = torch.randn(2, 4, 3)
    is_pad = torch.zeros(2, 4, dtype=torch.bool)
    is_pad[:, 2:] = True
    losses = []
    for fill in (0.0, float("nan")):
        torch.manual_seed(0)
        head.zero_grad()
        loss = head.loss(hidden, actions.masked_fill(is_pad[..., None], fill), is_pad)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


def test_noise_of_a_row_does_not_depend_on_the_batch():
    def generator(seed=3):
        return torch.Generator().manual_seed(seed)

    big, small = row_noise(5, (8, 4), generator()), row_noise(2, (8, 4), generator())
    assert torch.equal(big[:2], small)
    own = row_noise(3, (8, 4), [generator(7), generator(3), generator(7)])
    assert torch.equal(own[0], own[2])
    assert torch.equal(own[1], big[0])
    with pytest.raises(ConfigError, match="2 generators for 3"):
        row_noise(3, (8, 4), [generator(), generator()])


def test_flow_follows_a_known_field():
    """With the exact conditional velocity of one target, Euler steps end on that target."""
    head = FlowHead(16, 3, heads=2, steps=10)
    target = torch.randn(2, 4, 3)
    head.velocity = lambda hidden, noisy, time: (target - noisy) / (1 - time)[:, None, None]
    sampled = head.sample(torch.zeros(2, 4, 16), torch.Generator().manual_seed(0))
    torch.testing.assert_close(sampled, target, atol=1e-5, rtol=1e-5)


def test_flow_needs_a_step():
    with pytest.raises(ConfigError, match="flow_steps is 0"):
        FlowHead(16, 3, heads=2, steps=0)
