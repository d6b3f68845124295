"""Attention, conventions and losses of the OpenVLA-OFT student."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spatial_forcing.alignment import camera_images
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.forcing import ForcingConfig, SpatialForcing
from spatial_forcing.students.openvla_oft import OpenVLAOFT, OpenVLAOFTConfig
from spatial_forcing.students.openvla_oft.decoder import attention_mask
from spatial_forcing.students.openvla_oft.heads import ActionTokens
from spatial_forcing.students.openvla_oft.images import center_crop, observed
from spatial_forcing.students.openvla_oft.sequence import PROMPT, Prompts, assemble
from spatial_forcing.students.openvla_oft.statistics import Bounds
from tests.fakes import CAMERAS, FakeTeacher, fake_batch
from tests.students.openvla_oft.small import small, small_config, small_tokenizer

AUTOREGRESSIVE = {"head": "tokens", "decoding": "autoregressive", "chunk": 1, "state_dim": 0}


def hidden_with(student, change, position, keep=None, layer=1):
    """The state after `layer` blocks, with and without a change of the embedding at `position`."""
    torch.manual_seed(0)
    embedded = torch.randn(1, 9, student.config.width)
    states = []
    hook = student.blocks[layer].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    for amount in (0, change):
        altered = embedded.clone()
        altered[:, position] += amount
        student.llm(altered, keep, causal=student._causal)
    hook.remove()
    return states


def test_a_later_token_changes_an_earlier_hidden_state():
    """The fork's one change: with a causal mask the policy loses 40 points without a word."""
    before, after = hidden_with(small(), 1.0, position=-1)
    moved = (before - after).abs().amax(-1)[0]
    assert bool((moved > 1e-6).all())


@pytest.mark.parametrize("queries", ["zero", "sinusoid"])
def test_only_action_queries_tell_the_steps_of_a_chunk_apart_in_the_first_block(queries, tmp_path):
    """Zeros ask the same question everywhere: after one block of a new model all steps are still equal."""
    student = small(action_queries=queries)
    student.save_pretrained(tmp_path)
    student = OpenVLAOFT.from_pretrained(tmp_path)
    count = student.config.chunk * student.config.action_dim
    states = []
    student.blocks[1].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    student(fake_batch())
    spread = states[0][:, -1 - count : -1].std(1)  # the last token is </s>
    assert bool((spread < 1e-6).all()) == (queries == "zero")


def test_the_original_openvla_is_causal():
    before, after = hidden_with(small(**AUTOREGRESSIVE), 1.0, position=-1)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


def test_padding_changes_nothing():
    keep = torch.ones(1, 9, dtype=torch.bool)
    keep[:, 7:] = False
    before, after = hidden_with(small(), 5.0, position=-1, keep=keep)
    assert torch.equal(before[:, :7], after[:, :7])
    assert bool(torch.isfinite(after).all())


def test_rows_do_not_depend_on_the_length_of_others():
    student = small()
    batch = fake_batch(2)
    batch["task"] = ["touch", "touch the red cube on the far left of the table"]
    alone = {key: value[:1] for key, value in batch.items()}
    text = student._text(batch, torch.zeros(2, 6, dtype=torch.long))
    assert not bool(text.keep[0].all())
    losses = [
        student._hidden(
            b,
            student._text(b, torch.zeros(len(b["task"]), 6, dtype=torch.long)),
            camera_images(b, student.cameras),
        )
        for b in (batch, alone)
    ]
    torch.testing.assert_close(losses[0][:1, : losses[1].shape[1]], losses[1], atol=2e-6, rtol=1e-5)


def test_masks():
    keep = torch.tensor([[True, True, False]])
    assert attention_mask(3, torch.ones(1, 3, dtype=torch.bool), False, keep.device) is None
    padded = attention_mask(3, keep, False, keep.device)[0, 0]
    assert padded.tolist() == [[True, True, False], [True, True, False], [True, True, True]]
    causal = attention_mask(3, keep, True, keep.device)[0, 0]
    assert causal.tolist() == [[True, False, False], [True, True, False], [True, True, True]]


