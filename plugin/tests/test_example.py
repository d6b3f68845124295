"""`examples/lerobot_train.py` as a user runs it: the loop in Python, and the command that it prints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lerobot.policies.factory import get_policy_class
from safetensors.torch import load_file

from tests.tiny_teacher import write_tiny_teacher

ROOT = Path(__file__).parents[2]
MARK = "spatial_forcing.projector"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_tiny_teacher(tmp_path_factory.mktemp("teacher"))


def run(*options):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "lerobot_train.py"), *map(str, options)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "plugin")]),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_loop_aligns_and_exports_a_stock_policy(teacher, tmp_path):
    printed = run("--teacher", teacher, "--steps", 8, "--output", tmp_path)
    losses, cosines = (
        [float(value) for value in re.findall(rf"\b{name} (-?[\d.]+)", printed)]
        for name in ("loss", "cosine")
    )
    assert losses[-1] < losses[0] / 2
    assert cosines[-1] > cosines[0] + 0.1
    assert "same actions: True" in printed
    assert "lerobot-train --dataset.repo_id" in printed
    stock = get_policy_class("xvla").from_pretrained(tmp_path / "policy")
    stored = load_file(tmp_path / "policy" / "model.safetensors")
    assert stored.keys() <= stock.state_dict().keys()
    assert not any(MARK in name for name in stored)
    assert any(MARK in name for name in load_file(tmp_path / "forced" / "model.safetensors"))


def test_the_command_trains_the_same_policy(teacher, tmp_path):
    run("--cli", "--teacher", teacher, "--steps", 2, "--output", tmp_path)
    folder = tmp_path / "lerobot" / "checkpoints" / "000002" / "pretrained_model"
    assert any(MARK in name for name in load_file(folder / "model.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    assert config["type"] == "xvla_sf"
    assert config["forcing"]["teacher"] == str(teacher)
