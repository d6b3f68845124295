"""`spatial-forcing serve` as a process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from spatial_forcing import cli
from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.serving import PolicyClient
from spatial_forcing.students import NanoVLA
from tests.serving.served import message, observation, tiny_student

PROGRAM = (
    "import atexit, sys\n"
    "atexit.register(lambda: print('\\n'.join(sys.modules)))\n"
    "from spatial_forcing.cli import main\n"
    "main(['serve', *sys.argv[1:]])"
)


@pytest.fixture
def process(checkpoint):
    """The server and its port."""
    command = [sys.executable, "-c", PROGRAM, str(checkpoint), "--port", "0"]
    environment = os.environ | {"SPATIAL_FORCING_API_KEY": "key"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    for line in process.stderr:
        if found := re.search(r"on ws://127.0.0.1:(\d+)", line):
            yield process, int(found[1])
            break
    else:
        pytest.fail("the server did not start")
    process.kill()
    process.communicate()


def test_the_process_holds_no_teacher_and_drains_on_sigterm(process, policy):
    server, port = process
    with PolicyClient(port=port, api_key="key") as client, ThreadPoolExecutor(1) as pool:
        with torch.inference_mode():
            expected = policy.student.act([observation(1)], [torch.Generator().manual_seed(1)])[0].numpy()
        np.testing.assert_array_equal(client.infer(message(1))["actions"], expected)
        answers = pool.submit(lambda: [client.infer(message(1))["actions"] for _ in range(5)])
        answers.result(30)
        server.send_signal(signal.SIGTERM)
        modules, log = server.communicate(timeout=30)
    assert server.returncode == 0
    assert "drained" in log
    loaded = set(modules.split())
    assert "spatial_forcing.students.nano" in loaded
    assert not [
        name for name in loaded if re.match(r"spatial_forcing\.(teachers|forcing|training|analysis)", name)
    ]


def test_the_served_policy_has_no_projector(policy):
    names = [*dict(policy.student.named_modules()), *policy.student.state_dict()]
    assert not [name for name in names if "projector" in name or "teacher" in name]


def test_nothing_in_serving_can_unpickle():
    folder = Path(cli.__file__).with_name("serving")
    sources = [path.read_text() for path in folder.glob("*.py")]
    assert len(sources) > 5
    assert not [
        s for s in sources if re.search(r"^\s*(import|from) (pickle|dill|cloudpickle|marshal)", s, re.M)
    ]
    assert not [s for s in sources if "allow_pickle" in s or "torch.load" in s]


def test_a_checkpoint_without_statistics_does_not_start(tmp_path):
    NanoVLA(tiny_student().config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"{tmp_path}/model.safetensors lacks normalisation statistics"):
        cli.run(["serve", str(tmp_path)])


def test_the_api_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch, checkpoint):
    from spatial_forcing.commands.serve import read_api_key

    (tmp_path / "key").write_text("secret\n")
    assert read_api_key(tmp_path / "key") == "secret"
    monkeypatch.setenv("SPATIAL_FORCING_API_KEY", "other")
    assert read_api_key(None) == "other"
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match=r"--api-key-file .*/empty "):
        read_api_key(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"--api-key-file .*/none "):
        cli.run(["serve", str(checkpoint), "--api-key-file", str(tmp_path / "none")])
    with pytest.raises(ConfigError, match="Did you mean 'front'"):
        cli.run(["serve", str(checkpoint), "--camera-map", "image", "frnt"])
