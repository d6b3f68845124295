"""The mixin that makes a stock LeRobot policy a forced one.

The projector lives in the policy's inner model, so that every way in which LeRobot saves, restores, adapts
(PEFT) and shards a policy takes it along; the teacher lives nowhere in it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from lerobot_policy_spatial_forcing.families import Family
from lerobot_policy_spatial_forcing.student import LazyTeacher, PolicyStudent
from spatial_forcing.alignment import IMAGE_PREFIX
from spatial_forcing.errors import CheckpointError, ConfigError, DataError
from spatial_forcing.forcing import SpatialForcing

logger = logging.getLogger(__name__)

NAME = "spatial_forcing"
"""Name of the attribute of the inner model, and so part of the projector's keys."""


class Steps(nn.Module):
    """Optimizer steps so far, saved with the policy: a resumed schedule goes on where it was."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))


class ForcedPolicy:
    """Comes before a stock policy class in the bases of `<type>_sf`."""

    family: Family
    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.loaded_weights = False
        if config.forcing.alpha > 0:
            self._attach()

    def _attach(self) -> None:
        settings, family = self.config.forcing, self.family
        _check_cameras(self.config)
        if settings.needs_steps and settings.schedule_steps is None:
            raise ConfigError(
                "policy.forcing has a schedule, but not the steps of the run; set "
                "--policy.forcing.schedule_steps (lerobot-train fills in --steps)."
            )
        student: Any = PolicyStudent(self, family)
        layer = max(1, round(family.share * len(student.blocks)))
        forcing = SpatialForcing(student, LazyTeacher(self.config), settings.method(layer))
        forcing.steps = Steps()
        self.get_submodule(family.holder).add_module(NAME, forcing)
        self._set_progress()

    @property
    def forcing(self) -> SpatialForcing | None:
        """The alignment, or None where alpha is 0."""
        return getattr(self.get_submodule(self.family.holder), NAME, None)

    # ---- training

    def stock_forward(self, *args: Any, **kwargs: Any) -> Any:
        """LeRobot's own forward."""
        return super().forward(*args, **kwargs)

    def forward(self, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """LeRobot's loss plus the weighted alignment loss, and the metrics of both.

        In eval mode LeRobot's loss alone, comparable with the stock policy's. With `reduction="none"` the
        alignment loss of the batch is added to every sample's.
        """
        forcing = self.forcing
        if forcing is None or not self.training:
            return self.stock_forward(batch, *args, **kwargs)
        if self.config.forcing.needs_steps:
            self._set_progress()  # adapters restore the counter without telling
        forcing.student.with_arguments(*args, **kwargs)
        loss, metrics = forcing(batch)
        return loss, {name: _plain(value) for name, value in metrics.items()}

    def update(self) -> None:
        """Called by LeRobot after every optimizer step: moves the schedule on."""
        if hasattr(super(), "update"):
            super().update()
        if self.forcing is not None:
            self.forcing.steps.count.add_(1)
            self._set_progress()

    def _set_progress(self) -> None:
        steps = self.config.forcing.schedule_steps
        if self.forcing is not None and steps is not None:
            self.forcing.set_progress(int(self.forcing.steps.count), steps)

    def get_optim_params(self) -> Any:
        """LeRobot's parameters, and the projector's where they are not among them.

        Raises:
            ConfigError: nothing that the alignment loss could change is trained; names the flag.
        """
        parameters = super().get_optim_params()
        if self.forcing is None:
            return parameters
        self.check_trainable()
        return with_projector(parameters, self.forcing)

    def check_trainable(self) -> None:
        """Refuse to train when everything below the tap is frozen."""
        forcing = self.forcing
        assert forcing is not None
        k = max(pair.blocks for pair in forcing.pairs)
        parts = [*forcing.student.blocks[:k], *(self.get_submodule(path) for path in self.family.below)]
        if any(p.requires_grad for part in parts for p in part.parameters()):
            return
        peft = hasattr(self, "peft_config")
        remedy = f"--peft.target_modules='{self.family.peft_targets}'" if peft else self.family.unfreeze
        raise ConfigError(frozen_message(self.config.type, k, remedy))

    # ---- loading and saving

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a checkpoint of this policy or of the stock one (the projector then starts from new weights).

        Raises:
            CheckpointError: another policy's checkpoint, or weights that do not fit. (LeRobot's own pi0
                prints a line and goes on with random weights.)
        """
        check_family(pretrained_name_or_path, cls.family.base, kwargs)
        policy = super().from_pretrained(pretrained_name_or_path, **kwargs)
        if not policy.loaded_weights:
            raise CheckpointError(
                f"the weights in {pretrained_name_or_path} were not loaded; LeRobot printed the reason. "
                f"Give a checkpoint of {cls.family.base!r} or {cls.name!r} of the same size."
            )
        policy._set_progress()
        return policy

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As LeRobot does; a stock checkpoint gets the new projector, alpha 0 drops the old one."""
        stored = dict(state_dict)
        mark = f"{self.family.holder}.{NAME}."
        own = {key: value for key, value in self.state_dict().items() if key.startswith(mark)}
        found = [key for key in stored if key.startswith(mark)]
        if own and not found:
            logger.info("the checkpoint holds no projector of Spatial Forcing; it starts from new weights.")
            stored |= own
        elif found and not own:
            logger.info("policy.forcing.alpha is 0: the checkpoint's projector is left out.")
            stored = {key: value for key, value in stored.items() if not key.startswith(mark)}
        result = super().load_state_dict(stored, strict=strict, assign=assign)
        # LeRobot's loaders go on without weights; tied ones alone may be missing.
        self.loaded_weights = 2 * len(result.missing_keys) < len(stored)
        self._set_progress()
        return result

    def _build_peft_config(self, cli_overrides: dict[str, Any]) -> Any:
        """LeRobot's adapters; projector, counters and moments are trained and saved in full beside them."""
        config = super()._build_peft_config(cli_overrides)
        if self.forcing is not None:
            own = [
                f"{NAME}.{name}" if not isinstance(child, nn.ModuleList) else f"{NAME}.{name}.{i}"
                for name, child in self.forcing.named_children()
                for i in range(len(child) if isinstance(child, nn.ModuleList) else 1)  # PEFT takes no lists
            ]
            config.modules_to_save = [*(config.modules_to_save or []), *own]
        return config


