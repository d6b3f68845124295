"""LoRA on OpenVLA-OFT: training, adapter-only checkpoints, merged export, published adapters."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

from spatial_forcing.errors import CheckpointError
from spatial_forcing.forcing import ForcingConfig, SpatialForcing
from spatial_forcing.students import LoraSettings, LoraStudent, OpenVLAOFT, load_student, merge
from spatial_forcing.students.lora import adapted_layers
from spatial_forcing.students.openvla_oft.adapters import load_adapters
from spatial_forcing.students.parity import example_observations, merge_checked
from tests.fakes import FakeTeacher, fake_batch
from tests.students.openvla_oft.small import small, small_config

STATS = {
    "action": {"q01": [-2.0] * 3, "q99": [2.0] * 3},
    "observation.state": {"q01": [-1.0] * 4, "q99": [1.0] * 4},
}


@pytest.fixture
def base(tmp_path):
    small(seed=2, head="tokens", decoding="autoregressive", chunk=1, state_dim=0).save_pretrained(
        tmp_path / "base"
    )
    return tmp_path / "base"


def trained(base, steps=2, **settings):
    student = OpenVLAOFT.fine_tune(base, small_config(**settings), STATS)
    student = LoraStudent(student, LoraSettings(rank=4), base=base)
    forcing = SpatialForcing(student, FakeTeacher(), ForcingConfig(pairs=((2, -1),)))
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        forcing(fake_batch(seed=step))[0].backward()
        assert all(p.grad is not None for n, p in student.named_parameters() if p.requires_grad), step
        optimizer.step()
        optimizer.zero_grad()
    return student


def actions(student):
    return student.act(example_observations(student.config))


@pytest.mark.parametrize("settings", [{}, {"film": True}, {"gradient_checkpointing": True}])
def test_every_layer_that_runs_has_an_adapter_and_a_gradient(base, settings):
    student = trained(base, **settings)
    names = adapted_layers(student)
    for part in ("vision.dino.layers.0", "vision.siglip.layers.1", "projector.fc2", "llm.layers.2.self_attn"):
        assert any(name.startswith(part) for name in names), part
    assert not any(name.startswith(("lm_head", "action_head", "proprio_projector")) for name in names)


def test_the_run_is_saved_as_adapters_and_exported_in_the_published_layout(base, tmp_path):
    student = trained(base)
    student.save_pretrained(tmp_path / "run")
    assert not list((tmp_path / "run").glob("model*.safetensors"))
    again = load_student(tmp_path / "run")
    assert torch.equal(actions(again), actions(student))
    policy, parity = merge_checked(again)
    assert parity.relative < 1e-4
    policy.save_pretrained(tmp_path / "merged")
    exported = load_student(tmp_path / "merged")
    assert type(exported) is OpenVLAOFT
    torch.testing.assert_close(actions(exported), actions(student), atol=1e-4, rtol=1e-3)
    assert exported.state_dict().keys() == small().state_dict().keys()
    assert not torch.equal(exported.projector.fc1.weight, load_student(base).projector.fc1.weight)


def test_a_gripper_on_the_edge_is_no_reason_to_refuse_a_merge(base):
    """Rounding may flip what is binarised; parity looks at the numbers before."""
    student = trained(base, gripper="libero", action_dim=3)
    with torch.no_grad():
        head = student.policy.action_head.model.fc2
        head.weight[-1] *= 1e-6
        head.bias[-1] = 0.5
    _, parity = merge_checked(student)
    assert parity.relative < 1e-4


def published_adapters(folder, config, rank=4):
    """A `lora_adapter` folder as the released code leaves it: fused qkv, unused blocks included."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"projector.fc1": (4 * 28, 28), "projector.fc2": (32, 4 * 28), "projector.fc3": (32, 32)}
    for i in range(config.depth):
        root = f"language_model.model.layers.{i}."
        shapes |= {f"{root}self_attn.{p}_proj": (32, 32) for p in "qkvo"}
        shapes |= {f"{root}mlp.{p}_proj": (48, 32) for p in ("gate", "up")}
        shapes[f"{root}mlp.down_proj"] = (32, 48)
    for tower, (width, depth, _, mlp) in (("featurizer", config.dino), ("fused_featurizer", config.siglip)):
        for i in range(depth):
            root = f"vision_backbone.{tower}.blocks.{i}."
            shapes |= {f"{root}attn.qkv": (3 * width, width), f"{root}attn.proj": (width, width)}
            shapes |= {f"{root}mlp.fc1": (mlp, width), f"{root}mlp.fc2": (width, mlp)}
    state = {}
    for name, (rows, columns) in shapes.items():
        state[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        state[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    (folder / "lora_adapter").mkdir(parents=True)
    save_file(state, folder / "lora_adapter" / "adapter_model.safetensors")
    (folder / "lora_adapter" / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": 2}))
    student = OpenVLAOFT(config, seed=9)
    for name in ("action_head", "proprio_projector"):
        content = {f"module.{k}": v for k, v in getattr(student, name).state_dict().items()}
        torch.save(content, folder / f"{name}--10_checkpoint.pt")
    entry = {f: {"q01": [-1.0] * n, "q99": [1.0] * n} for f, n in (("action", 3), ("proprio", 4))}
    (folder / "dataset_statistics.json").write_text(json.dumps({"some_dataset": entry}))
    return state


def test_published_adapters_are_loaded_unmerged_and_merge_to_the_fused_sum(base, tmp_path):
    config = small_config()
    state = published_adapters(tmp_path / "run", config)
    student = load_adapters(tmp_path / "run", base, config)
    before = load_student(base).state_dict()
    unmerged = actions(student)
    policy = merge(student)
    root = "base_model.model.vision_backbone.featurizer.blocks.0.attn.qkv.lora_"
    fused = state[f"{root}B.weight"] @ state[f"{root}A.weight"] * (2 / 4)
    name = "vision.dino.layers.0.attention.{}_proj.weight"
    parts = [policy.state_dict()[name.format(p)] - before[name.format(p)] for p in "qkv"]
    torch.testing.assert_close(torch.cat(parts), fused, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(actions(policy), unmerged, atol=1e-4, rtol=1e-3)
    assert policy.dataset_name == "some_dataset"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("base_model.model.projector.fc1.lora_A.weight"), "1 adapters missing"),
        (lambda s: s.update({"base_model.model.other.lora_A.weight": torch.zeros(4, 2)}), "1 unexpected"),
        (
            lambda s: s.update({"base_model.model.projector.fc1.lora_A.weight": torch.zeros(4, 2)}),
            "does not fit projector.fc1",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_named(base, tmp_path, edit, message):
    state = published_adapters(tmp_path / "run", small_config())
    edit(state)
    save_file(state, tmp_path / "run" / "lora_adapter" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_adapters(tmp_path / "run", base, small_config())


def test_the_configuration_survives_json(base, tmp_path):
    student = trained(base, steps=1)
    student.save_pretrained(tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["student"]
    assert stored.pop("model_type") == "openvla"
    assert type(student.config)(**stored) == student.config
    assert stored.keys() == asdict(student.config).keys()
