import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from spatial_forcing.errors import CheckpointError
from spatial_forcing.students import STUDENTS, NanoVLA, base, load_student
from tests.students.test_nano import config, observation, seeded, student


@pytest.fixture
def saved(tmp_path):
    nano = student(head="flow")
    nano.save_pretrained(tmp_path / "a" / "b")
    return nano, tmp_path / "a" / "b"


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_loaded_student_is_bit_identical_with_its_statistics(saved):
    nano, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_student(folder)
    assert isinstance(loaded, NanoVLA)
    assert loaded.config == nano.config
    own, other = nano.state_dict(), loaded.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[key], other[key]) for key in own)
    torch.testing.assert_close(loaded.action_norm.offset, torch.tensor([0.0, 0.5, -0.5]))
    assert torch.equal(nano.act([observation(0)], seeded()), loaded.act([observation(0)], seeded()))


def test_a_training_runs_folder_stands_for_its_policy(tmp_path):
    nano = student()
    nano.save_pretrained(tmp_path / "policy")
    (tmp_path / "config.json").write_text('{"dataset": "d", "output": "o", "steps": 3}')
    loaded = load_student(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), nano.parameters(), strict=True))


def test_saving_again_replaces_and_a_failed_save_keeps_what_was_there(saved, monkeypatch):
    nano, folder = saved
    before = (folder / "model.safetensors").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("spatial_forcing.students.base.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        nano.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    monkeypatch.undo()
    NanoVLA(config(), seed=3).save_pretrained(folder)
    assert torch.equal(load_student(folder).view_position, NanoVLA(config(), seed=3).view_position)


def test_another_architecture_is_refused_naming_both(saved):
    _, folder = saved
    edit_config(folder, model_type="pi9")
    with pytest.raises(CheckpointError, match="'pi9' model, not 'nano'"):
        NanoVLA.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"'pi9' model.*it knows .*nano"):
        load_student(folder)
    assert STUDENTS["nano"] is NanoVLA


def test_broken_configs_are_named(saved, tmp_path):
    _, folder = saved
    with pytest.raises(CheckpointError, match=r"nowhere/config\.json"):
        load_student(tmp_path / "nowhere")
    edit_config(folder, surprise=1)
    with pytest.raises(CheckpointError, match="surprise"):
        load_student(folder)
    (folder / "config.json").write_text('{"model_type": "nano"}')
    with pytest.raises(CheckpointError, match="cameras"):
        load_student(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no model_type"):
        load_student(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        load_student(folder)


def test_weights_that_do_not_fit_are_listed(saved):
    _, folder = saved
    path = folder / "model.safetensors"
    weights = load_file(path)
    changed = {key: value for key, value in weights.items() if key != "norm.bias"}
    changed["projector.weight"] = torch.zeros(2)
    changed["norm.weight"] = torch.zeros(7)
    save_file(changed, path)
    with pytest.raises(CheckpointError) as caught:
        load_student(folder)
    for fault in (
        "1 missing: norm.bias",
        "1 unexpected: projector.weight",
        r"norm.weight: (7,) stored, (32,) expected",
    ):
        assert fault in str(caught.value)


def test_truncated_and_missing_weights(saved):
    _, folder = saved
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"a/b/model\.safetensors"):
        load_student(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        load_student(folder)


class TestOtherCheckpoints:
    """Those of other distributions, found by a key of their config.json."""

    def test_an_entry_point_loads_them(self, tmp_path, monkeypatch):
        (tmp_path / "config.json").write_text('{"type": "pi0"}')
        point = SimpleNamespace(name="type", load=lambda: lambda folder: ("loaded", folder))
        monkeypatch.setattr(base, "entry_points", lambda group: [point] if group == base.OTHERS else [])
        assert load_student(str(tmp_path)) == ("loaded", tmp_path)

    def test_one_for_another_key_is_not_asked(self, tmp_path, monkeypatch):
        (tmp_path / "config.json").write_text('{"type": "pi0"}')
        monkeypatch.setattr(base, "entry_points", lambda group: [SimpleNamespace(name="kind")])
        with pytest.raises(CheckpointError, match="LeRobot's policy 'pi0'; install the plugin"):
            load_student(tmp_path)

    @pytest.mark.parametrize("content", ["{}", "[1]", '{"model_type": 3}'])
    def test_what_nobody_knows(self, tmp_path, content):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match="names no model_type"):
            load_student(tmp_path)
