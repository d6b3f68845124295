"""What the README shows exists and is what the code says."""

from __future__ import annotations

import functools
import inspect
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import tyro

from spatial_forcing import cli
from spatial_forcing.commands import compare

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


class Parsed(Exception):
    """A command line was understood; the command itself was not run."""


@pytest.fixture
def parse_only(monkeypatch):
    def parse(target, **options):
        if inspect.isfunction(target):
            target = functools.wraps(target)(lambda *args, **kwargs: None)
        understood(target, **options)
        raise Parsed

    understood = tyro.cli
    monkeypatch.setattr(tyro, "cli", parse)
    monkeypatch.setattr(compare, "read_config", lambda *args: {"dataset": "d", "output": "o"})


@pytest.mark.parametrize("line", re.findall(r"^spatial-forcing ([^#\n]+)", README + EVIDENCE, re.MULTILINE))
def test_every_command_parses(line, parse_only):
    with pytest.raises(Parsed):
        cli.run(shlex.split(line))


@pytest.mark.parametrize("line", ["compare --dataset d --output o --sedes 1", "sample-size --efect 0.1"])
def test_a_misspelt_option_would_be_noticed(line, parse_only):
    with pytest.raises(SystemExit):
        cli.run(line.split())


@pytest.mark.parametrize("target", re.findall(r"\bmake ([a-z-]+)", README))
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
