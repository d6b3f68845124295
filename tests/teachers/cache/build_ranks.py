"""Builds a cache with fewer channels in every process of a launch: `build_ranks.py FOLDER`."""

from __future__ import annotations

import sys

from tests.fakes import FakeTeacher
from tests.teachers.cache.cache_fakes import CountingTeacher, FakeSource, build

OPTIONS = {"layers": (-1, 0), "dtype": "int8", "channels": 4, "shard_bytes": 2000}


def run(folder, teacher=None):
    """One cache of the demo frames; some views are absent."""
    source = FakeSource(absent=[(4, "wrist"), (6, "front")])
    return build(teacher or FakeTeacher(), source, folder, **OPTIONS)


if __name__ == "__main__":
    counting = CountingTeacher()
    run(sys.argv[1], counting)
    print(f"encoded {len(counting.frames)}", flush=True)
