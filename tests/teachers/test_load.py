"""The teacher registry and `load_teacher`."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from spatial_forcing.alignment import Views
from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.teachers import TEACHERS, cards, files, load_teacher
from spatial_forcing.teachers.vggt import VGGT, CameraHeadConfig, DPTConfig, VGGTConfig, loading, save_vggt
from spatial_forcing.teachers.vggt import teacher as teacher_module

CONFIG = VGGTConfig(
    img_size=16,
    patch_size=8,
    embed_dim=16,
    depth=2,
    num_heads=2,
    patch_embed="conv",
    camera=CameraHeadConfig(trunk_depth=1, num_heads=2),
    dpt=DPTConfig(features=8, out_channels=(8, 8, 8, 8), layers=(0, 1, 1, 1), hidden_channels=8),
)


@pytest.fixture
def checkpoint(tmp_path):
    save_vggt(VGGT(CONFIG), tmp_path / "tiny", licence="MIT")
    return tmp_path / "tiny"


@pytest.fixture(autouse=True)
def _nothing_announced(monkeypatch):
    monkeypatch.setattr(cards, "_announced", set())


def test_every_card_names_itself_and_its_licence():
    assert {"facebook/VGGT-1B", "facebook/VGGT-1B-Commercial", "vggt-nano"} <= set(TEACHERS)
    for name, card in TEACHERS.items():
        assert card.name == name
        assert card.licence
        assert card.note
        assert card.commercial_alternative is None or card.commercial_alternative in TEACHERS
    big = TEACHERS["facebook/VGGT-1B"]
    assert (big.licence, big.commercial_alternative) == ("CC-BY-NC-4.0", "facebook/VGGT-1B-Commercial")


@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_a_local_checkpoint_becomes_a_teacher(checkpoint, file):
    path = checkpoint / file if file else checkpoint
    teacher = load_teacher(path, resolution=24, dtype="bf16")
    assert (teacher.name, teacher.licence, teacher.resolution) == (str(path), "MIT", 24)
    assert teacher.features(Views.create(torch.rand(1, 2, 3, 16, 16)))[0].shape == (1, 2, 3, 3, 32)
    assert teacher.model.depth_head is None
    assert load_teacher(path, heads=True).model.depth_head is not None


def test_loading_twice_gives_one_fingerprint(checkpoint):
    assert load_teacher(checkpoint).fingerprint == load_teacher(checkpoint, heads=True).fingerprint


def test_a_checkpoint_without_licence_is_not_given_one(checkpoint):
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace('"licence": "MIT"', '"licence": null'))
    assert load_teacher(checkpoint).licence == "LicenseRef-unknown"


def test_the_licence_is_said_once(checkpoint, caplog):
    with caplog.at_level(logging.WARNING):
        load_teacher(checkpoint)
        load_teacher(checkpoint)
        cards.announce_licence("facebook/VGGT-1B", "CC-BY-NC-4.0")
    first, second = caplog.messages
    assert "weights under MIT" in first
    assert "CC-BY-NC-4.0" in second
    assert "'facebook/VGGT-1B-Commercial'" in second


def test_an_unknown_name_suggests_the_closest():
    with pytest.raises(ConfigError, match=r"unknown teacher 'vgt-nano'.*Did you mean 'vggt-nano'"):
        load_teacher("vgt-nano")
    with pytest.raises(ConfigError, match=r"unknown teacher '\./missing/folder'"):
        load_teacher("./missing/folder")


def test_an_unknown_hub_id_suggests_the_closest(monkeypatch):
    def not_found(repo_id, name):
        raise OSError("404")

    monkeypatch.setattr(files, "hf_hub_download", not_found)
    with pytest.raises(CheckpointError, match=r"'facebook/VGGT-1b'.*404.*Did you mean 'facebook/VGGT-1B'"):
        load_teacher("facebook/VGGT-1b")
    with pytest.raises(CheckpointError, match=r"'facebook/VGGT-1B'.*404"):
        load_teacher("facebook/VGGT-1B")


def test_a_registered_hub_id_uses_its_cards_licence(checkpoint, monkeypatch):
    monkeypatch.setattr(files, "hf_hub_download", lambda repo_id, name: str(checkpoint / name))
    teacher = load_teacher("facebook/VGGT-1B")
    assert (teacher.name, teacher.licence) == ("facebook/VGGT-1B", "CC-BY-NC-4.0")
    assert load_teacher("someone/other").licence == "MIT"


def test_packaged_weights_load_by_name(checkpoint, monkeypatch):
    card = TEACHERS["vggt-nano"]
    monkeypatch.setitem(TEACHERS._entries, "vggt-nano", replace(card, folder=checkpoint))
    teacher = load_teacher("vggt-nano")
    assert (teacher.name, teacher.licence) == ("vggt-nano", "Apache-2.0")
    gone = replace(card, folder=checkpoint / "gone")
    monkeypatch.setitem(TEACHERS._entries, "vggt-nano", gone)
    with pytest.raises(CheckpointError, match=r"'vggt-nano' are not in this installation.*teacher pretrain"):
        load_teacher("vggt-nano")


def test_a_bare_file_of_vggt_1b_counts_as_non_commercial(tmp_path):
    source = loading.Source(tmp_path / "model.pt", VGGTConfig(), None)
    assert teacher_module._licence_of(source) == "CC-BY-NC-4.0"


@pytest.mark.parametrize("dtype", ["fp8", torch.int8])
def test_unknown_dtypes_are_refused(checkpoint, dtype):
    with pytest.raises(ConfigError, match="dtype"):
        load_teacher(checkpoint, dtype=dtype)
