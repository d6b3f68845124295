from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from spatial_forcing.experiments import train as arms
from spatial_forcing.training import preset


@pytest.fixture
def config(tmp_path):
    return preset(
        "nano-metaworld",
        dataset=tmp_path / "data",
        output=tmp_path / "run",
        overrides={"forcing.alpha": 0.0, "steps": 60},
    )


def test_a_failed_arm_shows_the_end_of_its_log(config):
    """There is no dataset: the real command fails, and the message says why and where the log is."""
    with pytest.raises(arms.ArmFailed, match=r"arm 'alpha0' ended with code 2") as failure:
        arms.train_arms({"alpha0": config}, parallel=1, console=Console(file=io.StringIO()))
    assert "does not exist" in str(failure.value).replace("\n", " ")
    assert str(config.output / "train.log") in str(failure.value)


def test_an_interrupt_stops_every_process(config, monkeypatch):
    started = []

    def sleeper(config, threads):
        process = arms.subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        started.append(process)
        return process

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(arms, "_start", sleeper)
    monkeypatch.setattr(arms, "time", SimpleNamespace(sleep=interrupted))
    with pytest.raises(KeyboardInterrupt):
        arms.train_arms({"a": config, "b": config}, parallel=2, console=Console(file=io.StringIO()))
    assert len(started) == 2
    assert all(process.returncode is not None for process in started)


def test_the_last_complete_metrics_line_is_shown(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert arms._last_metrics(path) == {}
    path.write_text('{"step": 10}\n{"step": 20}\n{"step": 3')
    assert arms._last_metrics(path) == {"step": 20}
    path.write_text('{"st')
    assert arms._last_metrics(path) == {}


def test_lanes_take_the_visible_gpus_in_turn(monkeypatch):
    monkeypatch.setattr(arms.torch.cuda, "device_count", lambda: 0)
    assert arms.one_gpu(1) == {}
    monkeypatch.setattr(arms.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [arms.one_gpu(lane)["CUDA_VISIBLE_DEVICES"] for lane in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [arms.one_gpu(lane)["CUDA_VISIBLE_DEVICES"] for lane in range(2)] == ["5", "7"]
