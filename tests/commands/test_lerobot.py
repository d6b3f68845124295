"""`spatial-forcing lerobot` on files alone; the plugin's tests do it with LeRobot's policies."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from spatial_forcing.commands.lerobot import (
    FAMILIES,
    NOT_ALIGNED,
    ExportOptions,
    InitOptions,
    export,
    init,
    list_policies,
)
from spatial_forcing.errors import CheckpointError, ConfigError

CONFIG = {"type": "pi05", "chunk_size": 50, "input_features": {}}
WEIGHTS = {"model.a": torch.arange(6.0).bfloat16(), "model.b": torch.ones(2, 3)}
PROJECTOR = {"model.spatial_forcing.projector.fc1.weight": torch.ones(4)}


@pytest.fixture
def stock(tmp_path):
    folder = tmp_path / "stock"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "policy_preprocessor.json").write_text("{}")
    save_file(WEIGHTS, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_every_policy_is_listed_with_its_tap_or_the_reason(capsys):
    list_policies()
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    assert not set(FAMILIES) & set(NOT_ALIGNED)
    for name, tapped in FAMILIES.items():
        assert f"{name}_sf {tapped}" in words
    for name, reason in NOT_ALIGNED.items():
        assert f"{name} {reason}" in words


def test_there_and_back(stock, tmp_path):
    init(InitOptions(str(stock), tmp_path / "sf", alpha=0.2, teacher="vggt-nano", cache=tmp_path / "cache"))
    written = json.loads((tmp_path / "sf" / "config.json").read_text())
    assert written["type"] == "pi05_sf"
    assert written["forcing"] == {
        "alpha": 0.2,
        "teacher": "vggt-nano",
        "cache": str(tmp_path / "cache"),
    }
    trained = {**WEIGHTS, **PROJECTOR}
    save_file(trained, tmp_path / "sf" / "model.safetensors", metadata={"format": "pt"})
    training = {"policy": written, "steps": 5}
    (tmp_path / "sf" / "train_config.json").write_text(json.dumps(training))
    export(ExportOptions(tmp_path / "sf", tmp_path / "back"))
    for name in ("config.json", "policy_preprocessor.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((stock / name).read_text())
    assert json.loads((tmp_path / "back" / "train_config.json").read_text())["policy"] == CONFIG
    with safe_open(tmp_path / "back" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(WEIGHTS)
        assert file.metadata() == {"format": "pt"}
        for name, value in WEIGHTS.items():
            assert file.get_tensor(name).dtype == value.dtype
            assert torch.equal(file.get_tensor(name), value)


def test_adapters_lose_the_projector_too(stock, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "type": "pi05_sf", "forcing": {}}))
    saved = ["model.state_proj", "spatial_forcing.projector", "spatial_forcing.steps"]
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "modules_to_save": saved}))
    prefix = "base_model.model."
    adapters = {f"{prefix}{name}": v for name, v in {**WEIGHTS, **PROJECTOR}.items()}
    save_file(adapters, folder / "adapter_model.safetensors")
    export(ExportOptions(folder, tmp_path / "plain"))
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.state_proj"]
    with safe_open(tmp_path / "plain" / "adapter_model.safetensors", "pt") as file:
        assert set(file.keys()) == {prefix + name for name in WEIGHTS}


def test_bad_input(stock, tmp_path):
    with pytest.raises(CheckpointError, match=r"stock is a 'pi05' checkpoint"):
        export(ExportOptions(stock, tmp_path / "out"))
    with pytest.raises(CheckpointError, match=r"/config\.json"):
        export(ExportOptions(tmp_path, tmp_path / "out"))
    with pytest.raises(CheckpointError, match=r"/no-where "):
        init(InitOptions(str(tmp_path / "no-where"), tmp_path / "out"))
    with pytest.raises(ConfigError, match="alpha is -1"):
        init(InitOptions(str(stock), tmp_path / "out", alpha=-1))
    with pytest.raises(ConfigError, match=r"/stock exists"):
        init(InitOptions(str(stock), stock))
    init(InitOptions(str(stock), tmp_path / "sf"))
    with pytest.raises(CheckpointError, match="'pi05_sf' checkpoint already"):
        init(InitOptions(str(tmp_path / "sf"), tmp_path / "out"))
    (stock / "config.json").write_text(json.dumps({"type": "smolvl"}))
    with pytest.raises(CheckpointError, match=r"no smolvl_sf\. Did you mean 'smolvla'"):
        init(InitOptions(str(stock), tmp_path / "out"))
    (stock / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json holds list"):
        init(InitOptions(str(stock), tmp_path / "out"))
    (tmp_path / "sf" / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"sf/model\.safetensors"):
        export(ExportOptions(tmp_path / "sf", tmp_path / "out"))
