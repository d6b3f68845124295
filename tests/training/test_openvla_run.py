"""A tiny OpenVLA-OFT through the whole run: base, LoRA, alignment, resume, export; presets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spatial_forcing.commands.train import ExportOptions, export
from spatial_forcing.data import Dataset, DatasetWriter
from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.forcing import ForcingConfig
from spatial_forcing.students import LoraSettings, OpenVLAOFT, OpenVLAOFTConfig, load_student
from spatial_forcing.students.parity import example_observations
from spatial_forcing.teachers.cache.build import build_cache
from spatial_forcing.teachers.cache.source import dataset_source
from spatial_forcing.training import OptimConfig, TrainConfig, preset, train
from tests.fakes import CAMERAS, FakeTeacher
from tests.students.openvla_oft.small import small_config
from tests.training.fake_run import curve


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("openvla")
    rng = np.random.default_rng(0)
    writer = DatasetWriter.create(
        root / "data", fps=20, cameras=dict.fromkeys(CAMERAS, (32, 32)), state_dim=4, action_dim=3
    )
    for _ in range(3):
        for _ in range(5):
            images = {camera: rng.integers(0, 255, (32, 32, 3), dtype=np.uint8) for camera in CAMERAS}
            numbers = {"state": rng.normal(size=4), "action": rng.uniform(-1, 1, 3)}
            writer.add_frame({"images": images, **numbers}, task="touch the cube")
        writer.save_episode()
    writer.finalize()
    dataset = Dataset.open(root / "data")
    build_cache(FakeTeacher(), dataset_source(dataset, CAMERAS), root / "cache", progress=False)
    OpenVLAOFT(small_config(head="tokens", decoding="autoregressive", chunk=1, state_dim=0)).save_pretrained(
        root / "base"
    )
    return root


def make_config(folders, output, **settings):
    defaults = {"alpha": 0.5, "steps": 4}
    options = {**defaults, **settings}
    return TrainConfig(
        dataset=folders / "data",
        output=output,
        student=small_config(dataset="touching", gradient_checkpointing=True),
        init_from=folders / "base",
        lora=LoraSettings(rank=4),
        forcing=ForcingConfig(alpha=options.pop("alpha"), pairs=((2, -1),)),
        teacher="fake",
        cache=folders / "cache",
        batch_size=4,
        save_every=2,
        log_every=1,
        optim=OptimConfig(lr=1e-2),
        trackers=(),
        progress=False,
        cpu=True,
        **options,
    )


def test_a_run_resumes_exactly_and_exports_the_published_layout(folders, tmp_path, capsys):
    whole = train(make_config(folders, tmp_path / "whole"))
    assert "memory estimate" in capsys.readouterr().out

    def kill(saved):
        if saved.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make_config(folders, tmp_path / "killed"), on_checkpoint=kill)
    train(make_config(folders, tmp_path / "killed"))
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert "align_loss" in curve(tmp_path / "whole")[0]
    export(ExportOptions(whole.folder, tmp_path / "merged"))
    merged, adapter = load_student(tmp_path / "merged"), load_student(whole.policy)
    assert isinstance(merged, OpenVLAOFT)
    assert merged.dataset_name == "touching"
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        "config.json",
        "model.safetensors",
        "dataset_statistics.json",
        "README.md",
        "action_head--latest_checkpoint.pt",
        "proprio_projector--latest_checkpoint.pt",
    }
    seen = example_observations(merged.config)
    torch.testing.assert_close(merged.act(seen), adapter.act(seen), atol=1e-4, rtol=1e-3)
    # Statistics are the dataset's, and travel with both forms.
    stats = Dataset.open(folders / "data").statistics()["action"]
    np.testing.assert_allclose(merged.action_bounds.high.numpy(), stats["q99"])
    np.testing.assert_allclose(adapter.policy.action_bounds.low.numpy(), stats["q01"])


def test_another_architecture_than_the_base_s_is_refused(folders, tmp_path):
    from dataclasses import replace

    config = make_config(folders, tmp_path / "run")
    with pytest.raises(CheckpointError, match="mlp: 48 there, 64 asked for"):
        train(replace(config, student=replace(config.student, mlp=64)))


@pytest.mark.parametrize("suite", ["spatial", "object", "goal", "10"])
def test_presets_have_the_paper_s_values(suite, tmp_path):
    config = preset(f"openvla-oft-libero-{suite}", dataset=tmp_path, output=tmp_path / "run")
    student = config.student
    assert isinstance(student, OpenVLAOFTConfig)
    assert (config.steps, config.batch_size, config.lora.rank, config.optim.lr) == (150_000, 64, 32, 5e-4)
    assert (config.forcing.alpha, config.forcing.pairs, config.teacher) == (
        0.5,
        ((24, -1),),
        "facebook/VGGT-1B",
    )
    assert (len(student.cameras), student.state_dim, student.chunk, student.head) == (2, 8, 8, "l1")
    assert config.optim.milestones == (100_000,)
    assert student.gradient_checkpointing
    assert config.lora.scale_numerator == 16
    assert TrainConfig.from_plain(config.to_plain()) == config
    config.check_paths(data=False)


def test_efficiency_presets():
    short = preset("openvla-oft-libero-10-3pct-steps", dataset="d", output="o")
    assert short.steps == 0.03 * 150_000
    assert short.optim.decay == "constant"
    assert preset("openvla-oft-libero-10-5pct-data", dataset="d", output="o").fraction == 0.05


def test_settings_of_the_student_are_overridden_by_name():
    config = preset("openvla-oft-tiny-libero", dataset="d", output="o", overrides={"student.depth": "2"})
    assert config.student.depth == 2
    with pytest.raises(
        ConfigError, match=r"student\.dephts?.*Did you mean 'depth'|unknown setting 'student.dephts'"
    ):
        preset("openvla-oft-tiny-libero", dataset="d", output="o", overrides={"student.dephts": 2})
    with pytest.raises(ConfigError, match="multiple of 14"):
        preset("openvla-oft-tiny-libero", dataset="d", output="o", overrides={"student.image_size": 30})


def test_the_tiny_preset_is_small_enough_for_a_cpu():
    config = preset("openvla-oft-tiny-libero", dataset="d", output="o")
    student = OpenVLAOFT(config.student)
    assert sum(p.numel() for p in student.parameters()) < 3e6
