import importlib
import json
from dataclasses import replace

import pytest
import torch

from spatial_forcing.alignment import Views
from spatial_forcing.errors import CheckpointError, ConfigError, DataError
from spatial_forcing.nano_teacher import recipe, scenes
from spatial_forcing.nano_teacher.evaluate import evaluate_teacher
from spatial_forcing.nano_teacher.optim import make_optimizers
from spatial_forcing.nano_teacher.pretrain import PretrainRun, pretrain
from spatial_forcing.nano_teacher.recipe import PretrainConfig
from spatial_forcing.nano_teacher.scenes import SceneBatch, SceneDataset
from spatial_forcing.teachers import load_teacher
from spatial_forcing.teachers.vggt.config import CameraHeadConfig, DPTConfig, VGGTConfig
from spatial_forcing.teachers.vggt.model import VGGT

TINY = VGGTConfig(
    img_size=32,
    patch_size=8,
    embed_dim=16,
    depth=2,
    num_heads=2,
    num_register_tokens=1,
    patch_embed="conv",
    init_values=1.0,
    camera=CameraHeadConfig(trunk_depth=1, num_heads=2, iterations=2),
    dpt=DPTConfig(
        features=8, out_channels=(8, 8, 8, 8), layers=(0, 0, 1, 1), down_ratio=2, hidden_channels=8
    ),
)


class FakeScenes:
    """A floor seen from random heights whose brightness tells its distance."""

    folder = "fake"

    def __len__(self):
        return 16

    def batch(self, indices):
        generator = torch.Generator().manual_seed(7)
        heights = 0.5 + torch.rand(16, 3, generator=generator)[indices]
        count = len(indices)
        poses = torch.diag(torch.tensor([1.0, -1, -1, 1])).repeat(count, 3, 1, 1)
        poses[:, :, 2, 3] = heights
        matrix = torch.tensor([[30.0, 0, 16], [0, 30.0, 16], [0, 0, 1]]).repeat(count, 3, 1, 1)
        depth = heights[..., None, None].expand(-1, -1, 32, 32).clone()
        images = (depth[:, :, None].expand(-1, -1, 3, -1, -1) * 150).to(torch.uint8)
        return SceneBatch(images, depth, matrix, poses)


def config(folder, **changes):
    short = {"steps": 12, "minutes": None, "views_per_step": 6, "warmup_steps": 3, "log_every": 4}
    return PretrainConfig(**{"out": folder, "model": TINY} | short | changes)


def finish(run):
    return list(run.train(FakeScenes()))


def test_training_lowers_the_error(tmp_path):
    run = PretrainRun(config(tmp_path, steps=60, learning_rate=5e-3, warmup_steps=5, ema_decay=0.9))
    before = evaluate_teacher(run.average, FakeScenes())
    finish(run)
    after = evaluate_teacher(run.average, FakeScenes())
    assert after["abs_rel"] < 0.6 * before["abs_rel"]
    assert after["images"] == 48
    assert after["pairs"] == 32
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"depth", "point", "camera", "lr"} <= rows[-1].keys()


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    whole = PretrainRun(config(tmp_path / "whole"))
    finish(whole)
    broken = PretrainRun(config(tmp_path / "broken"))
    for _ in broken.train(FakeScenes()):
        broken.save()
        break  # killed after the first log
    resumed = PretrainRun(config(tmp_path / "broken"))
    assert resumed.step == 4
    finish(resumed)
    for name, tensor in whole.average.state_dict().items():
        assert torch.equal(tensor, resumed.average.state_dict()[name]), name
    assert PretrainRun(config(tmp_path / "broken")).finished


def test_the_exported_weights_are_a_teacher(tmp_path):
    run = PretrainRun(config(tmp_path))
    finish(run)
    teacher = load_teacher(str(run.weights))
    assert teacher.licence == "Apache-2.0"
    (features,) = teacher.features(Views.create(torch.rand(1, 2, 3, 32, 32)))
    assert features.shape == (1, 2, 4, 4, 32)
    stored = run.average.half().float().aggregator
    images = torch.rand(1, 2, 3, 32, 32)
    assert torch.allclose(teacher.model.aggregator(images)[0], stored(images)[0], atol=1e-6)


def test_other_settings_do_not_overwrite_a_run(tmp_path):
    run = PretrainRun(config(tmp_path))
    finish(run)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(CheckpointError, match="weight_decay"):
        PretrainRun(config(tmp_path, weight_decay=0.01))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert PretrainRun(config(tmp_path, steps=20)).step == 12


def test_an_overflowing_depth_trains_on(tmp_path):
    """exp(100) is infinite, and times the zero gradient beyond the clip it was NaN in all weights."""
    run = PretrainRun(config(tmp_path))
    with torch.no_grad():
        run.model.depth_head.scratch.output_conv2[2].bias.fill_(100.0)
    finish(run)
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())


def test_a_run_that_diverged_goes_on_with_a_lower_rate(tmp_path):
    run = PretrainRun(config(tmp_path))
    run.save()
    with torch.no_grad():
        run.model.camera_head.trunk_norm.weight.fill_(float("inf"))
    with pytest.raises(DataError, match=r"step 0 .*lower learning_rate"):
        finish(run)
    untouched = PretrainRun(config(tmp_path, learning_rate=1e-4))
    finish(untouched)
    assert all(bool(torch.isfinite(p).all()) for p in untouched.model.parameters())
    assert {group["peak"] for group in untouched.optimizers[0].param_groups} == {1e-4}


