"""One's own data with a cached teacher: the example trains, and the guide shows its code."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from spatial_forcing import load_teacher
from spatial_forcing.errors import ConfigError
from spatial_forcing.teachers.cache import CachedTeacher

ROOT = Path(__file__).parents[2]
SOURCE = (ROOT / "examples" / "own_data.py").read_text()
GUIDE = (ROOT / "docs" / "adapt.md").read_text()


def test_it_trains_from_the_cache_and_uses_it_again(run_here, tiny_teacher, tmp_path, numbers):
    printed = run_here("own_data.py", "--teacher", tiny_teacher, "--output", tmp_path, "--steps", 12)
    cosines = numbers("cosine to the teacher", printed)
    assert len(cosines) == 12
    assert cosines[-1] > cosines[0]
    cache = CachedTeacher(tmp_path / "features")
    assert (cache.cameras, len(cache)) == (("front", "wrist"), 36)
    again = run_here("own_data.py", "--teacher", tiny_teacher, "--output", tmp_path, "--steps", 12)
    assert numbers("cosine to the teacher", again) == cosines
    with pytest.raises(ConfigError, match=r"CachedTeacher.*--cache"):
        load_teacher(tmp_path / "features")


@pytest.mark.parametrize("part", ["source", "cache", "student"])
def test_the_guide_shows_the_examples_code(part):
    code = re.search(rf"# \[{part}\]\n(.*?)\n\s*# \[end\]", SOURCE, re.DOTALL)[1]
    assert f"```python\n{textwrap.dedent(code).strip()}\n```" in GUIDE
