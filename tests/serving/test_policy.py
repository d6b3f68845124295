from __future__ import annotations

import json

import pytest
import torch

from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.serving import load_policy
from spatial_forcing.serving.request import Request
from spatial_forcing.students import NanoVLA
from tests.serving.served import STATS, observation, tiny_student


def test_metadata_says_what_a_client_must_know(policy):
    about = policy.signature.metadata()
    assert about["torch_threads"] == torch.get_num_threads()
    assert about["cameras"]["front"] == {"shape": [None, None, 3], "dtype": "uint8"}
    assert (about["state_dim"], about["action_dim"], about["chunk"]) == (4, 3, 6)
    assert about["normalisation"] == {"state_norm": "mean_std", "action_norm": "min_max"}
    assert (about["licence"], about["base_model"], about["model_type"]) == ("mit", "nano", "nano")
    assert about["rtc"] is True
    json.dumps(about)


def test_without_a_card_the_licence_is_not_invented(tmp_path):
    tiny_student("l1").save_pretrained(tmp_path)
    about = load_policy(tmp_path).signature.metadata()
    assert about["licence"] == "not stated in the checkpoint's README.md"
    assert about["rtc"] is False


def test_a_broken_card_is_named(tmp_path):
    tiny_student().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(CheckpointError, match=r"header of .*README\.md is not YAML"):
        load_policy(tmp_path)


def test_a_run_serves_its_policy(tmp_path):
    (tmp_path / "config.json").write_text("{}")  # the run's own settings
    tiny_student().save_pretrained(tmp_path / "policy")
    load_policy(tmp_path).warm_up()


def test_a_checkpoint_without_statistics_does_not_start(tmp_path):
    NanoVLA(tiny_student().config).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors lacks normalisation statistics \(state_norm, ac"
    ):
        load_policy(tmp_path)


def test_actions_in_unit_range_are_no_missing_statistics(tmp_path):
    stats = {**STATS, "action": {"min": [-1.0] * 3, "max": [1.0] * 3}}
    NanoVLA.create(tiny_student().config, stats).save_pretrained(tmp_path)
    load_policy(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files_are_named(tmp_path, name):
    tiny_student().save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_policy(tmp_path)


def test_an_unknown_device_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="device 'abacus'"):
        load_policy(checkpoint, device="abacus")


def test_warm_up_finds_a_policy_that_breaks_its_promise(checkpoint, monkeypatch):
    policy = load_policy(checkpoint)
    monkeypatch.setattr(policy.student, "act", lambda *a, **k: torch.zeros(1, 2, 3))
    with pytest.raises(CheckpointError, match=r"answers with shape \(2, 3\), but .* \(6, 3\)"):
        policy.warm_up()


def test_actions_that_are_not_finite_are_an_error(checkpoint, monkeypatch):
    policy = load_policy(checkpoint)
    monkeypatch.setattr(policy.student, "act", lambda *a, **k: torch.full((1, 6, 3), torch.nan))
    with pytest.raises(FloatingPointError):
        policy.act([Request(observation())])
