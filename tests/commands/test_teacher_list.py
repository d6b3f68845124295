"""`teacher list`: to be copied from, and to be read by a program."""

import json

import pytest
import torch

from spatial_forcing.commands.teacher import WIDTH, list_teachers
from spatial_forcing.teachers import TEACHERS, load_teacher
from spatial_forcing.teachers.da3 import DA3
from spatial_forcing.teachers.da3.teacher import DA3_CARDS


def test_names_stand_alone_and_lines_fit_a_terminal(capsys):
    list_teachers()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == list(TEACHERS)
    assert max(map(len, lines)) <= WIDTH == 80


@pytest.mark.parametrize(
    ("name", "commercial"),
    [
        ("depth-anything/DA3-BASE", "yes"),
        ("depth-anything/DA3-GIANT", "no"),
        ("facebook/VGGT-1B", "no"),
        ("facebook/VGGT-1B-Commercial", "ask"),
        ("apple/DepthPro-hf", "no"),
        ("recorded-depth", "ask"),
    ],
)
def test_a_program_can_read_what_a_company_may_use(capsys, name, commercial):
    list_teachers(json=True)
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert list(found) == list(TEACHERS)
    assert found[name]["commercial_use"] == commercial


@pytest.mark.parametrize("name", DA3_CARDS)
def test_the_registered_numbers_are_the_architectures(name):
    config, facts = DA3_CARDS[name], TEACHERS[name].facts
    with torch.device("meta"):
        backbone = DA3(config, heads=False).backbone
    millions = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
    assert facts.parameters == pytest.approx(millions, abs=0.06)
    assert (facts.channels, facts.together) == (config.output_dim, config.any_view)


def test_the_shipped_teachers_numbers_are_its_own():
    teacher, facts = load_teacher("vggt-nano"), TEACHERS["vggt-nano"].facts
    millions = sum(p.numel() for p in teacher.model.aggregator.parameters()) / 1e6
    assert facts.parameters == pytest.approx(millions, abs=0.06)
    assert (facts.channels, facts.pixels) == (teacher.dim, teacher.resolution)
