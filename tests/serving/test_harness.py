"""vla-eval's benchmarks play a served policy, and its result files enter our statistics."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from vla_eval.api import evaluate, run

from spatial_forcing.cli import main
from spatial_forcing.commands.compare import CheckpointOptions, checkpoints
from spatial_forcing.commands.serve import ServeOptions
from spatial_forcing.commands.serve import serve as serve_command
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.evaluation.results import read_harness_results
from spatial_forcing.serving.harness import PolicyServer, as_request
from spatial_forcing.serving.policy import load_policy
from tests.serving.toy_benchmark import Room

BENCHMARK = {"benchmark": "tests.serving.toy_benchmark:Room", "episodes_per_task": 3}


def config(folder, **params):
    return {"output_dir": str(folder), "benchmarks": [{**BENCHMARK, "params": params}]}


@pytest.fixture
def served(checkpoint):
    return load_policy(checkpoint, aliases={"hand": "wrist"})


@pytest.fixture(autouse=True)
def forget():
    Room.seen.clear()


@pytest.mark.parametrize(("execute", "batch"), [(None, 1), (2, 1), (2, 4)])
def test_a_benchmark_gets_the_policys_actions_chunk_by_chunk(served, tmp_path, execute, batch):
    server = PolicyServer(served, execute=execute, max_batch=batch)
    (result,) = evaluate(server, config(tmp_path), docker=False, no_save=True)
    assert result["num_errors"] == 0
    assert sum(task["num_episodes"] for task in result["tasks"]) == 6
    assert len(Room.seen) == 6 * 4
    room = Room(send_state=True, send_wrist_image=True)
    for task in room.get_tasks():
        room._task = task
        played = [entry for entry in Room.seen if entry[0] == task["name"]]
        for episode in range(3):
            obs = room.reset({**task, "episode_idx": episode})
            expected = []
            for step in range(4):
                if not expected:
                    seen = {
                        "images": {"front": obs["images"]["front"], "wrist": obs["images"]["hand"]},
                        "state": obs["state"],
                        "task": task["name"],
                    }
                    generators = [torch.Generator().manual_seed(step)]
                    with torch.inference_mode():
                        chunk = served.student.act([seen], generators)[0].numpy()
                    expected = list(chunk[: execute or len(chunk)])
                _, _, obs, taken = played[4 * episode + step]
                np.testing.assert_allclose(taken, expected.pop(0), atol=1e-5)


def test_states_and_wrist_images_are_asked_for_and_a_wrong_camera_is_named(served, checkpoint, tmp_path):
    assert PolicyServer(served).get_observation_params() == {"send_state": True, "send_wrist_image": True}
    unnamed = PolicyServer(load_policy(checkpoint))
    (result,) = evaluate(unnamed, config(tmp_path), docker=False, no_save=True)
    assert result["num_errors"] == 6
    detail = json.dumps(result)
    assert "image 'wrist' is missing" in detail
    assert "hand" in detail


def test_more_actions_than_a_chunk_has_are_refused(served):
    with pytest.raises(ConfigError, match=r"execute is 7; .* 6 actions"):
        PolicyServer(served, execute=7)


def test_an_observation_is_a_request():
    image = np.zeros((4, 4, 3), np.uint8)
    found = as_request({"images": {"a": image}, "states": [1.0], "task_description": "go", "x": 1}, seed=5)
    assert found == {"images": {"a": image}, "state": [1.0], "prompt": "go", "seed": 5}
    assert as_request({"state": [2.0]}, seed=0)["state"] == [2.0]


@pytest.fixture
def process(checkpoint):
    """`serve --protocol vla-eval` and its port."""
    options = ["--protocol", "vla-eval", "--port", "0", "--camera-map", "hand", "wrist"]
    command = [sys.executable, "-m", "spatial_forcing.cli", "serve", str(checkpoint), *options]
    environment = {k: v for k, v in os.environ.items() if k != "SPATIAL_FORCING_API_KEY"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    for line in process.stderr:
        if found := re.search(r"to vla-eval on ws://127.0.0.1:(\d+)", line):
            yield process, int(found[1])
            break
    else:
        pytest.fail("the server did not start")
    process.kill()
    process.communicate()


def results(folder):
    return sorted(path for path in folder.rglob("*.json") if "tasks" in json.loads(path.read_text()))


def test_the_command_serves_and_its_results_are_compared(process, tmp_path, capsys):
    server, port = process
    files = []
    for name in ("one", "two"):
        run(config(tmp_path / name), server_url=f"ws://127.0.0.1:{port}", docker=False)
        (made,) = results(tmp_path / name)
        files.append(made.rename(tmp_path / f"{name}.json"))
    server.send_signal(signal.SIGINT)
    assert server.wait(30) == 0
    episodes = read_harness_results(files[0])
    assert len(episodes) == 6
    assert {e.task for e in episodes} == {"touch the cube", "open the door"}
    assert {e.seed for e in episodes} == {0, 1, 2}
    assert all(e.steps == 4 for e in episodes)
    words = ["--results", *map(str, files), "--first", "file=one", "--second", "file=two"]
    main(["compare-checkpoints", *words])
    said = capsys.readouterr().out
    assert "6 identical episodes; only the first succeeds in 0" in said


def test_results_of_other_params_and_other_files_are_refused(tmp_path):
    body = {
        "benchmark": "Room", "config": {"params": {"suite": "a"}},
        "tasks": [{"task": "t", "episodes": [{"episode_id": 0, "metrics": {"success": True}, "steps": 3}]}],
    }  # fmt: skip
    (tmp_path / "one.json").write_text(json.dumps(body))
    body["config"]["params"]["suite"] = "b"
    (tmp_path / "two.json").write_text(json.dumps(body))
    files = (tmp_path / "one.json", tmp_path / "two.json")
    with pytest.raises(DataError, match=r'"suite": "a".*"suite": "b"'):
        checkpoints(CheckpointOptions(tuple(files), ("file=one",), ("file=two",)))
    assert read_harness_results(tmp_path / "one.json", {"file": "two"}) == []
    (tmp_path / "two.json").write_text(json.dumps({**body, "partial": True}))
    with pytest.raises(DataError, match=r"two\.json is partial"):
        read_harness_results(tmp_path / "two.json")
    (tmp_path / "two.json").write_text("{}")
    with pytest.raises(DataError, match=r"two\.json is not a result of vla-eval"):
        read_harness_results(tmp_path / "two.json")


def test_options_of_the_other_protocol_are_refused(checkpoint, monkeypatch):
    with pytest.raises(ConfigError, match="--execute"):
        serve_command(ServeOptions(checkpoint, execute=2))
    monkeypatch.setenv("SPATIAL_FORCING_API_KEY", "secret")
    with pytest.raises(ConfigError, match="SPATIAL_FORCING_API_KEY"):
        serve_command(ServeOptions(checkpoint, protocol="vla-eval", port=0))