def _check_cameras(config: Any) -> None:
    names = [key.removeprefix(IMAGE_PREFIX) for key in config.image_features]
    if not names:
        raise DataError(
            f"{config.type} has no image among its input features {sorted(config.input_features or {})}: the "
            "dataset has no cameras, and Spatial Forcing aligns image tokens. Set --policy.forcing.alpha=0 "
            "or use a dataset with images."
        )
    unknown = [name for name in config.forcing.cameras or [] if name not in names]
    if unknown:
        raise ConfigError(f"policy.forcing.cameras names {unknown}; the policy's cameras are {names}.")
    aligned, cached = config.forcing.cameras or names, config.forcing.cache_cameras
    if cached is not None and len(cached) != len(aligned):
        raise ConfigError(
            f"policy.forcing.cache_cameras {cached} must name one cached camera for each of {aligned}."
        )


def frozen_message(kind: str, blocks: int | None, remedy: str) -> str:
    """What to say when the alignment loss could change nothing."""
    where = "the tap" if blocks is None else f"the tap after {blocks} blocks"
    return (
        f"{kind}: everything below {where} (vision tower, embeddings, decoder blocks) is frozen, so the "
        f"alignment loss would train nothing but its projector. Add {remedy}, or set "
        "--policy.forcing.alpha=0."
    )


def check_family(path: str | Path, base: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose `config.json` names another policy.

    Raises:
        CheckpointError: it does; a checkpoint without a readable one passes, its keys decide.
    """
    file = Path(path) / "config.json"
    if not Path(path).exists():
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(str(path), "config.json", revision=kwargs.get("revision")))
        except Exception as error:  # the policy's own loader reports it
            logger.info("no config.json of %s (%s)", path, error)
            return
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("type")
    except (OSError, ValueError):
        return
    if kind not in (None, base, f"{base}_sf"):
        raise CheckpointError(
            f"{path} is a checkpoint of {kind!r}, not of {base!r}; use --policy.type={kind}_sf, or name a "
            f"checkpoint of {base!r}."
        )


def with_projector(parameters: Any, forcing: nn.Module) -> Any:
    """`parameters` in any form that LeRobot's optimizers take, with those of `forcing` added once."""
    if isinstance(parameters, Mapping):
        # Names choose the learning rate (X-VLA: a tenth for "vlm"), and the projector's norm is no such part.
        own = {id(p) for p in forcing.parameters()}
        named = {k.replace("vlm_norm", "norm") if id(p) in own else k: p for k, p in parameters.items()}
        known = {id(p) for p in named.values()}
        extra = {f"{NAME}.{i}": p for i, p in enumerate(forcing.parameters()) if id(p) not in known}
        return {**named, **{k: p for k, p in extra.items() if p.requires_grad}}
    listed = list(parameters)
    groups = bool(listed) and isinstance(listed[0], Mapping)
    flat: Iterable[Any] = [p for group in listed for p in group["params"]] if groups else listed
    named = bool(listed) and isinstance(listed[0], tuple)
    known = {id(p[1] if named else p) for p in flat}
    missing = [p for p in forcing.parameters() if id(p) not in known and p.requires_grad]
    if not missing:
        return listed
    if groups:
        return [*listed, {"params": missing}]
    return [*listed, *missing]


def _plain(value: Any) -> Any:
    return value.float().mean().item() if isinstance(value, Tensor) else value
