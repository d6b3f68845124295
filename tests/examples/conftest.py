"""A teacher that is quick, and the examples run as a user runs them."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_teacher import write_tiny_teacher

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    return write_tiny_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def run_example():
    """Run `python examples/NAME OPTIONS` in a process of its own and return what it printed."""

    def run(name: str, *options: object, python: str = sys.executable, before: tuple[str, ...] = ()) -> str:
        done = subprocess.run(
            [python, *before, str(ROOT / "examples" / name), *map(str, options)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def run_here(monkeypatch, capsys):
    """The same in this process, which has imported torch already."""

    def run(name: str, *options: object) -> str:
        monkeypatch.syspath_prepend(str(ROOT / "examples"))
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def numbers():
    """The values printed after a name, in order: `loss 0.5`, `loss: 0.5`, `'loss': '0.5'`."""

    def find(name: str, text: str) -> list[float]:
        return [float(x) for x in re.findall(rf"\b{name}'?:? '?(-?[\d.]+(?:e-?\d+)?)", text)]

    return find
