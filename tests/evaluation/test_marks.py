"""Results on stand-in assets are marked; suites stand for their tasks; environment settings are parsed."""

from __future__ import annotations

import pytest
from rich.console import Console

from spatial_forcing.commands.evaluate import EvaluateOptions
from spatial_forcing.data.record import RecordConfig
from spatial_forcing.envs.base import task_marks
from spatial_forcing.errors import ConfigError
from spatial_forcing.evaluation.results import EpisodeResult, EvaluationResult


def printed(setup):
    episode = EpisodeResult("libero_goal-0", 100_000, True, 10, 1.0, 0.1, None, {}, setup)
    console = Console(record=True, width=120)
    console.print(EvaluationResult((episode,)).table())
    return console.export_text()


def test_every_table_of_stand_in_results_says_so():
    assert "Stand-in looks: not comparable" in printed({"assets": "stand-ins"})
    assert "Stand-in" not in printed({})


def test_marks_come_from_the_assets_in_use(tmp_path, monkeypatch):
    (tmp_path / "scenes").mkdir()
    monkeypatch.setenv("SF_LIBERO_ASSETS", str(tmp_path))
    assert task_marks(["libero_goal-0", "reach-v3"]) == {}
    (tmp_path / "STAND_INS.md").touch()
    assert task_marks(["libero_goal-0", "reach-v3"]) == {"assets": "stand-ins"}
    assert task_marks(["reach-v3"]) == {}


def test_a_suite_stands_for_its_tasks(tmp_path):
    with pytest.warns(UserWarning, match="does not solve them: .'libero_spatial-4'"):
        config = RecordConfig(tmp_path, env="libero_spatial")
    assert config.tasks == tuple(f"libero_spatial-{i}" for i in range(10) if i != 4)
    assert config.cameras == ("agentview", "robot0_eye_in_hand")
    assert config.horizon == 280
    same = RecordConfig(tmp_path, tasks=("libero_spatial",))
    assert same.content == config.content
    assert RecordConfig(tmp_path, tasks=("reach-v3",)).horizon == 200
    with pytest.raises(ConfigError, match="Did you mean 'libero_spatial'"):
        RecordConfig(tmp_path, env="libero_spatail")


def test_environment_settings_are_pairs(tmp_path):
    options = EvaluateOptions(
        tmp_path, tmp_path / "r", settings=("horizons=lerobot", "perturbation=camera=1,noise")
    )
    assert options.env_settings == {"horizons": "lerobot", "perturbation": "camera=1,noise"}
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        _ = EvaluateOptions(tmp_path, tmp_path / "r", settings=("horizons",)).env_settings
