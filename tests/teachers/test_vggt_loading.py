"""Checkpoints in the published layout: key map, reading, writing, and damaged files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.teachers import files
from spatial_forcing.teachers.vggt import (
    VGGT,
    CameraHeadConfig,
    DinoV2Config,
    DPTConfig,
    VGGTConfig,
    find_local,
    load_vggt,
    loading,
    save_vggt,
)
from spatial_forcing.teachers.vggt.keys import (
    check_keys,
    key_map,
    published_name,
    published_shapes,
    to_published,
)
from tests.golden import golden

TINY = VGGTConfig(
    img_size=28,
    embed_dim=32,
    depth=2,
    num_heads=4,
    patch_embed="dinov2",
    dinov2=DinoV2Config(depth=2, num_heads=4, num_register_tokens=2),
    camera=CameraHeadConfig(trunk_depth=1, num_heads=4),
    dpt=DPTConfig(features=8, out_channels=(8, 8, 8, 8), layers=(0, 1, 1, 1), hidden_channels=8),
)


@pytest.fixture(scope="module")
def model() -> VGGT:
    torch.manual_seed(0)
    model = VGGT(TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture
def folder(model, tmp_path):
    save_vggt(model, tmp_path / "tiny", licence="Apache-2.0")
    return tmp_path / "tiny"


@pytest.fixture(scope="module")
def published() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the real VGGT-1B."""
    keys = golden("vggt_1b_state_dict_keys").config["keys"]
    return {key: tuple(facts["shape"]) for key, facts in keys.items()}


@pytest.mark.golden
def test_the_key_map_covers_all_of_vggt_1b(published):
    facts = golden("vggt_1b_state_dict_keys").config
    ours = published_shapes(VGGTConfig())
    assert ours == published
    assert len(ours) == facts["n_keys"] == 1797
    assert sum(key.startswith("track_head.") for key in ours) == 394
    assert sum(torch.Size(shape).numel() for shape in ours.values()) == facts["n_params"]
    check_keys(published, VGGTConfig(), heads=True, where="VGGT-1B")


@pytest.mark.golden
def test_the_aggregator_alone_takes_1210_keys(published):
    facts = golden("vggt_1b_state_dict_keys").config
    with torch.device("meta"):
        bare = VGGT(VGGTConfig(), heads=False)
    taken = key_map(bare.state_dict())
    assert len(taken) == facts["n_keys_aggregator_only"] == 1210
    assert sum(p.numel() for p in bare.parameters()) == facts["n_params_aggregator_only"]
    alone = {key: published[key] for key in taken}
    check_keys(alone, VGGTConfig(), heads=False, where="aggregator.safetensors")
    with pytest.raises(CheckpointError, match=r"193 missing keys: camera_head\."):
        check_keys(alone, VGGTConfig(), heads=True, where="aggregator.safetensors")


@pytest.mark.golden
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(
    ("group", "count"),
    [("track_head.", 3), ("aggregator.global_blocks.7.", 20), ("camera_head.trunk.2.", 14)],
)
def test_missing_keys_of_vggt_1b_are_listed(published, group, count, heads):
    lost = [key for key in published if key.startswith(group)][:count]
    found = {key: shape for key, shape in published.items() if key not in lost}
    with pytest.raises(CheckpointError, match=rf"{len(lost)} missing keys: {lost[0]}") as caught:
        check_keys(found, VGGTConfig(), heads=heads, where="x")
    listed = [key for key in lost if key in str(caught.value)]
    assert listed == lost[:12]
    assert ("..." in str(caught.value)) == (len(lost) > 12)


@pytest.mark.golden
def test_surplus_keys_and_wrong_shapes_of_vggt_1b_are_listed(published):
    with pytest.raises(CheckpointError, match=r"1 unexpected keys: track_head\.extra"):
        check_keys(published | {"track_head.extra": (1,)}, VGGTConfig(), heads=False, where="x")
    wrong = {"track_head.tracker.ffeat_norm.weight": (3,), "aggregator.camera_token": (1, 2, 1, 8)}
    with pytest.raises(CheckpointError, match="2 wrong shapes") as caught:
        check_keys(published | wrong, VGGTConfig(), heads=False, where="x")
    assert "track_head.tracker.ffeat_norm.weight is (3,), expected (128,)" in str(caught.value)


@pytest.mark.parametrize("layer", ["attention.q_proj", "attention.attention.query"])
def test_both_spellings_of_transformers_attention_are_known(layer):
    name = published_name(f"aggregator.patch_embed.model.encoder.layer.3.{layer}.weight")
    assert name == "aggregator.patch_embed.blocks.3.attn.qkv.weight"
    output = "attention.o_proj" if "q_proj" in layer else "attention.output.dense"
    name = published_name(f"aggregator.patch_embed.model.encoder.layer.3.{output}.bias")
    assert name == "aggregator.patch_embed.blocks.3.attn.proj.bias"


