from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PI0ForConditionalGeneration, PreTrainedTokenizerFast

from spatial_forcing.alignment import (
    FRAME_PREFIX,
    GEOMETRY_PREFIX,
    IMAGE_PREFIX,
    camera_images,
    compose,
    identity_map,
)
from spatial_forcing.errors import CheckpointError, ConfigError, DataError
from spatial_forcing.forcing import ForcingConfig, SpatialForcing
from spatial_forcing.students import LoraSettings, LoraStudent, Pi0, load_student
from spatial_forcing.students.parity import merge_checked
from spatial_forcing.students.pi0.frames import letterboxed_pixels
from tests.fakes import FakeTeacher, fake_batch
from tests.students.pi0_fixtures import small_config

FRONT, WRIST = IMAGE_PREFIX + "front", IMAGE_PREFIX + "wrist"
STATS = {
    "observation.state": {"mean": [0.1] * 4, "std": [1.0, 2.0, 0.5, 1.0]},
    "action": {"mean": [0.5, -0.25, 0.0], "std": [1.0, 3.0, 0.1]},
}


def student(**changes):
    return Pi0.create(small_config(**changes), STATS)


def observation(seed=0, height=40, width=56):
    rng = np.random.default_rng(seed)
    images = {c: rng.integers(0, 255, (height, width, 3), dtype=np.uint8) for c in ("front", "wrist")}
    return {"images": images, "state": rng.normal(size=4).astype(np.float32), "task": "touch the cube"}


def forced(pi0, alpha=0.5):
    return SpatialForcing(pi0, FakeTeacher(), ForcingConfig(alpha=alpha, pairs=((2, -1),)))


