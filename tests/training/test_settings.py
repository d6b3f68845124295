"""Configurations: validation, presets, overrides, JSON, schedules."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spatial_forcing.data.convert.robotwin import SAME
from spatial_forcing.errors import ConfigError
from spatial_forcing.forcing import ForcingConfig
from spatial_forcing.training import PRESETS, OptimConfig, TrainConfig, lr_factor, override, preset
from spatial_forcing.training.config import changed_settings
from spatial_forcing.training.optim import make_optimizer, make_scheduler, parameter_groups
from tests.training.fake_run import make_config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0; expected at least 1"),
        ({"batch_size": 6, "gradient_accumulation": 4}, "divide evenly"),
        ({"fraction": 0.0}, "fraction is 0.0"),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'"),
        ({"callback_every": 3}, r"multiple of save_every \(2\)"),
        ({"trackers": ("tensorbord",)}, "Did you mean 'tensorboard'"),
        ({"episodes": ()}, "episodes is"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config("out", **settings)


def test_a_warm_up_longer_than_the_run_is_shortened_and_said(caplog):
    config = make_config("out", steps=40, optim=OptimConfig(warmup_steps=1000, lr=0.1))
    assert config.optim == OptimConfig(warmup_steps=10, lr=0.1)
    assert "1000" in caplog.text
    assert "10 steps" in caplog.text
    caplog.clear()
    assert TrainConfig.from_plain(config.to_plain()) == config  # what is written is what is done
    assert not caplog.records


@pytest.mark.parametrize("word", ["action", "=actions", "action="])
def test_names_of_features_are_checked_with_the_configuration(word):
    with pytest.raises(ConfigError, match="keys"):
        make_config("out", keys=(word, "observation.state=state"))


def test_forcing_needs_a_teacher():
    plain = {**make_config("out").to_plain(), "teacher": None}
    with pytest.raises(ConfigError, match=r"forcing.alpha is 0.5 and there is neither a teacher nor a cache"):
        TrainConfig.from_plain(plain)
    assert not TrainConfig.from_plain({**plain, "forcing": {"alpha": 0.0}}).forces


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "optim.lr"),
        ({"betas": (0.9, 1.0)}, "optim.betas"),
        ({"decay": "cosin"}, "optim.decay"),
        ({"clip_norm": 0.0}, "optim.clip_norm"),
        ({"decay": "step"}, "'step' needs milestones"),
        ({"milestones": (10,)}, "only 'step' uses them"),
        ({"decay": "step", "milestones": (10, 5)}, "increasing"),
    ],
)
def test_wrong_optimizer_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**settings)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = preset(name, dataset="data", output="runs/a")
    assert TrainConfig.from_plain(json.loads(json.dumps(config.to_plain()))) == config


def test_overrides_by_dotted_name():
    config = preset(
        "nano-metaworld",
        dataset="data",
        output="runs/a",
        overrides={
            "steps": "20",
            "optim.warmup_steps": 5,  # consistent only together
            "forcing.alpha": 0,
            "optim.betas": "0.9,0.95",
            "student.head": "flow",
            "cache": "features",
            "optim.clip_norm": "none",
            "student.blank_images": "true",
        },
    )
    assert config.steps == 20
    assert config.forcing.alpha == 0.0
    assert config.optim.betas == (0.9, 0.95)
    assert config.student.head == "flow"
    assert config.cache == Path("features")
    assert config.optim.clip_norm is None
    assert config.student.blank_images is True


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"stepz": 3}, "unknown setting 'stepz'. Did you mean 'steps'"),
        ({"forcing.alhpa": 3}, "unknown setting 'forcing.alhpa'. Did you mean 'alpha'"),
        ({"steps": "many"}, "steps is 'many'; expected an integer"),
        ({"steps": True}, "expected an integer"),
        ({"augment.rotation": 3}, "has no settings"),
        ({"student.head": "l2"}, "choose from 'l1', 'flow'"),
        ({"student": 3}, "student is 3"),
    ],
)
def test_wrong_overrides_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        override(make_config("out"), overrides)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ConfigError, match="Did you mean 'nano-metaworld'"):
        preset("nano-metaword", dataset="data", output="out")


def test_only_what_changes_learning_counts_as_changed():
    one = make_config("a", keep=1, log_every=5)
    two = make_config("b", seed=3, optim=OptimConfig(lr=1e-4))
    assert set(changed_settings(one.to_plain(), two)) == {"seed", "optim.lr"}


def test_a_runs_file_moves_with_the_run(tmp_path):
    run = tmp_path / "all" / "runs" / "sf"
    config = replace(make_config(run), dataset=tmp_path / "all" / "demonstrations")
    written = config.to_file()
    assert (written["output"], written["dataset"]) == (".", "../../demonstrations")
    moved = TrainConfig.from_file(written, tmp_path / "new" / "runs" / "sf")
    assert moved.output == tmp_path / "new" / "runs" / "sf"
    assert moved.dataset == tmp_path / "new" / "demonstrations"


def test_several_teachers_are_settings_by_label(tmp_path):
    named = {"teachers": {"geometry": "recorded-depth"}, "caches": {"semantics": tmp_path / "all" / "dino"}}
    config = replace(make_config(tmp_path / "all" / "run"), teacher=None, **named)
    assert [(s.label, s.teacher, s.cache and s.cache.name) for s in config.sources] == [
        ("geometry", "recorded-depth", None),
        ("semantics", None, "dino"),
    ]
    assert TrainConfig.from_plain(json.loads(json.dumps(config.to_plain()))) == config
    written = config.to_file()
    assert written["caches"] == {"semantics": "../dino"}
    moved = TrainConfig.from_file(written, tmp_path / "new" / "run")
    assert moved.caches == {"semantics": tmp_path / "new" / "dino"}
    assert set(changed_settings(written, replace(config, caches={}))) == {"caches.semantics"}
    assert override(config, {"teachers": {"a": "vggt-nano"}, "caches": {}}).sources[0].label == "a"
    assert replace(config, forcing=ForcingConfig(alpha=0.0)).sources == ()
    with pytest.raises(ConfigError, match=r"teacher is vggt-nano.*geometry, semantics.*--teacher None"):
        replace(make_config(tmp_path), teacher="vggt-nano", **named)
    with pytest.raises(ConfigError, match=r"geometry, semantics.*forcing\.teachers"):
        replace(config, forcing=ForcingConfig(pairs=((3, -1),)))
    with pytest.raises(ConfigError, match=r"caches.*by name"):
        override(config, {"caches": "dino"})
    with pytest.raises(ConfigError, match=r"caches\.a is 1"):
        override(config, {"caches": {"a": 1}})


def test_an_absolute_path_elsewhere_stays(tmp_path):
    config = replace(make_config(tmp_path / "a" / "b" / "c" / "run"), dataset=tmp_path / "data")
    assert config.to_file()["dataset"] == str(tmp_path / "data")


def test_a_runs_file_is_read_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = replace(make_config("runs/one"), dataset=Path("data/demonstrations"))
    written = config.to_file()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = TrainConfig.from_file(written, Path("../runs/one"))
    assert (again.output, again.dataset) == (Path("../runs/one"), Path("../data/demonstrations"))
    assert changed_settings(written, again) == {}
    other = replace(again, dataset=Path("data/demonstrations"))
    assert list(changed_settings(written, other)) == ["dataset"]


def test_a_hub_id_is_no_path_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_config("run", init_from=Path("owner/name"))
    assert config.to_file()["init_from"] == "owner/name"
    assert TrainConfig.from_file(config.to_file(), Path("run")).init_from == Path("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert config.to_file()["init_from"] == "../owner/name"
    assert TrainConfig.from_file(config.to_file(), Path("run")).init_from == Path("owner/name")


def test_a_file_of_an_earlier_version_has_its_paths_as_given():
    config = replace(make_config("runs/one"), dataset=Path("data/demonstrations"))
    assert TrainConfig.from_file(config.to_plain(), Path("runs/one")) == config


def test_a_renamed_setting_is_read_by_its_earlier_name():
    now = replace(make_config("a"), forcing=ForcingConfig(subtract_cell_mean=True))
    plain = now.to_plain()
    plain["forcing"]["centre"] = plain["forcing"].pop("subtract_cell_mean")
    assert TrainConfig.from_plain(plain) == now
    assert changed_settings(plain, now) == {}
    assert override(make_config("a"), {"forcing.centre": "true"}).forcing.subtract_cell_mean


def test_a_dotted_name_is_no_setting_of_its_last_part():
    with pytest.raises(ConfigError, match=r"unknown setting 'x\.steps'"):
        TrainConfig.from_plain(make_config("a").to_plain() | {"x.steps": 5})


@settings(max_examples=40, deadline=None)
@given(
    warmup=st.integers(0, 40),
    decay=st.sampled_from(["cosine", "linear", "constant"]),
    final=st.floats(0, 1),
)
def test_schedules_rise_then_fall(warmup, decay, final):
    config = OptimConfig(warmup_steps=warmup, decay=decay, final_lr_ratio=final)
    factors = [lr_factor(config, step, 100) for step in range(101)]
    assert factors[warmup] == 1.0
    assert all(a < b for a, b in pairwise(factors[: warmup + 1]))
    assert all(a >= b for a, b in pairwise(factors[warmup:]))
    assert factors[100] == pytest.approx(1.0 if decay == "constant" else final)


def test_warm_up_does_not_cancel_the_decay():
    """The released code's warm-up sets the rate again at every later step, so that it never decays."""
    config = OptimConfig(warmup_steps=10, decay="step", milestones=(50, 80), milestone_factor=0.1)
    factors = {step: lr_factor(config, step, 100) for step in (0, 9, 10, 49, 50, 79, 80, 99)}
    expected = {0: 1 / 11, 9: 10 / 11, 10: 1, 49: 1, 50: 0.1, 79: 0.1, 80: 0.01, 99: 0.01}
    assert factors == pytest.approx(expected)
    cosine = OptimConfig(warmup_steps=10, decay="cosine")
    assert lr_factor(cosine, 55, 100) == pytest.approx((1 + math.cos(math.pi / 2)) / 2)