@pytest.mark.parametrize("kind", ["folder", "safetensors", "pt", "pt folder"])
@pytest.mark.parametrize("heads", [False, True])
def test_what_was_saved_is_loaded(model, folder, kind, heads):
    path = folder
    if kind == "safetensors":
        path = folder / "model.safetensors"
    elif kind.startswith("pt"):
        torch.save(load_file(folder / "model.safetensors"), folder / "model.pt")
        (folder / "model.safetensors").unlink()
        path = folder if kind == "pt folder" else folder / "model.pt"
    source = find_local(path)
    assert source.config == TINY
    assert source.licence == "Apache-2.0"
    loaded = load_vggt(source, heads=heads).eval()
    images = torch.rand(1, 2, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(loaded.aggregator(images)[0], model.aggregator(images)[0])
        if heads:
            for name, values in model(images).items():
                assert torch.equal(loaded(images)[name], values)
    expected = {k: v for k, v in to_published(model).items() if heads or k.startswith("aggregator.")}
    stored = to_published(loaded)
    assert set(stored) == set(expected)
    assert all(torch.equal(stored[key], expected[key]) for key in expected)
    assert not any(parameter.is_meta for parameter in loaded.parameters())


def test_half_precision_storage_loads_as_float32(model, tmp_path):
    save_vggt(model, tmp_path, licence="Apache-2.0", dtype=torch.float16)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    loaded = load_vggt(find_local(tmp_path))
    for key, tensor in to_published(loaded).items():
        assert torch.equal(tensor, to_published(model)[key].half().float())


def test_an_aggregator_only_file_loads_without_heads(folder):
    weights = load_file(folder / "model.safetensors")
    alone = {key: tensor for key, tensor in weights.items() if key.startswith("aggregator.")}
    save_file(alone, folder / "model.safetensors")
    load_vggt(find_local(folder), heads=False)
    with pytest.raises(CheckpointError, match="missing keys: camera_head"):
        load_vggt(find_local(folder), heads=True)


def test_missing_and_surplus_keys_in_a_file_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["depth_head.norm.weight"]
    weights["depth_head.norm.scale"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_vggt(find_local(folder), heads=False)
    assert "1 missing keys: depth_head.norm.weight" in str(caught.value)
    assert "1 unexpected keys: depth_head.norm.scale" in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("kind", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_refused(folder, kind, share):
    if kind == "model.pt":
        torch.save(load_file(folder / "model.safetensors"), folder / "model.pt")
        (folder / "model.safetensors").unlink()
    content = (folder / kind).read_bytes()
    (folder / kind).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=rf"tiny/{kind}"):
        load_vggt(find_local(folder))


def test_a_nested_pt_file_is_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"model": {"aggregator.camera_token": torch.zeros(1)}}, folder / "model.pt")
    with pytest.raises(CheckpointError, match=r"tiny/model\.pt"):
        load_vggt(find_local(folder))


def test_without_a_config_vggt_1b_is_assumed_and_said(folder):
    (folder / "config.json").unlink()
    source = find_local(folder / "model.safetensors")
    assert source.config == VGGTConfig()
    with pytest.raises(CheckpointError, match="VGGT-1B is assumed"):
        load_vggt(source)


@pytest.mark.parametrize("content", ["{", "[1]", '{"depht": 3}', '{"dpt": 3}'])
def test_a_malformed_config_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json is not a VGGT config"):
        find_local(folder)


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"/nowhere "):
        find_local(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds neither"):
        find_local(tmp_path)


def test_a_failed_save_leaves_the_old_checkpoint(model, folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def full_disk(weights, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(loading, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_vggt(model, folder, licence="MIT")
    assert (folder / "model.safetensors").read_bytes() == before
    assert json.loads((folder / "config.json").read_text())["licence"] == "Apache-2.0"


def test_a_model_without_its_heads_is_not_saved(tmp_path):
    bare = VGGT(TINY, heads=False)
    with pytest.raises(ConfigError, match="camera head"):
        save_vggt(bare, tmp_path, licence="MIT")
    none = replace(TINY, enable_camera=False, enable_depth=False, enable_point=False)
    save_vggt(VGGT(none), tmp_path, licence="MIT")
    assert load_vggt(find_local(tmp_path)).camera_head is None


def test_hub_files_are_found_and_safetensors_preferred(folder, monkeypatch):
    asked = []

    def download(repo_id, name):
        asked.append((repo_id, name))
        if not (folder / name).exists():
            raise EntryNotFoundError(name)
        return str(folder / name)

    monkeypatch.setattr(files, "hf_hub_download", download)
    source = loading.find_on_hub("someone/vggt")
    assert asked == [("someone/vggt", "config.json"), ("someone/vggt", "model.safetensors")]
    assert source.config == TINY
    torch.save(load_file(folder / "model.safetensors"), folder / "model.pt")
    (folder / "model.safetensors").unlink()
    assert loading.find_on_hub("someone/vggt").weights == folder / "model.pt"
    (folder / "model.pt").unlink()
    with pytest.raises(CheckpointError, match="holds neither"):
        loading.find_on_hub("someone/vggt")


def test_no_connection_is_said(monkeypatch):
    def offline(repo_id, name):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(files, "hf_hub_download", offline)
    with pytest.raises(
        CheckpointError, match=r"cannot get 'facebook/VGGT-1B'.*no connection.*give the folder"
    ):
        loading.find_on_hub("facebook/VGGT-1B")
