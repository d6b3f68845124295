"""What is refused, before anything heavy or at the first step, and what the message says."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import lerobot_policy_spatial_forcing as plugin
import pytest
import torch
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.transforms import ImageTransformConfig, ImageTransformsConfig
from lerobot_policy_spatial_forcing.guards import check_training, check_transforms
from lerobot_policy_spatial_forcing.settings import ForcingSettings

from plugin.tests.builders import FAMILIES, features
from spatial_forcing.errors import ConfigError, DataError, EnvironmentSetupError
from spatial_forcing.teachers.cache.build import build_cache
from spatial_forcing.teachers.cache.source import SourceEpisode
from tests.fakes import FakeTeacher

PI0, SMOLVLA = FAMILIES["pi0"], FAMILIES["smolvla"]


def training(family, transforms=None, peft=None, **changes):
    config = family.config(f"{family.name}_sf", forcing=ForcingSettings(teacher="fake"), **changes)
    dataset = DatasetConfig("owner/data", image_transforms=transforms or ImageTransformsConfig())
    return TrainPipelineConfig(dataset=dataset, policy=config, steps=77, peft=peft, num_workers=0)


def test_validate_checks_and_fills_in_the_steps(tmp_path):
    config = training(PI0)
    config.output_dir = tmp_path / "run"
    config.validate()
    assert config.policy.forcing.schedule_steps == 77


def test_transforms_that_move_pixels_are_refused_before_the_dataset_is_opened(tmp_path):
    config = training(PI0, ImageTransformsConfig(enable=True))
    config.output_dir = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"moves pixels: affine \(RandomAffine\).*image_transforms\.tfs"):
        config.validate()
    config.policy.forcing = replace(config.policy.forcing, alpha=0.0)
    check_training(config)


def test_colour_and_unused_transforms_pass():
    tfs = {
        "hue": ImageTransformConfig(type="ColorJitter", kwargs={"hue": 0.1}),
        "affine": ImageTransformConfig(type="RandomAffine", weight=0.0, kwargs={"degrees": 5}),
    }
    check_transforms(ImageTransformsConfig(enable=True, tfs=tfs))
    check_transforms(ImageTransformsConfig(enable=False))


def test_a_policy_frozen_below_the_tap_is_refused_with_the_flag():
    frozen = {"train_expert_only": True, "freeze_vision_encoder": True}
    with pytest.raises(ConfigError, match=r"--policy\.train_expert_only=false --policy\.freeze_vis"):
        check_training(training(SMOLVLA, **frozen))
    check_training(training(SMOLVLA, peft=SimpleNamespace(), **frozen))  # adapters may lie below
    with pytest.raises(
        ConfigError, match=r"smolvla_sf: everything below the tap after 2 blocks .* is frozen"
    ):
        SMOLVLA.forced(**frozen).get_optim_params()
    with pytest.raises(ConfigError, match=r"--policy\.train_expert_only=false"):
        check_training(training(PI0, train_expert_only=True))


@pytest.mark.parametrize("family", [PI0, SMOLVLA], ids=["pi0", "smolvla"])
def test_lerobots_default_adapters_sit_beside_the_tap_and_are_refused(family, tmp_path):
    policy = family.forced()
    policy.config.pretrained_path = str(tmp_path)
    adapted = policy.wrap_with_peft(peft_cli_overrides={"r": 2})
    with pytest.raises(ConfigError, match=r"--peft\.target_modules="):
        adapted.get_optim_params()


def test_cameras_that_do_not_match():
    with pytest.raises(ConfigError, match=r"names \['top'\]; the policy's cameras are \['front', 'wrist'\]"):
        PI0.forced({"cameras": ["top"]})
    with pytest.raises(ConfigError, match="one cached camera for each"):
        PI0.forced({"cache_cameras": ["top"]})
    policy = PI0.forced({"cameras": ["wrist"]}).train()
    batch = PI0.batch()
    del batch["observation.images.wrist"]
    with pytest.raises(DataError, match=r"names \['wrist'\], and the batch has \['front'\]"):
        policy(batch)
    for name in list(batch):
        if name.startswith("observation.images."):
            batch["observation.images.other"] = batch.pop(name)
    with pytest.raises(DataError, match="rename_map"):
        policy(batch)


def test_a_dataset_without_images():
    inputs = features((40, 40), cameras=())["input_features"]
    with pytest.raises(DataError, match="no image among its input features"):
        PI0.forced(input_features=inputs)


def test_bad_settings_are_refused_when_the_configuration_is_made():
    with pytest.raises(ConfigError, match=r"forcing\.alpha is -1"):
        PI0.config("pi0_sf", forcing=ForcingSettings(alpha=-1))
    with pytest.raises(ConfigError, match="differ in length"):
        PI0.config("pi0_sf", forcing=ForcingSettings(layers=[1, 2, 3], teacher_layers=[0, 1]))
    with pytest.raises(ConfigError, match="schedule_steps"):
        PI0.forced({"schedule": "cosine"})
    with pytest.raises(ConfigError, match="student layer 9"):
        PI0.forced({"layers": [9]})


@pytest.mark.parametrize(("found", "message"), [(None, "is not installed"), ("0.4.4", r"LeRobot 0\.4\.4")])
def test_another_lerobot_is_refused(found, message):
    with pytest.raises(EnvironmentSetupError, match=message):
        plugin.check_lerobot_version(found)


def test_an_import_failure_is_visible(tmp_path):
    """LeRobot only logs it; the module says it on stderr, in words."""
    import subprocess
    import sys

    code = (
        "import importlib.metadata as m, sys; real = m.version;m.version = lambda name: '0.4.4' if name == "
        "'lerobot' else real(name);import lerobot_policy_spatial_forcing"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "policy types that end in _sf will be unknown" in found.stderr


class Frames:
    """Two episodes of the images that batches with `index` 100 and 101 hold."""

    identity = "frames"
    cameras = ("front", "wrist")
    wanted = None
    episodes = (SourceEpisode(100, 2, 0, "a"),)

    def __init__(self, batch):
        self.batch = batch

    def images(self, indices, camera):
        image = self.batch[f"observation.images.{camera}"][indices - 100]
        return (image * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

    def present(self, indices, camera):
        return torch.ones(len(indices), dtype=torch.bool).numpy()


def test_features_from_the_cache_are_those_of_the_live_teacher(tmp_path):
    batch = PI0.batch(seed=1)
    for key in batch:
        if key.startswith("observation.images."):
            batch[key] = (batch[key] * 255).round() / 255
    build_cache(FakeTeacher(), Frames(batch), tmp_path / "cache", dtype="bf16", progress=False)
    losses = []
    for forcing in ({}, {"cache": str(tmp_path / "cache"), "teacher": "does-not-exist"}):
        policy = PI0.forced(forcing).train()
        torch.manual_seed(2)
        losses.append(policy(batch)[1]["align_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=5e-3)
    renamed = PI0.forced({"cache": str(tmp_path / "cache"), "cameras": ["wrist", "front"]}).train()
    with pytest.raises(DataError, match=r"caches the cameras \('front', 'wrist'\)"):
        renamed(batch)
    batch["index"] = batch["index"] + 50
    with pytest.raises(DataError, match=r"frames .* are not in"):
        policy(batch)