def test_a_small_batch_is_learned():
    pi0, batch = student(), fake_batch(batch_size=2)
    forcing = forced(pi0)
    parameters = [p for p in forcing.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    torch.manual_seed(0)
    history = []
    for _ in range(60):
        loss, metrics = forcing(batch)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
        history.append((metrics["action_flow"].item(), metrics["align_loss"].item()))
    first, last = np.mean(history[:5], axis=0), np.mean(history[-5:], axis=0)
    assert (last < 0.7 * first).all()


def test_state_and_actions_are_normalised_and_padded():
    pi0, batch = student(), fake_batch(batch_size=2)
    inputs = pi0._inputs(batch)
    assert inputs["state"].shape == (2, 32)
    torch.testing.assert_close(inputs["state"][:, :4], pi0.state_norm.normalize(batch["observation.state"]))
    assert not inputs["state"][:, 4:].any()
    assert pi0.act([observation()]).shape == (1, 2, 3)
    with pytest.raises(ConfigError, match="state_dim is 33; pi0 takes 1 to 32"):
        small_config(state_dim=33)


def test_padded_steps_have_no_loss():
    pi0, batch = student(), fake_batch(batch_size=2)
    batch["action_is_pad"][:, 1] = True
    losses = []
    for value in (0.0, 50.0):
        batch["action"] = batch["action"].clone()
        batch["action"][:, 1] = value
        torch.manual_seed(0)
        error = pi0(batch)[0]
        losses.append(error)
    assert torch.isfinite(losses[1])
    # Padded actions stay in the noisy chunk that the expert attends to, as in openpi; their error does not.
    torch.manual_seed(0)
    actions = pi0._padded(pi0.action_norm.normalize(batch["action"]))
    noise = torch.randn_like(actions)
    beta = torch.distributions.Beta(torch.tensor(1.5), torch.tensor(1.0))
    time = beta.sample((2,)) * 0.999 + 0.001
    torch.testing.assert_close(losses[1], pi0.flow_error(batch, actions, noise, time)[:, :1].mean())


def wide_batch(height=28, width=56):
    batch = fake_batch(batch_size=2)
    generator = torch.Generator().manual_seed(3)
    for key in (FRONT, WRIST):
        batch[key] = torch.rand(2, 3, height, width, generator=generator)
    return batch


def test_letterbox_tokens_have_no_target_and_the_teacher_sees_no_bars():
    pi0, batch = student(), wide_batch()
    source = camera_images(batch, pi0.cameras)
    pixels = letterboxed_pixels(source, 56)
    assert pixels.shape == (2, 2, 3, 56, 56)
    assert (pixels[..., :14, :] == -1).all()
    assert (pixels[..., 42:, :] == -1).all()
    torch.testing.assert_close(pixels[:, 0, :, 14:42], batch[FRONT] * 2 - 1)
    layout, views = pi0.alignment(batch).layout, pi0.alignment(batch).views
    assert layout.valid[0, 0].tolist() == [[False] * 4, [True] * 4, [True] * 4, [False] * 4]
    assert torch.equal(views.images[:, 0], batch[FRONT])
    # The top-left pixel of the student's picture is the top-left pixel of the frame.
    corner = torch.tensor([-1.0, -1 + 2 * 14 / 55, 1.0])
    torch.testing.assert_close(views.student_to_view[0, 0] @ corner, torch.tensor([-1.0, -1.0]))


def test_cameras_of_different_size_are_letterboxed_for_the_teacher():
    pi0, batch = student(), wide_batch()
    batch[WRIST] = torch.rand(2, 3, 30, 30)
    views = pi0.alignment(batch).views
    assert views.images.shape == (2, 2, 3, 56, 56)
    assert views.valid.flatten(2).float().mean(-1)[0].tolist() == [0.5, 1.0]
    assert torch.isfinite(forced(pi0)(batch)[0])


def test_a_mask_of_earlier_padding_is_kept():
    pi0, batch = student(), wide_batch(56, 56)
    mask = torch.zeros(2, 56, 56, dtype=torch.bool)
    mask[:, :28] = True
    batch["valid.front"] = mask
    assert pi0.alignment(batch).layout.valid[0, 0].any(1).tolist() == [True, True, False, False]
    batch["valid.front"] = mask[:, :4]
    with pytest.raises(DataError, match=r"valid\.front is"):
        pi0.alignment(batch).layout


def test_stored_frames_of_a_cache_get_the_augmentation_and_the_letterbox():
    pi0, batch = student(), wide_batch()
    crop = identity_map(2) * torch.tensor([0.5, 0.5, 1.0])
    for camera in ("front", "wrist"):
        batch[FRAME_PREFIX + camera] = torch.rand(2, 3, 28, 56)
        batch[GEOMETRY_PREFIX + camera] = crop
    plain = pi0.alignment(wide_batch()).views
    views = pi0.alignment(batch).views
    assert torch.equal(views.images[:, 1], batch[FRAME_PREFIX + "wrist"])
    torch.testing.assert_close(views.student_to_view, compose(crop[:, None], plain.student_to_view))
    batch[FRAME_PREFIX + "wrist"] = torch.rand(2, 3, 28, 28)
    with pytest.raises(DataError, match=r"'front': \(2, 3, 28, 56\), 'wrist': \(2, 3, 28, 28\)"):
        pi0.alignment(batch).views


def test_absent_views_change_nothing_whatever_they_hold():
    pi0 = student()
    losses = []
    for value in (0.0, 1.0, -1.0, float("nan")):
        batch = fake_batch(batch_size=2)
        batch[WRIST] = torch.full_like(batch[WRIST], value)
        batch[WRIST + "_is_pad"] = torch.tensor([True, True])
        torch.manual_seed(0)
        losses.append(forced(pi0)(batch)[0])
    assert torch.isfinite(losses[0])
    assert all(torch.equal(losses[0], other) for other in losses)


def test_an_absent_view_is_the_same_as_a_student_without_it():
    both, one = student(), student(cameras=("front",))
    batch = fake_batch(batch_size=2)
    batch[WRIST + "_is_pad"] = torch.tensor([True, True])
    noise = torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(both.sample(batch, noise), one.sample(batch, noise), atol=1e-5, rtol=1e-5)


def test_a_sample_without_any_view_contributes_nothing_and_is_never_nan():
    pi0 = student()
    forcing = forced(pi0)
    batch = fake_batch(batch_size=2)
    for key in (FRONT, WRIST):
        batch[key + "_is_pad"] = torch.tensor([False, True])
    torch.manual_seed(0)
    loss, metrics = forcing(batch)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in forcing.parameters() if p.grad is not None)
    assert metrics["samples_without_tokens"] == 1
    first = {k: v[:1] if isinstance(v, (torch.Tensor, list)) else v for k, v in batch.items()}
    alone = forcing(first)[1]["align_loss"]
    torch.testing.assert_close(metrics["align_loss"], alone)
    for key in (FRONT, WRIST):
        batch[key + "_is_pad"] = torch.tensor([True, True])
    loss, metrics = forcing(batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert metrics["align_loss"] == 0


def test_saved_files_load_in_stock_transformers_and_here(tmp_path):
    pi0 = student()
    pi0.save_pretrained(tmp_path)
    stock, info = PI0ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    own = pi0.network.state_dict()
    assert own.keys() == stock.state_dict().keys()
    assert all(torch.equal(value, own[name]) for name, value in stock.state_dict().items())
    again = load_student(tmp_path)
    assert isinstance(again, Pi0)
    generator = torch.Generator().manual_seed(0)
    actions = pi0.act([observation()], generator)
    assert torch.equal(again.act([observation()], generator.manual_seed(0)), actions)
    batch = again._collate([observation()])
    noise = torch.randn(1, 2, 32, generator=generator.manual_seed(0))
    sampled = stock.sample_actions(**again._inputs(batch), noise=noise, num_steps=10)
    assert torch.equal(pi0.action_norm.denormalize(sampled[..., :3]), actions)


@pytest.mark.parametrize("layout", ["openpi", "lerobot", "transformers"])
def test_pretrained_weights_of_every_layout(tmp_path, layout):
    source = student()
    source.save_pretrained(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    if layout == "lerobot":
        weights = {"model." + name: value for name, value in weights.items()}
    if layout == "transformers":
        weights = source.network.state_dict()
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"type": "pi0"}))
    words(tmp_path / "tokens")
    config = small_config(pretrained=str(tmp_path / "base"), tokenizer=str(tmp_path / "tokens"))
    pi0 = Pi0.create(config, STATS, seed=7)
    for name, value in source.network.state_dict().items():
        assert torch.equal(pi0.network.state_dict()[name], value)
    assert torch.isfinite(pi0(fake_batch())[0])  # no buffer was left empty
    pi0.save_pretrained(tmp_path / "tuned")
    again = load_student(tmp_path / "tuned")
    assert torch.equal(
        again.act([observation()], torch.Generator().manual_seed(1)),
        pi0.act([observation()], torch.Generator().manual_seed(1)),
    )