def test_a_second_run_starts_from_the_first_ones_weights(tmp_path):
    first = PretrainRun(config(tmp_path / "first"))
    finish(first)
    second = PretrainRun(config(tmp_path / "second", init_from=first.weights))
    for name, tensor in first.average.state_dict().items():
        assert torch.equal(tensor.half().float(), second.model.state_dict()[name]), name
    assert second.step == 0
    other = replace(TINY, embed_dim=32)
    with pytest.raises(CheckpointError, match="architecture"):
        PretrainRun(config(tmp_path / "third", init_from=first.weights, model=other))


def test_refining_the_depth_head_leaves_features_and_cameras_alone(tmp_path):
    first = PretrainRun(config(tmp_path / "first"))
    finish(first)
    longer = {"steps": 60, "learning_rate": 5e-3, "ema_decay": 0.9}
    run = PretrainRun(config(tmp_path / "second", init_from=first.weights, refine_depth=True, **longer))
    before = {name: tensor.clone() for name, tensor in run.average.state_dict().items()}
    error = evaluate_teacher(run.average, FakeScenes())["abs_rel"]
    finish(run)
    after = run.average.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"depth_head"}
    assert evaluate_teacher(run.average, FakeScenes())["abs_rel"] < 0.7 * error
    with pytest.raises(ConfigError, match="init_from"):
        config(tmp_path / "third", refine_depth=True)


def test_a_checkpoint_from_before_a_setting_existed_goes_on(tmp_path):
    finish(PretrainRun(config(tmp_path)))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state["config"]["refine_depth"]
    torch.save(state, tmp_path / "checkpoint.pt")
    assert PretrainRun(config(tmp_path)).step == 12


def test_batches_near_policy_cameras_come_at_their_share(tmp_path):
    class Counting(FakeScenes):
        drawn = 0

        def batch(self, indices):
            self.drawn += 1
            return super().batch(indices)

    free, near = Counting(), Counting()
    list(PretrainRun(config(tmp_path, policy_share=0.75)).train(free, near))
    assert free.drawn + near.drawn == 12
    assert free.drawn < near.drawn < 12


def test_a_time_limit_ends_the_run_with_the_rate_decayed(tmp_path):
    run = PretrainRun(config(tmp_path, steps=10**6, minutes=0.02, warmup_steps=1))
    finish(run)
    assert run.finished
    assert run.step < 10**5
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            assert group["lr"] < 0.5 * group["peak"]


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_is_left_out():
    model = VGGT(TINY)
    names = {id(p): name for name, p in model.named_parameters()}
    adamw, muon = make_optimizers(model, 1e-3, 0.02, 0.05)
    of = lambda optimizer: [names[id(p)] for group in optimizer.param_groups for p in group["params"]]  # noqa: E731
    assert sorted(of(adamw) + of(muon)) == sorted(names.values())
    assert "aggregator.frame_blocks.0.attn.qkv.weight" in of(muon)
    assert all("blocks" in name or "trunk" in name for name in of(muon))
    (alone,) = make_optimizers(model, 1e-3, 0, 0.05)
    assert sorted(of(alone)) == sorted(names.values())


def test_a_loss_that_is_not_finite_names_the_scenes(tmp_path):
    run = PretrainRun(config(tmp_path))
    with torch.no_grad():
        next(run.model.parameters()).fill_(float("nan"))
    with pytest.raises(DataError, match="scenes"):
        finish(run)


def test_starting_a_run_does_not_shift_the_random_stream(tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    PretrainRun(config(tmp_path))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"views_per_step": 2},
        {"minutes": 0.0},
        {"ema_decay": 1.0},
        {"policy_share": 1.5},
        {"learning_rate": -1.0},
    ],
)
def test_bad_settings_are_refused(tmp_path, change):
    with pytest.raises(ConfigError):
        config(tmp_path, **change)


def test_everything_from_rendering_to_metrics(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scenes, "SHARD", 4)
    module = importlib.import_module(pretrain.__module__)  # the package exports the function by its name
    monkeypatch.setattr(module, "SHARD", 4)
    monkeypatch.setattr(recipe, "RESERVED_TASKS", ("drawer-open-v3",))
    small = config(
        tmp_path, train_scenes=4, policy_scenes=4, test_scenes=4, steps=2, log_every=1, policy_share=0.5
    )
    weights = pretrain(small)
    assert (weights / "model.safetensors").exists()
    metrics = json.loads((tmp_path / "test_metrics.json").read_text())
    assert metrics["random cameras"]["images"] == 12
    assert metrics["policy cameras"]["images"] == 8
    assert metrics["run"]["steps"] == 2
    assert str(weights) in capsys.readouterr().out.replace("\n", "")
    assert pretrain(small) == weights  # everything is there: evaluates and says so again
    assert len(SceneDataset(tmp_path / "scenes" / "train")) == 4
    again = replace(
        small, out=tmp_path / "again", scenes=tmp_path / "scenes", init_from=weights, refine_depth=True
    )
    assert (pretrain(again) / "model.safetensors").exists()
    assert not (again.out / "scenes").exists()
