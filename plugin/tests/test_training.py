"""`lerobot-train` itself on a small dataset: schedule, checkpoint, resume, and equality at weight 0."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.scripts.lerobot_train import train
from lerobot_policy_spatial_forcing.settings import ForcingSettings
from safetensors.torch import load_file

from plugin.tests.builders import ACTION, CAMERAS, FAMILIES, STATE
from spatial_forcing.data import DatasetWriter

FAMILY = FAMILIES["pi0"]
train = getattr(train, "__wrapped__", train)  # without the command line


class Words:
    """Stands in for PaliGemma's tokenizer, which has to be downloaded."""

    def __call__(self, text, max_length=8, **options):
        rows = 1 if isinstance(text, str) else len(text)
        ids = torch.arange(1, max_length + 1).expand(rows, max_length).clone()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "set"
    rng = np.random.default_rng(0)
    writer = DatasetWriter.create(
        root, fps=10, cameras=dict.fromkeys(CAMERAS, (40, 40)), state_dim=STATE, action_dim=ACTION
    )
    for _ in range(2):
        for _ in range(8):
            images = {camera: rng.integers(0, 255, (40, 40, 3), dtype=np.uint8) for camera in CAMERAS}
            state, action = (rng.normal(size=n).astype(np.float32) for n in (STATE, ACTION))
            writer.add_frame({"images": images, "state": state, "action": action}, task="touch the cube")
        writer.save_episode()
    writer.finalize()
    return root


def run(dataset, output, kind, forcing=None, steps=4, resume=None, **changes):
    """Train in this process and return the folder of the last checkpoint."""
    settings = {}
    if forcing is not None:
        settings["forcing"] = ForcingSettings(teacher="fake", pairs=((2, -1),), **forcing)
    features = {"input_features": {}, "output_features": {}}
    config = TrainPipelineConfig(
        dataset=DatasetConfig("owner/data", root=str(dataset), video_backend="pyav"),
        policy=FAMILY.config(kind, **features, **settings, **changes),
        output_dir=output,
        steps=steps,
        batch_size=2,
        num_workers=0,
        save_freq=2,
        log_freq=1,
        env_eval_freq=0,
        seed=5,
        dataloader_multiprocessing_context=None,
    )
    if resume is not None:
        config.resume, config.checkpoint_path = True, resume
        config.optimizer = config.policy.get_optimizer_preset()
        config.scheduler = config.policy.get_scheduler_preset()
        config.policy.pretrained_path = resume / "pretrained_model"
        config._resolve_pretrained_from_cli = lambda: None
    tokenizer = mock.patch(
        "lerobot.processor.tokenizer_processor.AutoTokenizer",
        SimpleNamespace(from_pretrained=lambda *a, **k: Words()),
    )
    with FAMILY.small(), tokenizer:
        train(config)
    return output / "checkpoints" / f"{steps:06d}"


def weights(checkpoint):
    return load_file(checkpoint / "pretrained_model" / "model.safetensors")


def test_weight_zero_trains_the_stock_policy_bit_by_bit(dataset, tmp_path):
    stock = weights(run(dataset, tmp_path / "stock", "pi0"))
    control = weights(run(dataset, tmp_path / "control", "pi0_sf", {"alpha": 0.0}))
    assert control.keys() == stock.keys()
    assert all(torch.equal(control[name], stock[name]) for name in stock)


def test_a_resumed_run_goes_on_with_projector_and_schedule(dataset, tmp_path):
    """LeRobot draws other noise after a resume, so weights agree up to a few small steps, not bit by bit."""
    schedule = {"schedule": "linear", "warmup": 0.2}
    whole = run(dataset, tmp_path / "whole", "pi0_sf", schedule)
    half = whole.parent / "000002"
    resumed = run(dataset, tmp_path / "resumed", "pi0_sf", schedule, resume=half)
    expected, found = weights(whole), weights(resumed)
    assert [name for name in expected if "spatial_forcing.projector" in name]
    assert found["model.spatial_forcing.steps.count"] == expected["model.spatial_forcing.steps.count"] == 4
    for name in expected:  # a new projector would differ by far more
        torch.testing.assert_close(found[name], expected[name], atol=5e-4, rtol=0)
