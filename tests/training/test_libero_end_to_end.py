"""The LIBERO study in small: demonstrations, both arms, evaluation on the assets at hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from spatial_forcing.evaluation import read_results
from tests.envs.libero_case import assets, needs_libero, use_assets

STUDY = Path(__file__).parents[2] / "studies" / "libero" / "study.py"


@needs_libero
@pytest.mark.timeout(1800)  # a minute and a half of one core; many times that on a busy machine
def test_the_study_runs_from_demonstrations_to_results(tmp_path, monkeypatch):
    use_assets(monkeypatch, tmp_path / "config")
    arguments = ["--demos", "1", "--held-out", "1", "--noise", "0", "--steps", "2", "--episodes", "1"]
    subprocess.run(
        [sys.executable, str(STUDY), "--output", str(tmp_path / "study"), "--image-size", "56", *arguments],
        check=True,
        cwd=STUDY.parents[2],
    )
    episodes = read_results(tmp_path / "study" / "results.jsonl")
    assert [episode.tags["arm"] for episode in episodes] == ["base", "sf"]
    assert all(0 < episode.steps <= 220 for episode in episodes)
    if (assets() / "STAND_INS.md").exists():
        assert all(episode.setup["assets"] == "stand-ins" for episode in episodes)
    lines = [json.loads(line) for line in (tmp_path / "study" / "open_loop.jsonl").read_text().splitlines()]
    assert [(line["arm"], line["step"]) for line in lines] == [
        ("base", 1), ("base", 2), ("sf", 1), ("sf", 2),
    ]  # fmt: skip
    assert all(len(line["open_loop_l1"]) == 7 and line["frames"] > 50 for line in lines)
