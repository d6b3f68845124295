"""Checks on `lerobot-train`'s whole configuration, before anything heavy starts.

A policy sees only its own section; what breaks the alignment stands elsewhere (image transforms, PEFT), so
the check is added to `TrainPipelineConfig.validate`, in memory.
"""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from typing import Any

from lerobot.configs.train import TrainPipelineConfig

from lerobot_policy_spatial_forcing.configuration_spatial_forcing import ForcedConfig
from lerobot_policy_spatial_forcing.policy import frozen_message
from spatial_forcing.errors import ConfigError

PHOTOMETRIC = frozenset(
    {
        "CoarseDropout",
        "ColorJitter",
        "GammaCorrection",
        "GaussianBlur",
        "GaussianNoise",
        "GaussianPatchBrightness",
        "Identity",
        "JPEGCompression",
        "MotionBlur",
        "PlanckianJitter",
        "RandomAdjustSharpness",
        "RandomAutocontrast",
        "RandomEqualize",
        "RandomGrayscale",
        "RandomPhotometricDistort",
        "RandomPosterize",
        "RandomShadow",
        "SharpnessJitter",
    }
)
"""Transforms that leave every pixel where it is; others are refused."""


def install() -> None:
    """Check every training configuration from now on; a second call changes nothing."""
    stock = TrainPipelineConfig.validate
    if getattr(stock, "checks_spatial_forcing", False):
        return

    @wraps(stock)
    def validate(self: TrainPipelineConfig) -> None:
        stock(self)
        if isinstance(self.policy, ForcedConfig):
            check_training(self)

    validate.checks_spatial_forcing = True  # type: ignore[attr-defined]
    TrainPipelineConfig.validate = validate  # type: ignore[method-assign]


def check_training(config: Any) -> None:
    """Complete and check a training configuration whose policy is forced.

    Raises:
        ConfigError: transforms that move pixels, images normalised by the dataset's own statistics, or a
            policy frozen below the tap; names the flag.
    """
    policy: Any = config.policy
    if policy.forcing.schedule_steps is None:
        policy.forcing = replace(policy.forcing, schedule_steps=config.steps)
    if policy.forcing.alpha == 0:
        return
    check_transforms(config.dataset.image_transforms)
    if policy.family.by_dataset and not config.dataset.use_imagenet_stats:
        raise ConfigError(
            f"{policy.type} gets its images normalised by the dataset's statistics, which cannot be undone "
            "for the teacher; set --dataset.use_imagenet_stats=true, LeRobot's default."
        )
    if config.peft is None and not policy.use_peft and policy.family.frozen(policy):
        raise ConfigError(frozen_message(policy.type, None, policy.family.unfreeze))


def check_transforms(transforms: Any) -> None:
    """Refuse image transforms that move pixels.

    LeRobot draws them for each camera and does not say what it drew: the teacher's views would no longer
    fit together, and cached features would belong to other pixels.

    Raises:
        ConfigError: such a transform is enabled.
    """
    if not transforms.enable:
        return
    moving = {
        name: entry.type
        for name, entry in transforms.tfs.items()
        if entry.weight > 0 and entry.type not in PHOTOMETRIC
    }
    if moving:
        listed = ", ".join(f"{name} ({kind})" for name, kind in moving.items())
        raise ConfigError(
            f"dataset.image_transforms moves pixels: {listed}. LeRobot draws it for each camera again, which "
            "breaks the geometry between the views that the teacher encodes together. Set the weight to 0 in "
            "--dataset.image_transforms.tfs, or leave it out there (colour, sharpness and noise are fine)."
        )
