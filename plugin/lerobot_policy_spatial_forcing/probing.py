"""A saved LeRobot policy, stock or `_sf`, as a student of `spatial-forcing probe`.

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
from spatial_forcing.students.batches import collate

Pipeline = Any
"""One of LeRobot's processor pipelines."""


class LeRobotStudent(nn.Module):
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
                f"policies of type {kind!r} cannot be probed: where their image tokens are is known for "
                f"{', '.join(FAMILIES)}; add it to families.py of the plugin."
            )
        # Its own settings: every view of the sequence is probed, whichever training aligned.
        self._view = PolicyStudent(policy, FAMILIES[kind], ForcingSettings(alpha=0))
        self._last: tuple[Any, dict[str, Any]] | None = None

    @property
    def cameras(self) -> tuple[str, ...]:
        """The views whose tokens are in the tapped sequence, in order."""
        config: Any = self.policy.config
        keys = list(config.image_features)[: self._view.family.views]
        return tuple(key.removeprefix(IMAGE_PREFIX) for key in keys)

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

        A policy that draws noise draws it for the whole batch, from one seed that `generator` gives.

        Raises:
            DataError: one generator a row, which LeRobot's policies cannot use.
        """
        if isinstance(generator, Sequence):
            raise DataError("LeRobot's policies draw noise for a whole batch; pass one generator, no list.")
        batch = collate(observations, self.cameras, torch.device("cpu"))
        with torch.random.fork_rng():
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
            self._last = (batch, self.before(raw))
        return self._last[1]


def _unit(image: Any) -> Any:
    """uint8 images to [0, 1], which LeRobot's processors take."""
    return image.float() / 255 if isinstance(image, Tensor) and image.dtype == torch.uint8 else image


def load_policy(folder: Path) -> LeRobotStudent:
    """What the entry point names: a checkpoint whose `config.json` has a `type`, as LeRobot writes it."""
    return LeRobotStudent.from_pretrained(folder)