def test_absent_views_are_not_attended_to():
    student = small()
    batch = fake_batch(2)
    key = f"observation.images.{CAMERAS[1]}"
    batch[f"{key}_is_pad"] = torch.tensor([True, False])
    first = student(batch)[0]
    changed = {**batch, key: batch[key].clone()}
    changed[key][0] = 1 - changed[key][0]
    assert torch.equal(student(changed)[0], first)
    assert not bool(student.alignment(batch).layout.valid[0, 1].any())


@pytest.mark.parametrize("settings", [{}, {"film": True}, {"head": "tokens"}])
def test_recomputing_activations_changes_no_gradient(settings):
    gradients = []
    for recompute in (False, True):
        student = small(gradient_checkpointing=recompute, **settings)
        forcing = SpatialForcing(student, FakeTeacher(), ForcingConfig(pairs=((2, -1),)))
        loss, metrics = forcing(fake_batch())
        assert metrics["align_loss"] > 0
        loss.backward()
        gradients.append({n: p.grad for n, p in student.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
        assert bool(gradient.abs().sum() > 0) or name.endswith("k_proj.bias"), name


def test_film_listens_to_the_instruction():
    student = small(film=True)
    batch = fake_batch(1)
    other = {**batch, "task": ["push the green block"]}

    def patches(given):
        text = student._text(given, torch.zeros(1, 6, dtype=torch.long))
        hidden = []
        hook = student.vision.register_forward_hook(lambda *args: hidden.append(args[-1]))
        student._hidden(given, text, camera_images(given, student.cameras))
        hook.remove()
        return hidden[0]

    assert not torch.equal(patches(batch), patches(other))
    assert not any(name.endswith(".scale.weight") for name, _ in small().named_parameters())


def test_the_prompt_is_the_published_one():
    prompts = Prompts(small_config(tokenizer="file"), small_tokenizer())
    ids = prompts.encode("Touch the CUBE")
    assert ids == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 14, 8, 15, 12, 13, 4, 29871]
    assert PROMPT.format(task="x").startswith("In: What action should the robot take to x?\nOut:")


def test_assembled_rows_are_padded_on_the_right():
    text = assemble([[1, 7], [1, 7, 8]], torch.tensor([[20, 21], [22, 23]]))
    assert text.ids.tolist() == [[1, 7, 20, 21, 2, 0], [1, 7, 8, 22, 23, 2]]
    assert text.keep.sum(1).tolist() == [5, 6]
    assert text.positions.tolist() == [[2, 3], [3, 4]]


def test_the_gripper_changes_sides():
    student = small(gripper="libero")
    student.action_bounds.set([-1] * 3, [1] * 3, [True, True, False], "test")
    raw = torch.tensor([[[0.5, -0.5, -1.0], [0.25, 0.0, 1.0]]])
    model = student.to_model(raw)
    assert model[..., -1].tolist() == [[1.0, 0.0]]
    torch.testing.assert_close(student.to_environment(model).float(), raw)
    assert student.to_environment(torch.tensor([0.0, 0.0, 0.4]))[-1] == 1


def test_statistics_of_a_dataset_are_taken():
    student = small(gripper="libero")
    stats = {
        "action": {"q01": [-2, -1, -1], "q99": [2, 1, 1]},
        "observation.state": {"q01": [0, 0, 0, 5], "q99": [1, 1, 1, 5]},
    }
    student.fit(stats)
    assert student.action_bounds.mask.tolist() == [True, True, False]
    assert student.to_environment(torch.tensor([1.0, 1.0, 1.0]))[0] == pytest.approx(2)
    normalised = student.state_bounds.normalize(torch.tensor([0.0, 1.0, 9.0, 7.0]))
    torch.testing.assert_close(normalised, torch.tensor([-1.0, 1.0, 1.0, 0.0]).double())
    assert student.state_bounds.denormalize(normalised)[-1] == 5
    with pytest.raises(DataError, match="state_dim and action_dim"):
        student.fit({**stats, "action": {"q01": [0], "q99": [1]}})


def test_bounds_keep_their_precision_in_a_half_precision_model():
    bounds = Bounds(1)
    bounds.set([0.123456789], [0.987654321], None, "test")
    assert bounds.to(torch.bfloat16).low.item() == 0.123456789


def test_action_tokens_are_the_vocabulary_s_last():
    tokens = ActionTokens(32000)
    ids = tokens.encode(torch.tensor([-1.0, 0.0, 1.0, 7.0]))
    assert ids.tolist() == [31999, 31872, 31744, 31744]
    torch.testing.assert_close(
        tokens.decode(ids), torch.tensor([-1, 0, 1, 1]).double(), atol=1 / 255 + 1e-6, rtol=0
    )


def test_token_actions_fit_one_sample():
    """Training the token head on one batch teaches it that batch's actions, one token after the other."""
    student = small(**AUTOREGRESSIVE, cameras=CAMERAS[:1])
    batch = fake_batch(2, chunk=1)
    batch["action"] = torch.tensor([[[0.5, -0.5, 0.0]], [[-0.25, 0.75, 0.25]]])
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(40):
        loss, _ = student(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seen = [
        {
            "images": {
                CAMERAS[0]: (batch[f"observation.images.{CAMERAS[0]}"][i] * 255).byte().movedim(0, -1).numpy()
            },
            "state": np.zeros(0, np.float32),
            "task": batch["task"][i],
        }
        for i in range(2)
    ]
    torch.testing.assert_close(student.act(seen), batch["action"], atol=2 / 255, rtol=0)


def test_half_precision_runs_and_trains_float32_heads():
    student = small(dtype="bfloat16", head_dtype="bfloat16")
    loss, _ = student(fake_batch())
    loss.backward()
    assert student.action_head.model.fc2.weight.dtype == torch.float32
    assert student.llm.layers[0].mlp.up_proj.weight.grad.dtype == torch.bfloat16
    assert bool(torch.isfinite(loss))


def test_the_centre_crop_keeps_ninety_percent_of_the_area():
    ramp = torch.linspace(0, 1, 64).expand(3, 64, 64)
    cropped = center_crop(ramp)
    side = 0.9**0.5
    expected = torch.linspace((1 - side) / 2, (1 + side) / 2, 64)
    torch.testing.assert_close(cropped[0, 0], expected, atol=1 / 255, rtol=0)


def test_observed_images_are_resized_and_checked():
    image = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    assert observed(image, 28, crop=True, jpeg=True).shape == (3, 28, 28)
    untouched = observed(image, 40, crop=False, jpeg=True)
    assert torch.equal((untouched * 255).round().byte().movedim(0, -1), torch.from_numpy(image))
    with pytest.raises(DataError, match="uint8"):
        observed(image.astype(np.float32), 28, crop=False, jpeg=False)


def test_a_missing_view_is_named():
    student = small()
    image = np.zeros((28, 28, 3), np.uint8)
    seen = {"images": {CAMERAS[0]: image}, "state": np.zeros(4, np.float32), "task": "x"}
    with pytest.raises(DataError, match=f"lacks camera '{CAMERAS[1]}'.*takes {CAMERAS[0]}, {CAMERAS[1]}"):
        student.act([seen])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoding": "autoregressive"}, "head 'tokens', chunk 1"),
        ({"image_size": 30}, "multiple of 14"),
        ({"cameras": ("a", "a")}, "distinct"),
        ({"dino": (10, 3, 4, 8)}, "heads dividing width"),
        ({"head": "tokens", "vocab": 200}, "no room"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        small_config(**settings)


def test_the_defaults_are_the_published_sizes():
    config = OpenVLAOFTConfig()
    assert (config.visual_tokens, config.grid, config.token_vocab) == (513, 16, 32000)