def test_the_scheduler_sets_the_rate_of_every_group():
    config = OptimConfig(lr=0.1, warmup_steps=3, decay="linear")
    optimizer = make_optimizer(nn.Linear(2, 2), config)
    scheduler = make_scheduler(optimizer, config, 10)
    seen = []
    for _ in range(10):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert seen == [[pytest.approx(0.1 * lr_factor(config, step, 10))] * 2 for step in range(10)]


def test_vectors_are_not_decayed_and_frozen_parameters_left_out():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    module[2].requires_grad_(False)
    decayed, plain = parameter_groups(module, 0.1)
    assert [p.shape for p in decayed["params"]] == [(4, 3)]
    assert decayed["weight_decay"] == 0.1
    assert [p.shape for p in plain["params"]] == [(4,)] * 3
    assert plain["weight_decay"] == 0.0
    with pytest.raises(ConfigError, match="trainable"):
        parameter_groups(module.requires_grad_(False), 0.1)


def test_configurations_are_frozen():
    with pytest.raises(AttributeError):
        make_config("out").steps = 3


@pytest.mark.parametrize(
    ("name", "steps", "rank", "cameras"),
    [
        # As `data convert robotwin` writes them, and as ALOHA's recordings have them.
        ("pi0-robotwin", 30_000, 16, tuple(SAME.values())),
        ("pi0-aloha", 20_000, 0, ("cam_high", "cam_left_wrist", "cam_right_wrist")),
    ],
)
def test_pi0_presets_are_the_papers(name, steps, rank, cameras):
    config = preset(name, dataset="data", output="out")
    assert config.student.cameras == cameras
    assert (config.steps, config.lora.rank, config.batch_size) == (steps, rank, 16)
    assert (config.forcing.alpha, config.forcing.pairs) == (0.5, ((12, -1),))
    assert config.student.size.depth == 18
    with pytest.raises(ConfigError, match="state_dim"):
        preset(name, dataset="data", output="out", overrides={"student.state_dim": 40})


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("pi0-robotwin", "bfloat16"), ("pi0-aloha-lora", "bfloat16"), ("pi0-aloha", "float32")],
)
def test_a_frozen_base_is_loaded_in_bfloat16_and_one_that_is_trained_in_float32(name, dtype):
    config = preset(name, dataset="d", output="o")
    assert config.student.dtype == dtype
    assert bool(config.lora.rank) == (dtype == "bfloat16")


def test_sixteen_bit_weights_that_are_trained_are_said(caplog):
    module = nn.Linear(4, 4).bfloat16()
    make_optimizer(module, OptimConfig(lr=2.5e-5))
    assert "bfloat16" in caplog.text
    assert "2.5e-05" in caplog.text
    caplog.clear()
    make_optimizer(nn.Linear(4, 4), OptimConfig())
    assert not caplog.records
