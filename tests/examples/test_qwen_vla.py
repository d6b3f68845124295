"""Qwen-VL policies with two cameras: both families train, and the doctor tells a wrong order of patches."""

from __future__ import annotations

import importlib.util
import re
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spatial_forcing.doctor import DoctorOptions, examine

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "qwen_vla.py"
GUIDE = (ROOT / "docs" / "adapt.md").read_text()
QUICK = DoctorOptions(teacher_dim=16)


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(FILE.parent))
    try:
        spec = importlib.util.spec_from_file_location("qwen_vla", FILE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FILE.parent))
    return module


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_it_trains(run_here, tiny_teacher, numbers, name):
    printed = run_here("qwen_vla.py", name, "--teacher", tiny_teacher, "--steps", 6)
    cosines = numbers("cosine to the teacher", printed)
    assert len(cosines) == 6
    assert cosines[-1] > cosines[0] + 0.05


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_the_doctor_finds_its_tokens_and_views(example, name):
    subject = getattr(example, name)()
    report = examine(subject, QUICK)
    assert report.ok, report.text()
    starts = [view[0][0] for view in report.facts["positions"]]
    assert starts == [1, 19]
    layout = example.layout_from_qwen(
        subject.example(), example.CAMERAS, example.IMAGE, example.PROCESSORS[name]
    )
    assert layout.index[0].tolist() == report.facts["positions"]


def test_a_wrong_order_of_merged_patches_is_found(example):
    subject = example.qwen2_5()

    def scrambled(batch):
        patches = batch["pixel_values"].unflatten(0, (-1, 4))[:, torch.tensor([0, 2, 1, 3])].flatten(0, 1)
        return example.views_from_qwen(
            {**batch, "pixel_values": patches}, example.CAMERAS, example.PROCESSORS["qwen2_5"]
        )

    report = examine(replace(subject, views=scrambled), QUICK)
    assert not report.ok
    assert "merged" in report.checks[2].remedy
    swapped = examine(replace(subject, views=lambda batch: replace_images(subject.views(batch))), QUICK)
    assert "as view 1" in swapped.checks[2].remedy


def replace_images(views):
    return type(views).create(views.images.flip(1), views.cameras)


def test_the_guide_shows_the_examples_code():
    code = re.search(r"# \[qwen\]\n(.*?)\n\s*# \[end\]", FILE.read_text(), re.DOTALL)[1]
    assert f"```python\n{textwrap.dedent(code).strip()}\n```" in GUIDE
