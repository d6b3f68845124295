"""The weights that ship with the package."""

import json

import torch

from spatial_forcing.nano_teacher import scenes
from spatial_forcing.nano_teacher.evaluate import clipped_depth_metrics, evaluate_teacher
from spatial_forcing.nano_teacher.recipe import NANO, PretrainConfig
from spatial_forcing.nano_teacher.scenes import SceneDataset, SceneSpec, render_scenes
from spatial_forcing.teachers import load_teacher
from spatial_forcing.teachers.vggt.teacher import NANO_FOLDER


def test_they_are_small_licensed_documented_and_of_the_recipes_architecture():
    assert sum(path.stat().st_size for path in NANO_FOLDER.iterdir()) <= 8e6
    assert json.loads((NANO_FOLDER / "config.json").read_text())["licence"] == "Apache-2.0"
    card = (NANO_FOLDER / "MODEL_CARD.md").read_text()
    assert "Apache-2.0" in card
    assert f"{PretrainConfig().train_scenes:,} scenes" in card
    assert load_teacher("vggt-nano").model.config == NANO


def test_they_see_more_depth_than_a_constant_does(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "SHARD", 4)
    spec = SceneSpec(("drawer-open-v3",), count=4, views=2, seed=5, plain=True, cameras="policy")
    list(render_scenes(tmp_path, spec))
    dataset = SceneDataset(tmp_path)
    metrics = evaluate_teacher(load_teacher("vggt-nano", heads=True).model, dataset)
    truth = dataset.batch(torch.arange(4)).depth.flatten(0, 1)
    # even the best constant for each image, which no model can know
    constant = truth.flatten(1).median(1).values[:, None, None].expand_as(truth)
    assert metrics["abs_rel"] < 0.8 * float(clipped_depth_metrics(constant, truth)["abs_rel"].mean())
