"""What pretraining of `vggt-nano` does: the model's sizes and every setting of the recipe."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro

from spatial_forcing.errors import ConfigError
from spatial_forcing.nano_teacher.scenes import SceneSpec
from spatial_forcing.nano_teacher.tasks import RESERVED_TASKS, TRAIN_TASKS
from spatial_forcing.teachers.dpt import DPTConfig
from spatial_forcing.teachers.vggt.config import CameraHeadConfig, VGGTConfig

NANO = VGGTConfig(
    img_size=128,
    patch_size=16,
    embed_dim=128,
    depth=4,
    num_heads=4,
    num_register_tokens=1,
    patch_embed="stem",
    init_values=1.0,
    camera=CameraHeadConfig(trunk_depth=1, num_heads=4, mlp_ratio=2.0, iterations=2, init_values=1.0),
    dpt=DPTConfig(
        features=24, out_channels=(24, 32, 48, 48), layers=(0, 1, 2, 3), down_ratio=2, hidden_channels=16
    ),
)
"""The shipped teacher: 2.8 M parameters (1.7 M without heads); two views take 10 to 13 ms on a core."""


@dataclass(frozen=True)
class PretrainConfig:
    """What `spatial-forcing teacher pretrain` does; the defaults are the shipped recipe.

    Attributes:
        out: run folder (scenes, checkpoint, metrics, weights).
        scenes: where the rendered scenes are, or come to be; None: in the run's folder.
        train_scenes: rendered training scenes of three views with cameras anywhere; about 0.25 MB each.
        policy_scenes: more of them, with cameras near those that policies use.
        policy_share: share of the batches that come from those.
        init_from: weights to start from (a folder that an earlier run wrote), or None.
        refine_depth: train nothing but the depth head, on relative errors (which AbsRel means) instead of
            logarithmic ones; features and cameras stay as `init_from` has them.
        test_scenes: rendered scenes of the reserved tasks.
        steps: optimizer steps.
        minutes: stop (with the learning rate decayed) after this much training time; None: no limit.
        views_per_step: views in a batch; a step draws scenes with 1, 2 or 3 of their views.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        muon_learning_rate: of Muon, which trains the blocks' matrices; 0 leaves them to AdamW.
        warmup_steps: of linear warm-up, before cosine decay.
        clip: largest norm of a step's gradient.
        ema_decay: of the weight average that is evaluated and exported.
        point_every: the point head is trained in every n-th step (it costs as much as the depth head).
        seed: of scenes, initial weights and batches.
        threads: CPU threads of torch.
        cpu: leave a GPU alone.
        checkpoint_minutes: between checkpoints; each also writes the averaged weights.
        log_every: steps between lines of `metrics.jsonl`.
        model: sizes of the VGGT; from Python only.
    """

    out: Path = Path("runs/vggt-nano")
    scenes: Path | None = None
    train_scenes: int = 14000
    policy_scenes: int = 9600
    policy_share: float = 0.35
    init_from: Path | None = None
    refine_depth: bool = False
    test_scenes: int = 896
    steps: int = 40000
    minutes: float | None = 75.0
    views_per_step: int = 12
    learning_rate: float = 1e-3
    muon_learning_rate: float = 0.02
    weight_decay: float = 0.05
    warmup_steps: int = 200
    clip: float = 1.0
    ema_decay: float = 0.998
    point_every: int = 4
    seed: int = 0
    threads: int = 1
    cpu: bool = False
    checkpoint_minutes: float = 5.0
    log_every: int = 50
    model: tyro.conf.Suppress[VGGTConfig] = field(default_factory=lambda: NANO)

    def __post_init__(self) -> None:
        positive = (
            "train_scenes",
            "test_scenes",
            "steps",
            "log_every",
            "point_every",
            "threads",
            "learning_rate",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise ConfigError(f"pretraining's {name} is {getattr(self, name)}; it must be positive.")
        if self.views_per_step < 3:
            raise ConfigError(
                f"views_per_step is {self.views_per_step}; it must be 3 or more (views of a scene)."
            )
        if self.minutes is not None and self.minutes <= 0:
            raise ConfigError(f"minutes is {self.minutes}; it must be positive, or left out.")
        if self.refine_depth and self.init_from is None:
            raise ConfigError(
                "refine_depth trains the depth head of a trained model; name its weights with init_from."
            )
        if self.muon_learning_rate < 0:
            raise ConfigError(f"muon_learning_rate is {self.muon_learning_rate}; it must not be negative.")
        if not 0 <= self.policy_share <= 1:
            raise ConfigError(f"policy_share is {self.policy_share}; it must lie in [0, 1].")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay is {self.ema_decay}; it must lie in [0, 1).")

    @property
    def train_spec(self) -> SceneSpec:
        """Training scenes: cluttered and repainted."""
        return SceneSpec(TRAIN_TASKS, self.train_scenes, size=self.model.img_size, seed=self.seed)

    @property
    def policy_spec(self) -> SceneSpec:
        """Training scenes seen from near a policy's cameras."""
        return replace(self.train_spec, count=self.policy_scenes, seed=self.seed + 10, cameras="near-policy")

    @property
    def policy_test_spec(self) -> SceneSpec:
        """Test scenes seen by exactly a policy's two cameras."""
        count = max(self.test_scenes // 2, 1)
        return replace(self.test_spec, count=count, views=2, seed=self.seed + 12, cameras="policy")

    @property
    def test_spec(self) -> SceneSpec:
        """Test scenes: reserved tasks as the benchmark looks, cameras from another seed."""
        return SceneSpec(
            RESERVED_TASKS, self.test_scenes, size=self.model.img_size, seed=self.seed + 2, plain=True
        )

    def comparable(self) -> dict[str, Any]:
        """The settings that must not change when a run is resumed.

        How long it runs, and where, may, and so may the learning rates: a run that diverged needs lower ones.
        """
        free = {
            "learning_rate",
            "muon_learning_rate",
            "out",
            "scenes",
            "init_from",
            "steps",
            "minutes",
            "threads",
            "cpu",
            "checkpoint_minutes",
            "log_every",
            "test_scenes",
        }
        return json.loads(json.dumps({k: v for k, v in asdict(self).items() if k not in free}, default=str))
