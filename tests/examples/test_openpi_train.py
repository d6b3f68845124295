"""pi0 in openpi's layout, and openpi's own class where a checkout of it is given.

`SF_OPENPI=CHECKOUT` runs the latter, in the checkout's own environment (`.venv`) where it has one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch
from safetensors.torch import load_file

from spatial_forcing.students import Pi0, Pi0Config
from spatial_forcing.students.pi0 import Pi0Size
from spatial_forcing.students.pi0.keys import to_transformers

NAME = "openpi_train.py"


def falls(printed, numbers):
    losses, cosines = (numbers(name, printed) for name in ("loss", "cosine"))
    assert mean(losses[-3:]) < mean(losses[:3]) - 0.3
    assert mean(cosines[-3:]) > mean(cosines[:3]) + 0.1
    assert "keys unchanged: True" in printed


def installed_models(python):
    """The model files that openpi's instructions overwrite, where its own environment is used."""
    packages = python.parents[1].glob("lib/python3*/site-packages/transformers/models")
    return {
        file: file.read_bytes()
        for models in packages
        for name in ("gemma", "paligemma", "siglip")
        for file in (models / name).glob("*.py")
    }


def test_a_checkpoint_in_openpis_layout_is_trained_and_saved_as_such(
    tmp_path, run_example, tiny_teacher, numbers
):
    printed = run_example(NAME, "--teacher", tiny_teacher, "--steps", 12, "--output", tmp_path)
    falls(printed, numbers)
    base, tuned = (load_file(tmp_path / place / "model.safetensors") for place in ("base", "policy"))
    assert all(name.startswith(("paligemma_with_expert.", "action_", "state_proj.")) for name in tuned)
    assert {name: value.shape for name, value in tuned.items()} == {k: v.shape for k, v in base.items()}
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert any("language_model.layers.2." in name for name in changed)
    assert any("vision_tower" in name for name in changed)
    policy = Pi0.from_pretrained(tmp_path / "policy")
    assert policy.config.cameras == ("front", "wrist")


def test_openpis_own_class_is_trained_with_nothing_patched_on_disk(
    tmp_path, run_example, tiny_teacher, numbers
):
    place = os.environ.get("SF_OPENPI")
    if not place:
        pytest.skip("SF_OPENPI names no checkout of openpi")
    own = Path(place) / ".venv" / "bin" / "python"
    python = str(own) if own.exists() else sys.executable
    options = ("--teacher", tiny_teacher, "--steps", 8, "--batch-size", 2, "--output", tmp_path)
    before = installed_models(own)
    falls(run_example(NAME, "--openpi", place, *options, python=python), numbers)
    assert installed_models(own) == before

    # The file is one that this package's student, and so stock transformers, takes as a checkpoint.
    widths = {"width": 64, "depth": 4, "mlp": 128, "head_dim": 16, "expert_width": 32, "expert_mlp": 64}
    vision = {"vision_width": 32, "vision_depth": 2, "vision_heads": 4, "vision_mlp": 48}
    size = Pi0Size(**widths, **vision, vocab=512)
    student = Pi0(Pi0Config(cameras=("front",), tokenizer="hashed", size=size))
    stored = load_file(tmp_path / "policy" / "model.safetensors")
    renamed = to_transformers(stored, student.network.state_dict(), "the export", torch.equal)
    own_shapes = {name: value.shape for name, value in student.network.state_dict().items()}
    different = {name for name, value in renamed.items() if value.shape != own_shapes[name]}
    assert different <= {"model.dit.embed_tokens.weight"}  # openpi keeps the full vocabulary there
