"""The published layout: keys, heads, statistics, shards, and what is said when something is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from spatial_forcing.commands.evaluate import suite_statistics
from spatial_forcing.commands.train import ExportOptions, export
from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.serving.policy import load_policy
from spatial_forcing.students import NanoConfig, NanoVLA, load_student, statistics_names
from spatial_forcing.students.openvla_oft import OpenVLAOFT, OpenVLAOFTConfig, files, keys
from spatial_forcing.students.openvla_oft.checkpoint import (
    find_components,
    inspect_heads,
    merged_adapters,
)
from spatial_forcing.students.openvla_oft.heads import L1ActionHead, ProprioProjector
from spatial_forcing.students.parity import example_observations
from tests.golden import golden
from tests.students.openvla_oft.small import SIZES, small, small_config, small_tokenizer

VOCAB = 32064
"""The prompt ends with token 29871."""


def bounds(dim, mask=None):
    found = {"q01": [-1.0] * dim, "q99": [2.0] * dim, "min": [-3.0] * dim, "max": [3.0] * dim}
    return found | ({"mask": mask} if mask else {})


def published(folder, step="150000", prefix="module.", sections=True, **settings):
    """Write a tiny student as the released code does: sharded, old head names, no section of ours.

    The sizes have to be told (timm's names imply them): a section with nothing else.
    """
    defaults = {"gripper": "libero", "state_dim": 8, "action_dim": 7, "chunk": 8}
    defaults |= {"tokenizer": "file", "vocab": VOCAB}
    config = small_config(**{**defaults, **settings})
    student = OpenVLAOFT(config, small_tokenizer(), seed=1)
    with torch.no_grad():  # published towers have no position at the class token
        student.vision.dino.embeddings.position_embeddings[:, 0] = 0
    student.unused = keys.fresh_unused(config, torch.float32)
    student.unused["vision_backbone.fused_featurizer.attn_pool.latent"] += 0.5
    student.save_pretrained(folder)
    shards = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_torch_state_dict(shards, folder, max_shard_size="500KB")
    for name in ("action_head", "proprio_projector"):
        old = folder / f"{name}--latest_checkpoint.pt"
        if old.exists():
            state = {prefix + k.removeprefix("module."): v for k, v in torch.load(old).items()}
            torch.save(state, folder / f"{name}--{step}_checkpoint.pt")
            old.unlink() if step != "latest" else None
    stored = json.loads((folder / "config.json").read_text())
    told = {
        **SIZES,
        "vocab": VOCAB,
        "tokenizer": "file",
        "cameras": list(config.cameras),
        "center_crop": False,
        "jpeg": False,
    }
    told |= {"dtype": "float32", "head_dtype": "float32"}
    stored["spatial_forcing"] = told
    (folder / "config.json").write_text(json.dumps(stored))
    statistics = {
        "libero_spatial_no_noops": {"action": bounds(7, [True] * 6 + [False]), "proprio": bounds(8)}
    }
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics))
    return student


def actions(student):
    return student.act(example_observations(student.config))


@pytest.mark.golden
def test_all_published_keys_are_mapped():
    """982 keys and the heads of the 7 B model, in names and shapes, without weights."""
    vectors = golden("openvla_7b_state_dict_keys").config
    config = OpenVLAOFTConfig(tokenizer="words")
    with torch.device("meta"):
        student = OpenVLAOFT(config)
    own = dict(student.named_parameters())
    found = keys.unused_shapes(config)
    used = set()
    for entry in keys.entries(config, own):
        found[entry.published] = entry.shape([tuple(own[name].shape) for name in entry.ours])
        used |= set(entry.ours)
    assert found == {key: tuple(value["shape"]) for key, value in vectors["keys"].items()}
    assert len(found) == vectors["n_keys"] == 982
    heads = {name for name in own if name.startswith(("action_head.", "proprio_projector."))}
    assert own.keys() - used - heads == {"vision.dino.embeddings.mask_token"}
    assert sum(torch.Size(shape).numel() for shape in found.values()) == vectors["n_params"]


@pytest.mark.golden
def test_published_heads_are_mapped():
    extra = golden("openvla_7b_state_dict_keys").config["extra_modules"]
    with torch.device("meta"):
        modules = {"action_head_L1": L1ActionHead(4096, 7), "proprio_projector": ProprioProjector(8, 4096)}
    for name, module in modules.items():
        stored = {k.removeprefix("module."): tuple(v["shape"]) for k, v in extra[name]["keys"].items()}
        assert stored == {k: tuple(v.shape) for k, v in module.state_dict().items()}


@pytest.mark.parametrize(("step", "prefix"), [("150000", "module."), ("latest", "module."), ("50000", "")])
def test_a_published_checkpoint_is_read(tmp_path, step, prefix):
    original = published(tmp_path, step, prefix)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    student = load_student(tmp_path)
    assert isinstance(student, OpenVLAOFT)
    config = student.config
    assert (config.head, config.chunk, config.action_dim, config.state_dim) == ("l1", 8, 7, 8)
    assert student.dataset_name == "libero_spatial_no_noops"
    assert student.action_bounds.high.tolist() == [2.0] * 7
    assert student.action_bounds.mask.tolist() == [True] * 6 + [False]
    for name, value in original.state_dict().items():
        if "bounds" not in name and "mask_token" not in name:
            torch.testing.assert_close(student.state_dict()[name], value, msg=name, atol=1e-7, rtol=0)
    assert not any(p.is_meta for p in student.parameters())
    assert set(actions(student)[..., -1].unique().tolist()) <= {-1.0, 1.0}


def test_what_is_written_is_the_published_layout_again(tmp_path):
    published(tmp_path / "base")
    student = OpenVLAOFT.from_pretrained(tmp_path / "base")
    student.save_pretrained(tmp_path / "out")
    shards = {}
    for path in (tmp_path / "base").glob("model-*.safetensors"):
        shards |= load_file(path)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == shards.keys()
    assert all(torch.equal(written[key], shards[key]) for key in shards)
    assert float(written["vision_backbone.fused_featurizer.attn_pool.latent"].mean()) == 0.5
    head = torch.load(tmp_path / "out" / "action_head--latest_checkpoint.pt", weights_only=True)
    assert all(key.startswith("module.model.") for key in head)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == small_tokenizer()
    assert torch.equal(actions(load_student(tmp_path / "out")), actions(student))
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (stored["model_type"], stored["text_config"]["hidden_size"]) == ("openvla", 32)


def test_the_original_openvla_has_no_heads_and_many_statistics(tmp_path):
    published(tmp_path, state_dim=0, head="tokens", decoding="autoregressive", chunk=1)
    statistics = {name: {"action": bounds(7)} for name in ("bridge_orig", "libero_goal")}
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(statistics))
    with pytest.raises(CheckpointError, match=r"2 datasets and none was chosen.*bridge_orig, libero_goal"):
        OpenVLAOFT.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no statistics of 'libero_gaol'\. Did you mean 'libero_goal'"):
        OpenVLAOFT.from_pretrained(tmp_path, statistics="libero_gaol")
    student = OpenVLAOFT.from_pretrained(tmp_path, statistics="libero_goal")
    assert (student.config.decoding, student.config.chunk) == ("autoregressive", 1)
    assert actions(student).shape == (4, 1, 7)


def test_statistics_in_the_configuration_are_found(tmp_path):
    published(tmp_path)
    statistics = (tmp_path / "dataset_statistics.json").read_text()
    (tmp_path / "dataset_statistics.json").unlink()
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, "norm_stats": json.loads(statistics)}))
    assert OpenVLAOFT.from_pretrained(tmp_path).dataset_name == "libero_spatial_no_noops"
    (tmp_path / "config.json").write_text(json.dumps({**stored, "norm_stats": None}))
    with pytest.raises(CheckpointError, match="0 datasets"):
        OpenVLAOFT.from_pretrained(tmp_path)


def test_fine_tuning_a_base_without_heads_makes_new_ones(tmp_path):
    published(tmp_path, state_dim=0, head="tokens", decoding="autoregressive", chunk=1)
    stats = {
        "action": {"q01": [-1] * 7, "q99": [1] * 7},
        "observation.state": {"q01": [0] * 5, "q99": [1] * 5},
    }
    config = small_config(state_dim=5, action_dim=7, chunk=4, tokenizer="file", film=True, vocab=VOCAB)
    one, again = (OpenVLAOFT.fine_tune(tmp_path, config, stats, seed=s) for s in (3, 3))
    other = OpenVLAOFT.fine_tune(tmp_path, config, stats, seed=4)
    key = "action_head.model.fc1.weight"
    assert torch.equal(one.state_dict()[key], again.state_dict()[key])
    assert not torch.equal(one.state_dict()[key], other.state_dict()[key])
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert not any(p.is_meta for p in one.parameters())
    assert not bool(one.vision.dino.layers[0].scale.weight.any())
    one.save_pretrained(tmp_path / "out")
    assert torch.equal(actions(load_student(tmp_path / "out")), actions(one))
    with pytest.raises(CheckpointError, match="width: 32 there, 64 asked for"):
        OpenVLAOFT.fine_tune(tmp_path, small_config(width=64, vocab=VOCAB), stats)


def test_released_film_files_hold_unmerged_adapters():
    name = "vision_backbone.featurizer.blocks.0.block.attn.proj"
    weight, a, b = torch.randn(4, 4), torch.randn(32, 4), torch.randn(4, 32)
    stored = {
        f"{name}.base_layer.weight": weight,
        f"{name}.base_layer.bias": torch.ones(4),
        f"{name}.lora_A.default.weight": a,
        f"{name}.lora_B.default.weight": b,
        "vision_backbone.featurizer.blocks.0.scale.weight": torch.ones(2, 2),
    }
    plain = merged_adapters(stored)
    assert sorted(plain) == [
        "vision_backbone.featurizer.blocks.0.attn.proj.bias",
        "vision_backbone.featurizer.blocks.0.attn.proj.weight",
        "vision_backbone.featurizer.blocks.0.scale.weight",
    ]
    torch.testing.assert_close(
        plain["vision_backbone.featurizer.blocks.0.attn.proj.weight"], weight + b @ a / 2
    )


def damage(folder, how):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / sorted(set(index["weight_map"].values()))[1]
    if how == "absent shard":
        shard.unlink()
    elif how == "half shard":
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    elif how == "shape":
        state = load_file(shard)
        key = sorted(state)[0]
        save_file({**state, key: torch.zeros(3, 3, 3)}, shard, metadata={"format": "pt"})
    elif how == "keys":
        index["weight_map"]["language_model.model.layers.9.mlp.up_proj.weight"] = shard.name
        index["weight_map"].pop("projector.fc1.bias")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "head":
        head = folder / "action_head--150000_checkpoint.pt"
        head.write_bytes(head.read_bytes()[:100])
    elif how == "head shape":
        torch.save(L1ActionHead(32, 5).state_dict(), folder / "action_head--150000_checkpoint.pt")
        (folder / "proprio_projector--150000_checkpoint.pt").unlink()
    elif how == "steps":
        head = folder / "action_head--150000_checkpoint.pt"
        head.rename(folder / "action_head--100000_checkpoint.pt")
    elif how == "tokenizer":
        (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("absent shard", r"lacks model-00002-of-.*the download is incomplete"),
        ("half shard", r"model-00002-of-.*is damaged or truncated"),
        ("shape", r"model-00002-of-.*is \(3, 3, 3\), and this configuration takes"),
        ("keys", r"1 keys missing \(projector.fc1.bias\), 1 unexpected \(language_model.model.layers.9"),
        ("head", "action_head--150000_checkpoint.pt is damaged"),
        ("head shape", "expected 5 finite numbers"),
        ("steps", "heads of different steps"),
        ("tokenizer", "tokenizer.json is missing"),
    ],
)
def test_bad_checkpoints_are_explained(tmp_path, how, message):
    published(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(CheckpointError, match=message):
        OpenVLAOFT.from_pretrained(tmp_path)


def test_heads_that_do_not_fit_the_settings_are_refused(tmp_path):
    student = small()
    student.save_pretrained(tmp_path)
    torch.save(L1ActionHead(32, 5).state_dict(), tmp_path / "action_head--latest_checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"model.fc2.weight.*\(5, 32\) stored, \(3, 32\) expected"):
        OpenVLAOFT.from_pretrained(tmp_path)


def test_other_models_are_refused(tmp_path):
    published(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["vision_backbone_id"] = "siglip-vit-so400m"
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=r"siglip-vit-so400m.*this student reads"):
        OpenVLAOFT.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"/no/where/at all "):
        OpenVLAOFT.from_pretrained(tmp_path / "no" / "where" / "at all")


def test_hub_ids_are_fetched_or_explained(tmp_path, monkeypatch):
    published(tmp_path / "there")
    asked = []

    def fetch(repo, allow_patterns):
        asked.append(repo)
        if repo == "owner/absent":
            raise LocalEntryNotFoundError("offline")
        return str(tmp_path / "there")

    monkeypatch.setattr(files, "snapshot_download", fetch)
    assert OpenVLAOFT.from_pretrained("owner/name").config.chunk == 8
    with pytest.raises(CheckpointError, match=r"owner/absent .*cannot be fetched from the hub"):
        OpenVLAOFT.from_pretrained("owner/absent")
    assert asked == ["owner/name", "owner/absent"]


def test_aloha_heads_tell_their_constants(tmp_path):
    torch.save(L1ActionHead(32, 14).state_dict(), tmp_path / "action_head--50_checkpoint.pt")
    torch.save(ProprioProjector(14, 32).state_dict(), tmp_path / "proprio_projector--50_checkpoint.pt")
    found = inspect_heads(tmp_path, find_components(tmp_path))
    assert (found["action_dim"], found["chunk"], found["norm"], found["state_dim"]) == (14, 25, "min_max", 14)
    assert len(found["cameras"]) == 3


SUITES = ("libero_spatial_no_noops", "libero_goal_no_noops", "bridge_orig")


def several(folder):
    """A checkpoint that was trained on several suites."""
    published(folder)
    statistics = {}
    for number, name in enumerate(SUITES):
        statistics[name] = {"action": bounds(7, [True] * 6 + [False]), "proprio": bounds(8)}
        statistics[name]["action"]["q99"] = [2.0 + number] * 7
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics))
    return folder


def test_statistics_are_chosen_by_name_or_by_suite(tmp_path):
    folder = several(tmp_path / "policy")
    assert statistics_names(folder) == SUITES
    goal = load_student(folder, statistics="libero_goal_no_noops")
    assert goal.action_bounds.high.tolist() == [3.0] * 7
    assert suite_statistics(folder, ["libero_spatial-0", "libero_spatial-3"]) == SUITES[0]
    assert suite_statistics(folder, ["libero_goal-1"]) == SUITES[1]
    for tasks in (["libero_10-0"], ["libero_goal-1", "libero_spatial-0"]):
        with pytest.raises(ConfigError, match=r"bridge_orig.*--statistics"):
            suite_statistics(folder, tasks)
    with pytest.raises(CheckpointError, match="libero_goal_no_noops"):
        load_student(folder, statistics="libero_gaol")


def test_serving_and_export_take_the_statistics(tmp_path):
    folder = several(tmp_path / "policy")
    with pytest.raises(
        CheckpointError, match=r"3 datasets.*bridge_orig, libero_goal_no_noops, libero_spatial_no_noops"
    ):
        load_policy(folder)
    served = load_policy(folder, statistics="bridge_orig")
    assert served.student.action_bounds.high.tolist() == [4.0] * 7
    export(ExportOptions(folder, tmp_path / "out", statistics="bridge_orig"))
    assert statistics_names(tmp_path / "out") == ("bridge_orig",)
    assert load_student(tmp_path / "out").action_bounds.high.tolist() == [4.0] * 7


def test_a_policy_with_statistics_of_its_own_offers_no_choice(tmp_path):
    NanoVLA(NanoConfig(("front",), image_size=16, patch_size=8, width=32, depth=1, heads=2)).save_pretrained(
        tmp_path
    )
    assert statistics_names(tmp_path) == ()
    assert suite_statistics(tmp_path, ["reach-v3"]) is None
    with pytest.raises(CheckpointError, match="'bridge'"):
        load_student(tmp_path, statistics="bridge")


@pytest.mark.parametrize("prefix", ["module."])
def test_a_head_that_is_stored_twice_and_differs_is_refused(tmp_path, prefix):
    published(tmp_path)
    path = tmp_path / "action_head--150000_checkpoint.pt"
    state = torch.load(path)
    name = next(iter(state)).removeprefix(prefix)
    torch.save(state | {name: state[prefix + name] + 1}, path)
    with pytest.raises(CheckpointError, match=rf"{name}.*differ"):
        OpenVLAOFT.from_pretrained(tmp_path)
