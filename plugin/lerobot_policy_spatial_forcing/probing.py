"""A saved LeRobot policy, stock or `_sf`, as a student: of `probe`, `evaluate`, `serve`, held-out errors.

`load_student` finds `load_policy` by this distribution's entry point, so that the core never imports LeRobot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from torch import Tensor, nn

from lerobot_policy_spatial_forcing.configuration_spatial_forcing import SUFFIX
from lerobot_policy_spatial_forcing.families import FAMILIES
from lerobot_policy_spatial_forcing.settings import ForcingSettings
from lerobot_policy_spatial_forcing.student import PolicyStudent
from spatial_forcing.alignment import IMAGE_PREFIX, Alignment
from spatial_forcing.errors import CheckpointError, DataError
from spatial_forcing.protocols import Metrics, Observation
from spatial_forcing.students.base import StudentModule, StudentSpec, evaluating
from spatial_forcing.students.batches import collate

Pipeline = Any
"""One of LeRobot's processor pipelines."""


class LeRobotStudent(StudentModule):
    """A LeRobot policy with its processors: `protocols.Student`, all cameras of its sequence tapped.

    Args:
        policy: a policy of one of `FAMILIES`, stock or forced.
        before: its preprocessor: takes raw batches, images (B, 3, H, W) float in [0, 1].
        after: its postprocessor: actions to environment units.

    Raises:
        CheckpointError: a policy of another family.
    """

    def __init__(self, policy: nn.Module, before: Pipeline, after: Pipeline) -> None:
        super().__init__()
        self.policy, self.before, self.after = policy, before, after
        kind = str(policy.config.type).removesuffix(SUFFIX)  # type: ignore[union-attr]
        if kind not in FAMILIES:
            raise CheckpointError(
                f"policies of type {kind!r} are not known here: where their image tokens are is known for "
                f"{', '.join(FAMILIES)}; add it to families.py of the plugin."
            )
        # Its own settings: every view of the sequence is probed, whichever training aligned.
        self._view = PolicyStudent(policy, FAMILIES[kind], ForcingSettings(alpha=0))
        self._last: tuple[Any, dict[str, Any]] | None = None

    @property
    def config(self) -> Any:
        """LeRobot's configuration of the policy."""
        return self.policy.config

    @property
    def spec(self) -> StudentSpec:
        """What the policy takes and gives, as its configuration says."""
        config = self.config
        state, sizes = config.robot_state_feature, [f.shape for f in config.image_features.values()]
        return StudentSpec(
            cameras=tuple(key.removeprefix(IMAGE_PREFIX) for key in config.image_features),
            image_size=max(sizes[0][-2:]) if sizes else 0,
            state_dim=0 if state is None else state.shape[0],
            action_dim=config.action_feature.shape[0],
            chunk=len(config.action_delta_indices),
            letterboxes=True,
        )

    @property
    def aligned_cameras(self) -> tuple[str, ...]:
        """The views whose tokens are in the tapped sequence, in order."""
        return self.spec.cameras[: self._view.family.views]

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The language model's blocks."""
        return self._view.blocks

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm after the last block."""
        return self._view.final_norm

    def forward(self, batch: Mapping[str, Any], alignment: Alignment | None = None) -> tuple[Tensor, Metrics]:
        """The policy's own loss and metrics."""
        loss, metrics = self.policy(self._processed(batch))
        return loss, dict(metrics or {})

    def alignment(self, batch: Mapping[str, Any]) -> Alignment:
        """Where the tokens of `cameras` are, and how the policy's token images lie in the images."""
        return self._view.alignment(self._processed(batch))

    @torch.no_grad()
    def act(
        self,
        observations: Sequence[Observation],
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Action chunks in environment units, (B, chunk, action_dim) float32 on the CPU.

        A policy that draws noise draws it for the whole batch, from one seed that `generator` gives. With one
        generator a row, each row is a call of its own, so that no row depends on the others.

        Raises:
            DataError: no image of the policy's cameras.
        """
        if isinstance(generator, Sequence):
            rows = zip(observations, generator, strict=True)
            return torch.cat([self.act([seen], own) for seen, own in rows])
        # A view that is not there is LeRobot's to fill in.
        there = [camera for camera in self.spec.cameras if camera in observations[0]["images"]]
        if not there:
            raise DataError(
                f"the observation has the images {sorted(observations[0]['images'])}, and the policy sees "
                f"{list(self.spec.cameras)}; name the cameras as the policy does."
            )
        batch = collate(observations, there, torch.device("cpu"))
        with torch.random.fork_rng(), evaluating(self.policy):
            if generator is not None:
                seed = torch.randint(2**62, (), generator=generator, device=generator.device)
                torch.manual_seed(int(seed))
            actions = self.policy.predict_action_chunk(self._processed(batch))  # type: ignore[operator]
        return self.after(actions).float().cpu()

    def save_pretrained(self, folder: str | Path) -> None:
        """As LeRobot saves it: the policy and both pipelines."""
        self.policy.save_pretrained(folder)  # type: ignore[operator]
        self.before.save_pretrained(folder)
        self.after.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a LeRobot checkpoint's `pretrained_model` folder; nothing of a teacher is loaded.

        Raises:
            CheckpointError: adapters without their base, another family, or no processors beside the policy.
        """
        if (Path(folder) / "adapter_config.json").exists():
            raise CheckpointError(
                f"{folder} holds adapters alone; merge them into their base with PEFT and save that policy."
            )
        config = PreTrainedConfig.from_pretrained(folder)
        config.device = "cpu" if not torch.cuda.is_available() else config.device
        policy = get_policy_class(config.type).from_pretrained(folder, config=config)
        try:
            saved = (Path(folder) / "policy_preprocessor.json").read_text(encoding="utf-8")
            # The device of training may not be here. LeRobot refuses overrides of steps that are not there.
            where = {"device_processor": {"device": config.device}} if "device_processor" in saved else {}
            pipelines = make_pre_post_processors(config, str(folder), preprocessor_overrides=where)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{folder} has no policy_preprocessor.json or policy_postprocessor.json ({error}); give a "
                "pretrained_model folder that lerobot-train wrote."
            ) from error
        return cls(policy.eval(), *pipelines)

    def _processed(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch as the policy takes it; `views` and `layout` of one batch process it once."""
        if self._last is None or self._last[0] is not batch:
            raw = {
                key: _unit(value) if key.startswith(IMAGE_PREFIX) else value for key, value in batch.items()
            }
            made = self.before(raw)
            device = next(self.policy.parameters()).device
            self._last = (batch, {k: v.to(device) if isinstance(v, Tensor) else v for k, v in made.items()})
        return self._last[1]


def _unit(image: Any) -> Any:
    """uint8 images to [0, 1], which LeRobot's processors take."""
    return image.float() / 255 if isinstance(image, Tensor) and image.dtype == torch.uint8 else image


def load_policy(folder: Path) -> LeRobotStudent:
    """What the entry point names: a checkpoint whose `config.json` has a `type`, as LeRobot writes it."""
    return LeRobotStudent.from_pretrained(folder)
