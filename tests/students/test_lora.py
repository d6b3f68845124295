"""LoRA on a student: what is trained, what is written, and that merging changes no action."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from torch.utils.checkpoint import checkpoint

from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.forcing import ForcingConfig, SpatialForcing
from spatial_forcing.students import LoraSettings, LoraStudent, NanoConfig, NanoVLA, load_student, merge
from spatial_forcing.students.lora import adapted_layers
from spatial_forcing.students.parity import Parity, example_observations, merge_checked
from tests.fakes import CAMERAS, FakeTeacher, fake_batch

CONFIG = NanoConfig(
    CAMERAS, image_size=24, patch_size=8, width=32, depth=3, heads=2, action_dim=3, chunk=2, head="flow"
)
SETTINGS = LoraSettings(rank=4)


@pytest.fixture
def base(tmp_path):
    NanoVLA(CONFIG, seed=3).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def wrapped(base, settings=SETTINGS, **options):
    return LoraStudent(load_student(base), settings, base=base, **options)


def trained(base, steps=3, settings=SETTINGS):
    """A student whose adapters and head have moved, in the buffers too."""
    torch.manual_seed(0)  # of the flow head's noise
    student = wrapped(base, settings)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        student(fake_batch(seed=step))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    student.policy.action_norm.offset += 0.25
    return student


def actions(student):
    return torch.cat(
        [student.act([o], torch.Generator().manual_seed(0)) for o in example_observations(CONFIG)]
    )


def test_a_fresh_adapter_changes_no_action(base):
    assert torch.equal(actions(wrapped(base)), actions(load_student(base)))


def test_adapters_and_the_head_are_trained_and_nothing_else(base):
    student = wrapped(base)
    free = {name for name, p in student.policy.named_parameters() if p.requires_grad}
    assert student.cameras == CAMERAS
    linear = {f"layers.{i}.{part}" for i in range(3) for part in ("qkv", "out", "mlp.0", "mlp.2")}
    assert set(adapted_layers(student)) == linear
    for name in free:
        assert ".lora_" in name or name.split(".")[0] in ("head", "state_embed", "action_query")
    assert {n.split(".lora_")[0] for n in free if ".lora_" in n} == linear
    student(fake_batch())[0].backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)
    assert all(p.grad is None for p in student.parameters() if not p.requires_grad)


def test_the_base_stays_as_it_was(base):
    before = load_student(base).state_dict()
    after = trained(base).policy.state_dict()
    frozen = [k for k in before if k.startswith(("patch_embed", "text_", "view_", "layers", "norm."))]
    for key in frozen:
        stem, _, leaf = key.rpartition(".")
        assert torch.equal(before[key], after.get(key, after.get(f"{stem}.base_layer.{leaf}")))


def test_initial_adapters_depend_on_the_seed_and_shift_no_random_stream(base):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = wrapped(base, seed=1)
    assert torch.equal(torch.rand(3), expected)
    again, other = wrapped(base, seed=1), wrapped(base, seed=2)
    key = "layers.0.qkv.lora_A.default.weight"
    assert torch.equal(one.adapter_state()[key], again.adapter_state()[key])
    assert not torch.equal(one.adapter_state()[key], other.adapter_state()[key])


def test_saved_adapters_act_bit_identically_and_hold_no_base(base, tmp_path):
    student = trained(base)
    student.save_pretrained(tmp_path / "saved")
    loaded = load_student(tmp_path / "saved")
    assert torch.equal(actions(loaded), actions(student))
    assert not torch.equal(actions(loaded), actions(load_student(base)))
    written = sum(path.stat().st_size for path in (tmp_path / "saved").glob("*.safetensors"))
    assert student.checkpoint_bytes < written < student.checkpoint_bytes + 20_000
    assert not (tmp_path / "saved" / "model.safetensors").exists()


def test_the_files_are_peft_s(base, tmp_path):
    """peft alone, without this package, puts the same adapters on the same base."""
    student = trained(base)
    student.save_pretrained(tmp_path / "saved")
    plain = load_student(base)
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "saved"))
    state = {k.removeprefix("base_model.model."): v for k, v in loaded.state_dict().items() if ".lora_" in k}
    own = student.adapter_state()
    assert sorted(state) == sorted(own)
    assert all(torch.equal(state[k], own[k]) for k in own)


def test_merged_policies_have_the_base_s_keys_and_actions(base, tmp_path):
    student = trained(base)
    before, keys = actions(student), list(load_student(base).state_dict())
    policy, parity = merge_checked(student)
    assert type(policy) is NanoVLA
    assert list(policy.state_dict()) == keys
    assert parity.relative < parity.tolerance
    torch.testing.assert_close(actions(policy), before, atol=1e-5, rtol=1e-5)
    policy.save_pretrained(tmp_path / "merged")
    assert torch.equal(actions(load_student(tmp_path / "merged")), actions(policy))


def test_half_precision_weights_are_rounded_once(base):
    student = trained(base)
    layer = student.policy.layers[0].qkv
    layer.base_layer.to(torch.bfloat16)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    exact = layer.base_layer.weight.double() + (b.double() @ a.double()) * (4 / 4)
    merged = merge(student).layers[0].qkv.weight
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.float().to(torch.bfloat16))


def test_a_merge_that_changes_actions_is_refused(base, monkeypatch):
    student = trained(base)

    def broken(student):
        policy = merge(student)
        with torch.no_grad():
            policy.layers[0].qkv.weight *= 1.5
        return policy

    monkeypatch.setattr("spatial_forcing.students.parity.merge", broken)
    with pytest.raises(CheckpointError, match=r"at most 0\.\d+ .*--form adapter"):
        merge_checked(student)


def test_not_a_number_is_no_parity():
    assert not Parity(float("nan"), 1.0, torch.float32).relative <= 1


class Checkpointed(torch.nn.Module):
    """A decoder block recomputed in backward."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.input_layernorm = block.input_layernorm

    def forward(self, hidden, keep):
        return checkpoint(self.block, hidden, keep, use_reentrant=False)