def words(folder):
    """A tokenizer of few words in PaliGemma's manner: a start token, the newline a token of its own."""
    vocab = {name: i for i, name in enumerate(("<pad>", "<bos>", "<unk>", "touch", "the", "cube", "\n"))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>", pad_token="<pad>"
    )
    fast.save_pretrained(folder)


def test_prompt_is_start_text_newline_padding(tmp_path):
    words(tmp_path)
    pi0 = student(tokenizer=str(tmp_path))
    ids, real = pi0.prompt([" touch_the\ncube ", "touch"], 2)
    assert ids.tolist() == [[1, 3, 4, 5, 6, 0, 0, 0], [1, 3, 6, 0, 0, 0, 0, 0]]
    assert real.sum(1).tolist() == [5, 3]
    with pytest.raises(DataError, match="has 10 tokens and the student takes 8"):
        pi0.prompt(["touch the cube touch the cube touch the"], 1)
    with pytest.raises(DataError, match=r"1 samples and task None"):
        pi0.prompt(None, 1)


def test_the_random_stream_is_not_shifted_by_building_one():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    a = student()
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(a.network.action_out_proj.weight, student().network.action_out_proj.weight)


def test_bad_input(tmp_path):
    with pytest.raises(ConfigError, match="hf auth login"):
        student(tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="know PaliGemma's tokens only"):
        small_config(pretrained="lerobot/pi0_base")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"type": "smolvla"}))
    words(tmp_path / "tokens")
    small = {"pretrained": str(base), "tokenizer": str(tmp_path / "tokens")}
    with pytest.raises(CheckpointError, match="'smolvla' policy, not 'pi0'"):
        student(**small)
    (base / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"base/model\.safetensors"):
        student(**small)
    (base / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"base/model\.safetensors"):
        student(**small)
    state = student().network.state_dict()
    state["action_out_proj.bias"] = torch.zeros(31)
    save_file(state, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 weights of another shape .*\(31,\) stored"):
        student(**small)
    batch = fake_batch()
    del batch[WRIST]
    with pytest.raises(DataError, match=r"camera 'wrist' is not in the batch .*\['front'\]"):
        student()(batch)
    student().save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "student.json").unlink()
    with pytest.raises(CheckpointError, match=r"saved/student\.json.*pretrained="):
        load_student(tmp_path / "saved")


