"""The RoboTwin policy folder, driven by a stand-in of RoboTwin's evaluation loop."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from spatial_forcing.envs.robotwin import CAMERAS
from spatial_forcing.errors import DataError
from spatial_forcing.evaluation.robotwin import read_robotwin_results, robotwin_table
from spatial_forcing.serving import ServerConfig, load_policy, serving
from spatial_forcing.students import NanoConfig, NanoVLA
from tests.serving.robotwin_standin import HOME, StandInTask, evaluate

FOLDER = Path(__file__).parents[2] / "integrations" / "robotwin"
CHUNK = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robotwin") / "policy"
    config = NanoConfig(
        CAMERAS, image_size=24, patch_size=8, width=32, depth=2, heads=2, head="flow",
        state_dim=14, action_dim=14, chunk=CHUNK,
    )  # fmt: skip
    stats = {
        "observation.state": {"mean": HOME, "std": np.full(14, 0.5)},
        "action": {"min": HOME - 0.5, "max": HOME + 0.5},
    }
    student = NanoVLA.create(config, stats)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(std=0.15, generator=torch.Generator().manual_seed(parameter.numel()))
    student.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(monkeypatch):
    """RoboTwin puts its `policy` folder on the path and imports the policy by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("SpatialForcing", "SpatialForcing.deploy_policy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "SpatialForcing"


@pytest.fixture
def adapter(folder):
    return importlib.import_module(folder)


@pytest.mark.parametrize("client", ["openpi", "ours"])
def test_a_server_and_the_same_process_give_the_same_episodes(folder, checkpoint, client, monkeypatch):
    if client == "ours":
        monkeypatch.setitem(sys.modules, "openpi_client.websocket_client_policy", None)
    else:
        pytest.importorskip("openpi_client", reason="pip install --no-deps openpi-client")
    local, remote = StandInTask(), StandInTask()
    here = evaluate(folder, local, {"checkpoint": str(checkpoint), "seed": 0, "execute": 4, "device": "cpu"})
    with serving(load_policy(checkpoint), ServerConfig(port=0, max_batch=1)) as server:
        usr_args = {"server": f"127.0.0.1:{server.port}", "checkpoint": "null", "seed": 0, "execute": "4"}
        there = evaluate(folder, remote, usr_args)
        getattr(there[2].policy, "_ws", there[2].policy).close()
    assert local.log == remote.log
    assert here[:2] == there[:2]
    assert here[1] == [100000, 100001, 100002]
    actions = [entry for entry in local.log if entry[0] == "take_action"]
    assert len(actions) > 10
    assert not [entry for entry in local.log if entry[0] == "wasted action"]


def test_seeds_that_the_expert_cannot_solve_are_passed_over(folder, checkpoint):
    _, played, _ = evaluate(
        folder, StandInTask(3), {"checkpoint": str(checkpoint), "seed": 1, "device": "cpu"}, test_num=5
    )
    assert played == [200000, 200001, 200002, 200005, 200006]


def test_the_noise_is_that_of_the_episode_and_call(adapter, checkpoint):
    usr_args = {"checkpoint": str(checkpoint), "seed": 3, "execute": 2, "device": "cpu"}
    model = adapter.get_model(usr_args)
    task = StandInTask()
    task.setup_demo(seed=100000, is_test=True)
    seen = adapter.encode_obs(task.get_obs(), "lift")
    model.reset()
    first = [model.actions(seen) for _ in range(2)]
    model.reset()
    second = [model.actions(seen) for _ in range(2)]
    again = adapter.get_model(usr_args)
    again.reset()
    np.testing.assert_array_equal(again.actions(seen), first[0])
    assert len({chunk.tobytes() for chunk in first + second}) == 4
    assert first[0].shape == (2, 14)


@pytest.mark.parametrize(
    ("usr_args", "message"),
    [
        ({}, "server is None and checkpoint is None; give exactly one"),
        ({"server": "a:1", "checkpoint": "b"}, "give exactly one"),
        ({"server": "localhost"}, "expected host:port"),
        ({"checkpoint": "CHECKPOINT", "execute": 7}, "execute is 7, but the policy's chunks hold 6"),
        ({"checkpoint": "CHECKPOINT", "left_arm_dim": 7, "right_arm_dim": 7}, "embodiment has 16 joints"),
        (
            {"checkpoint": "CHECKPOINT", "cameras": ["head_camera"]},
            r"needs cameras \['left_camera', 'right_camera'\]",
        ),
    ],
)
def test_wrong_settings_are_named(adapter, checkpoint, usr_args, message):
    usr_args = {key: str(checkpoint) if value == "CHECKPOINT" else value for key, value in usr_args.items()}
    with pytest.raises(ValueError, match=message):
        adapter.get_model({**usr_args, "device": "cpu"})


def test_observations_that_lack_something_say_what_to_switch_on(adapter):
    task = StandInTask()
    task.setup_demo(seed=100000, is_test=True)
    raw = task.get_obs()
    request = adapter.encode_obs(raw, "lift the pot")
    assert [key for key in request if key.endswith("camera")] == [f"observation/{c}" for c in CAMERAS]
    assert request["observation/state"].dtype == np.float32
    del raw["observation"]["left_camera"]["rgb"]
    with pytest.raises(KeyError, match=r"no rgb of \['left_camera'\] .*task config"):
        adapter.encode_obs(raw)
    with pytest.raises(KeyError, match=r"set data_type\.qpos: true"):
        adapter.encode_obs({"observation": task.get_obs()["observation"]})


def test_the_script_says_how_it_is_called():
    done = subprocess.run(
        ["bash", str(FOLDER / "SpatialForcing" / "eval.sh")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "demo_randomized the hard one" in done.stdout


def test_results_become_a_table(tmp_path):
    def result(task, config, time, text):
        path = tmp_path / task / "SpatialForcing" / config / "pi0-sf" / time / "_result.txt"
        path.parent.mkdir(parents=True)
        path.write_text(text)

    head = "Timestamp: 2026\n\nInstruction Type: unseen\n\n"
    result("lift_pot", "demo_clean", "2026-01-01 10:00:00", head + "0.1")
    result("lift_pot", "demo_clean", "2026-01-02 09:00:00", head + "0.62")
    result("lift_pot", "demo_randomized", "2026-01-02 10:00:00", head + "0.25")
    result("place_fan", "demo_clean", "2026-01-02 10:00:00", head + "0.0")
    results = read_robotwin_results(tmp_path)
    assert {(r.task, r.config): r.rate.successes for r in results} == {
        ("lift_pot", "demo_clean"): 62,
        ("lift_pot", "demo_randomized"): 25,
        ("place_fan", "demo_clean"): 0,
    }
    table = robotwin_table(results)
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["lift_pot", "place_fan", "mean"]
    assert cells[1][0].startswith("62 % [")
    assert cells[1][2].startswith("31 % [")
    assert cells[2][1] == "-"
    result("place_fan", "demo_randomized", "2026-01-02 11:00:00", head + "0.123")
    with pytest.raises(DataError, match=r"0.123 is not a number of successes in 100"):
        read_robotwin_results(tmp_path)
    with pytest.raises(DataError, match=r"holds no TASK/POLICY"):
        read_robotwin_results(tmp_path / "none")