def gradients(base, recompute):
    student = trained(base)
    if recompute:
        student.policy.layers = torch.nn.ModuleList(Checkpointed(b) for b in student.policy.layers)
    forcing = SpatialForcing(student, FakeTeacher(), ForcingConfig(pairs=((2, -1),)))
    torch.manual_seed(0)
    loss, metrics = forcing(fake_batch())
    loss.backward()
    names = [n for n, p in student.named_parameters() if p.requires_grad and ".layers.2." not in n]
    named = dict(student.named_parameters())
    return loss.detach(), metrics["align_loss"], [named[n].grad for n in names]


def test_the_alignment_reaches_the_adapters_with_and_without_activation_checkpointing(base):
    loss, align, plain = gradients(base, recompute=False)
    again, _, recomputed = gradients(base, recompute=True)
    assert align > 0
    assert torch.equal(loss, again)
    assert all(g is not None and bool(g.abs().sum() > 0) for g in plain if g.ndim > 1)
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b)


def test_adapters_refuse_another_base(base, tmp_path):
    trained(base).save_pretrained(tmp_path / "saved")
    NanoVLA(CONFIG, seed=4).save_pretrained(base)
    with pytest.raises(CheckpointError, match="fingerprint"):
        load_student(tmp_path / "saved")


def test_a_moved_base_can_be_named(base, tmp_path):
    student = trained(base)
    student.save_pretrained(tmp_path / "saved")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="Pass the folder it is in now"):
        load_student(tmp_path / "saved")
    loaded = LoraStudent.from_pretrained(tmp_path / "saved", base=tmp_path / "elsewhere")
    assert torch.equal(actions(loaded), actions(student))


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "trained.safetensors"])
def test_damaged_and_missing_files_are_named(base, tmp_path, file):
    trained(base).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / file
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=f"{file} is damaged"):
        load_student(tmp_path / "saved")
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{file} does not exist"):
        load_student(tmp_path / "saved")


def test_adapters_of_another_rank_are_refused(base, tmp_path):
    trained(base).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    config["lora"]["rank"] = 2
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"of another shape .*layers.0"):
        load_student(tmp_path / "saved")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2, "targets": ("layer.*",)}, "'layer.*' matches no linear layer"),
        ({"rank": 2, "full": ("haed",)}, r"no parameter 'haed'\. Did you mean 'head'"),
        ({"rank": 2, "exclude": ("layers.*",)}, "no linear layer is left"),
    ],
)
def test_settings_without_a_match_are_named(base, settings, message):
    with pytest.raises(ConfigError, match=message):
        wrapped(base, LoraSettings(**settings))


def test_targets_choose_layers(base):
    student = wrapped(base, LoraSettings(rank=2, targets=("layers.*",), exclude=("*.mlp.*",), full=()))
    assert set(adapted_layers(student)) == {f"layers.{i}.{part}" for i in range(3) for part in ("qkv", "out")}
    assert not student.policy.head.out.weight.requires_grad


def test_adapters_do_not_stack(base, tmp_path):
    trained(base).save_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"/saved .*spatial-forcing export"):
        LoraStudent(load_student(tmp_path / "saved"), SETTINGS, base=tmp_path / "saved")
