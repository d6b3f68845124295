"""Two processes under a launcher build the cache that one process builds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from spatial_forcing.teachers.cache import CachedTeacher, cache_info, verify_cache
from tests.teachers.cache import build_ranks
from tests.teachers.cache.cache_fakes import FakeSource, views_of

ROOT = Path(__file__).parents[3]


def test_two_processes_build_what_one_builds(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        build_ranks.__file__, str(tmp_path / "two"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    build_ranks.run(tmp_path / "one")
    one, two = cache_info(tmp_path / "one"), cache_info(tmp_path / "two")
    assert (two.frames, two.episodes) == (one.frames, one.episodes) == (14, 4)
    assert two.header == one.header
    assert verify_cache(tmp_path / "two") == []
    source = FakeSource(absent=[(4, "wrist"), (6, "front")])
    views = views_of(source, range(len(source)))
    for ours, theirs in zip(
        CachedTeacher(tmp_path / "two").features(views, (0, -1)),
        CachedTeacher(tmp_path / "one").features(views, (0, -1)),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    # One probes the grid, fits the basis (14 frames) and measures the fidelity (8); both encode a part.
    encoded = sorted(int(n) for n in re.findall(r"encoded (\d+)", done.stdout))
    assert sum(encoded) == 1 + 14 + 8 + 14
    assert 0 < encoded[0] < 14
