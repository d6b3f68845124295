"""What the README shows exists and is what the code says."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from spatial_forcing import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EVIDENCE = (ROOT / "docs" / "evidence.md").read_text()


def test_the_ten_lines_are_the_example():
    example = (ROOT / "examples" / "huggingface_vlm.py").read_text()
    regions = re.findall(r"# \[integration\]\n(.*?)\n\s*# \[end\]", example, re.DOTALL)
    shown = re.search(r"```python\n(.*?)\n```", README, re.DOTALL)
    assert shown is not None
    assert shown[1] == "\n".join(textwrap.dedent(region) for region in regions)
    assert len(shown[1].splitlines()) <= 10


def links(text):
    return sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", text)))


@pytest.mark.parametrize("target", [*links(README), *(f"docs/{target}" for target in links(EVIDENCE))])
def test_every_link_leads_somewhere(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize("line", re.findall(r"^spatial-forcing ([^#\n]+)", README + EVIDENCE, re.MULTILINE))
def test_every_command_parses(line):
    path, command, _ = cli.resolve(line.split())
    assert command.target
    assert path


@pytest.mark.parametrize("target", re.findall(r"\bmake ([a-z-]+)", README))
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
