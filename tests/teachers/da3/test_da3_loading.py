"""Checkpoints of Depth Anything 3: the published layout, and every way in which a file can be wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from spatial_forcing.errors import CheckpointError
from spatial_forcing.teachers import files, load_teacher
from spatial_forcing.teachers.da3 import DA3Config, find_da3, load_da3, save_da3
from spatial_forcing.teachers.da3.config import MODELS, NESTED
from spatial_forcing.teachers.da3.loading import ALIASES, published_shapes
from tests.golden import golden
from tests.teachers.da3.small import ANY_VIEW, ONE_VIEW, small

LISTS = {
    "da3-small": "da3_small", "da3-base": "da3_base", "da3-large": "da3_large", "da3-giant": "da3_giant",
    "da3metric-large": "da3metric_large", "da3mono-large": "da3mono_large",
}  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path):
    save_da3(small(), tmp_path / "da3", licence="Apache-2.0")
    return tmp_path / "da3"


@pytest.mark.golden
@pytest.mark.parametrize("name", LISTS)
def test_every_published_key_has_its_shape(name):
    listed = golden(f"{LISTS[name]}_state_dict_keys").config
    found = published_shapes(MODELS[name])
    assert found == {key: tuple(facts["shape"]) for key, facts in listed["keys"].items()}
    lost = {key for key in found if key.startswith(ALIASES)}
    assert lost == set(listed["aliases_not_in_file"])


@pytest.mark.golden
def test_a_file_as_the_original_writes_it_is_read(tmp_path):
    vectors = golden("da3_net_hub")
    save_file(vectors.tensors, tmp_path / "model.safetensors")
    head = {"layers": [5, 7, 9, 11], "features": 16, "out_channels": [8, 12, 16, 16]}
    sizes = DA3Config.from_dict({"embed_dim": 48, "num_heads": 3, "img_size": 70, "head": head}).to_dict()
    settings = vectors.config["config_json"]
    (tmp_path / "config.json").write_text(json.dumps(settings | {"spatial_forcing": sizes}))
    model = load_da3(find_da3(tmp_path))
    for key, value in vectors.tensors.items():
        name = key.removeprefix("model.").replace("backbone.pretrained.", "backbone.")
        assert torch.equal(model.get_parameter(name), value), key


@pytest.mark.parametrize("config", [ANY_VIEW, ONE_VIEW])
@pytest.mark.parametrize("heads", [True, False])
def test_saving_and_loading_keep_the_model(config, heads, tmp_path):
    model = small(config)
    save_da3(model, tmp_path, licence="MIT")
    source = find_da3(tmp_path)
    assert (source.config, source.licence) == (config, "MIT")
    again = load_da3(source, heads=heads).state_dict()
    assert set(again) == {name for name in model.state_dict() if heads or name.startswith("backbone.")}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.items())


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k.removeprefix("model."): v for k, v in w.items()}, r"missing keys: model\.backbone"),
        (lambda w: {f"model.da3.{k.removeprefix('model.')}": v for k, v in w.items()}, "unexpected keys"),
        (lambda w: {k: v for k, v in w.items() if ".3.attn.q_norm" not in k}, r"2 missing keys: .*q_norm"),
        (lambda w: w | {"model.extra": torch.zeros(1)}, r"1 unexpected keys: model\.extra"),
        (lambda w: w | {"model.backbone.pretrained.norm.weight": torch.zeros(5)}, r"norm\.weight is \(5,\)"),
        (lambda w: {k: v for k, v in w.items() if "fc_t.bias" not in k}, r"model\.cam_dec\.fc_t\.bias"),
        (
            lambda w: w | {"model.head.scratch.output_conv2_aux.3.2.weight": torch.zeros(32)},
            r"output_conv2_aux\.3\.2\.weight differs",
        ),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused(checkpoint, change, message):
    rewrite(checkpoint, change)
    with pytest.raises(CheckpointError, match=message):
        load_da3(find_da3(checkpoint))


def test_a_backbone_alone_serves_without_heads(checkpoint):
    rewrite(checkpoint, lambda w: {k: v for k, v in w.items() if k.startswith("model.backbone.")})
    assert load_da3(find_da3(checkpoint), heads=False).head is None
    with pytest.raises(CheckpointError, match=r"model\.head\."):
        load_da3(find_da3(checkpoint))


def test_a_truncated_file_is_refused(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        load_da3(find_da3(checkpoint))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_name": "da3-huge"}, r"'da3-huge'; known are da3-small"),
        ({}, "model_name is None"),
        ({"model_name": NESTED}, "DA3-GIANT .* or depth-anything/DA3METRIC-LARGE"),
        ({"model_name": "da3-own", "spatial_forcing": {"embed_dimm": 3}}, "Did you mean 'embed_dim'"),
    ],
)
def test_a_config_that_says_too_little_is_refused(checkpoint, settings, message):
    (checkpoint / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        find_da3(checkpoint)


def test_without_a_config_the_remedy_is_named(checkpoint):
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match='"model_name": NAME'):
        find_da3(checkpoint)


def test_a_hub_id_is_fetched_once_and_read(checkpoint, monkeypatch):
    fetched = []

    def fetch(repo_id, name):
        fetched.append((repo_id, name))
        return str(checkpoint / name)

    monkeypatch.setattr(files, "hf_hub_download", fetch)
    assert find_da3("someone/da3", on_hub=True).config == ANY_VIEW
    assert fetched == [("someone/da3", "config.json"), ("someone/da3", "model.safetensors")]


def test_a_gated_or_missing_repository_names_the_remedy(monkeypatch):
    def refuse(repo_id, name):
        raise OSError(f"401 Client Error for {repo_id}")

    monkeypatch.setattr(files, "hf_hub_download", refuse)
    with pytest.raises(CheckpointError, match=r"'depth-anything/DA3-BASE'.*hf auth login"):
        load_teacher("depth-anything/DA3-BASE")


def test_a_folder_is_a_teacher(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    teacher = load_teacher(tmp_path / "copy")
    assert (teacher.name, teacher.licence, teacher.dim, teacher.depth) == (
        str(tmp_path / "copy"), "Apache-2.0", 64, 6,
    )  # fmt: skip