def pretrained(tmp_path):
    student().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "student.json").unlink()  # weights as they are published
    words(tmp_path / "base")
    return small_config(pretrained=str(tmp_path / "base"), tokenizer=str(tmp_path / "base"))


def test_lora_trains_saves_and_merges(tmp_path):
    config = pretrained(tmp_path)
    adapted = LoraStudent(Pi0.create(config, STATS), LoraSettings(rank=2), base=config.pretrained)
    forcing = SpatialForcing(adapted, FakeTeacher(), ForcingConfig(pairs=((2, -1),)))
    parameters = [p for p in forcing.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    batch, losses = fake_batch(batch_size=2), []
    for _ in range(20):
        torch.manual_seed(0)
        loss, _ = forcing(batch)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in parameters)  # nothing unused gets adapters
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    adapted.save_pretrained(tmp_path / "adapters")
    again = load_student(tmp_path / "adapters")
    generator = torch.Generator()
    actions = adapted.act([observation()], generator.manual_seed(0))
    assert torch.equal(again.act([observation()], generator.manual_seed(0)), actions)
    merged, parity = merge_checked(again)
    assert parity.relative < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    _, info = PI0ForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(
        load_student(tmp_path / "merged").act([observation()], generator.manual_seed(0)),
        actions,
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.fixture
def tokenizer(tmp_path):
    words(tmp_path / "tokens")
    return str(tmp_path / "tokens")


HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"


@pytest.mark.parametrize("prefix", ["", "model."])
def test_tied_weights_that_differ_are_refused_and_equal_ones_read(tmp_path, tokenizer, prefix):
    student().save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    weights = {prefix + name: value for name, value in stored.items()}
    twice = weights | {prefix + EMBEDDING: weights[prefix + HEAD].clone()}
    for name, content in (("once", weights), ("twice", twice)):
        (tmp_path / name).mkdir()
        save_file(content, tmp_path / name / "model.safetensors")
        read = Pi0(small_config(pretrained=str(tmp_path / name), tokenizer=tokenizer))
        assert torch.equal(read.network.model.vlm.language_model.embed_tokens.weight, stored[HEAD])
    twice[prefix + EMBEDDING][0, 0] += 1
    (tmp_path / "apart").mkdir()
    save_file(twice, tmp_path / "apart" / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        Pi0(small_config(pretrained=str(tmp_path / "apart"), tokenizer=tokenizer))
    for named in (prefix + HEAD, prefix + EMBEDDING, str(tmp_path / "apart")):
        assert named in str(caught.value)


def test_what_is_trained_in_full_on_a_bfloat16_base_learns_in_float32(tmp_path, tokenizer):
    """bfloat16 has eight bits: it would round a step of a usual learning rate away."""
    student().save_pretrained(tmp_path / "saved")
    config = small_config(dtype="bfloat16", pretrained=str(tmp_path / "saved"), tokenizer=tokenizer)
    base = Pi0.create(config, STATS)
    lora = LoraStudent(base, LoraSettings(rank=2), base=tmp_path / "saved")
    trained = {n: p for n, p in lora.named_parameters() if p.requires_grad}
    full = {name for name in trained if "lora_" not in name}
    assert any("action_out_proj" in name for name in full)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for n, p in lora.named_parameters() if n not in trained} == {torch.bfloat16}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=2.5e-5, weight_decay=0.0)
    torch.manual_seed(0)
    lora(fake_batch(batch_size=2))[0].backward()
    optimizer.step()
    for name in full:
        felt = trained[name].grad.abs() > 1e-6
        assert (trained[name] != before[name])[felt].float().mean() > 0.9, name
    # Weights of usual size would not have moved at all.
    name = next(n for n in full if n.endswith("action_out_proj.weight"))
    assert (trained[name].bfloat16() == before[name].bfloat16()).float().mean() > 0.5
    assert torch.isfinite(lora.act([observation()], torch.Generator().manual_seed(0))).all()
    lora.save_pretrained(tmp_path / "adapters")
    merged, parity = merge_checked(lora)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert set(merged.state_dict()) == set(Pi0.create(config, STATS).state_dict())
    assert parity
