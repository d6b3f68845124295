"""A LeRobot policy as `SpatialForcing` sees it, and its teacher, loaded when it is first needed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from lerobot.utils.constants import IMAGENET_STATS
from torch import Tensor, nn

from lerobot_policy_spatial_forcing.families import Family
from lerobot_policy_spatial_forcing.settings import ForcingSettings
from spatial_forcing.alignment import IMAGE_PREFIX, Alignment, TokenLayout, Views
from spatial_forcing.data.geometry import Size, inside, sampling_grid, warp
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.forcing.layout import tokens_valid
from spatial_forcing.protocols import Metrics, Teacher
from spatial_forcing.teachers import load_teacher
from spatial_forcing.teachers.cache import CachedTeacher

logger = logging.getLogger(__name__)


class PolicyStudent:
    """The part of `protocols.Student` that the alignment needs, for a policy that owns the projector.

    No `nn.Module`: the policy is the module, this is a view of it.

    Args:
        policy, family: what is looked at.
        settings: which cameras; default those of the policy's configuration, as it is at each call.
    """

    def __init__(self, policy: Any, family: Family, settings: ForcingSettings | None = None) -> None:
        self.policy, self.family, self._settings = policy, family, settings
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    @property
    def settings(self) -> ForcingSettings:
        """Which cameras are meant, and what a cache calls them."""
        return self.policy.config.forcing if self._settings is None else self._settings

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The language model's blocks."""
        return list(getattr(self._language_model, self.family.blocks))

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm after the last block."""
        return None if self.family.norm is None else getattr(self._language_model, self.family.norm)

    def parameters(self) -> Any:
        """The policy's parameters."""
        return self.policy.parameters()

    def with_arguments(self, *args: Any, **kwargs: Any) -> Self:
        """Pass these on to the stock policy's next forward."""
        self._arguments = (args, kwargs)
        return self

    def __call__(
        self, batch: Mapping[str, Any], alignment: Alignment | None = None
    ) -> tuple[Tensor, Metrics]:
        """The stock policy's loss."""
        args, kwargs = self._arguments
        loss, metrics = self.policy.stock_forward(batch, *args, **kwargs)
        return loss, dict(metrics or {})

    def alignment(self, batch: Mapping[str, Any]) -> Alignment:
        """The tokens of the aligned views, and the images as delivered.

        Raises:
            DataError: no image, or a camera that `forcing.cameras` names is missing from the batch.
        """
        shown = self._shown(batch)
        chosen = self._chosen(shown)
        layout, views = self._layout(batch, shown, chosen), self._views(batch, chosen)
        return Alignment(layout, views, sequence=self.family.sequence)

    def _layout(self, batch: Mapping[str, Any], shown: list[str], chosen: list[str]) -> TokenLayout:
        """Tokens on padding are invalid."""
        found = self.family.layout(self.policy, batch, shown)
        columns = [shown.index(key) for key in chosen]
        layout = TokenLayout(found.index[:, columns], found.valid[:, columns])
        if not self.family.bars:
            return layout
        grid = (layout.index.shape[2], layout.index.shape[3])
        masks = []
        for key in chosen:
            source: Size = (batch[key].shape[-2], batch[key].shape[-1])
            framing, size = self.family.framing(self.policy, source)
            masks.append(inside(sampling_grid(framing[None], size), source)[0])
        if len({mask.shape for mask in masks}) == 1:
            picture = tokens_valid(torch.stack(masks)[None], grid).to(layout.valid.device)
            layout = replace(layout, valid=layout.valid & picture)
        return layout

    def _views(self, batch: Mapping[str, Any], keys: list[str]) -> Views:
        """The images as delivered, and how the token image lies in them; pixels only for a live teacher."""
        images = [batch[key] for key in keys]
        maps, sizes = zip(
            *(self.family.framing(self.policy, tuple(i.shape[-2:])) for i in images), strict=True
        )
        device, B = images[0].device, len(images[0])
        index = batch.get("index")
        names = self.settings.cache_cameras or [key.removeprefix(IMAGE_PREFIX) for key in keys]
        common: dict[str, Any] = {
            "cameras": names,
            "keys": None if index is None else index.reshape(B).long(),
            "present": self._present(batch, keys),
        }
        if len({image.shape[-2:] for image in images}) == 1:
            framed = torch.stack([m.to(device) for m in maps]).expand(B, len(keys), 2, 3)
            return Views.create(
                lambda: torch.stack([self._pixels(image) for image in images], 1),
                student_to_view=framed,
                shape=(B, len(keys), images[0].shape[-2], images[0].shape[-1]),
                device=device,
                **common,
            )
        if self.settings.cache is not None:
            raise DataError(
                f"the cameras differ in size ({[tuple(i.shape[-2:]) for i in images]}), so they cannot have "
                "been cached together; train with a live teacher, or align cameras of one size "
                "(forcing.cameras)."
            )
        # Views of different sizes cannot be encoded together; the teacher sees their token images.
        shown, valid = [], []
        for image, framing, size in zip(images, maps, sizes, strict=True):
            many = framing.expand(B, 2, 3)
            shown.append(warp(self._pixels(image).float().cpu(), many, size).to(device))
            picture = inside(sampling_grid(framing[None], size), tuple(image.shape[-2:]))
            valid.append(picture.expand(B, *size).to(device))
        return Views.create(torch.stack(shown, 1), valid=torch.stack(valid, 1), **common)

    def _pixels(self, image: Tensor) -> Tensor:
        """The last frame in [0, 1], (B, 3, H, W)."""
        image = image[:, -1] if image.ndim == 5 else image
        if not self.family.imagenet:
            return image
        mean, std = (image.new_tensor(IMAGENET_STATS[k]).flatten()[:, None, None] for k in ("mean", "std"))
        return image * std + mean

    @property
    def _language_model(self) -> Any:
        return self.policy.get_submodule(self.family.language_model)

    def _shown(self, batch: Mapping[str, Any]) -> list[str]:
        """Keys of the views in the batch, in the order in which the policy embeds them."""
        keys = [key for key in self.policy.config.image_features if key in batch]
        if not keys:
            raise DataError(
                f"the batch holds none of the policy's images {list(self.policy.config.image_features)}; it "
                f"has {sorted(k for k in batch if k.startswith(IMAGE_PREFIX)) or 'no images'}. Use "
                "--rename_map, or a dataset with these cameras."
            )
        return keys[: self.family.views]

    def _chosen(self, shown: list[str]) -> list[str]:
        wanted = self.settings.cameras
        if wanted is None:
            return shown
        if missing := [name for name in wanted if IMAGE_PREFIX + name not in shown]:
            there = [key.removeprefix(IMAGE_PREFIX) for key in shown]
            raise DataError(
                f"policy.forcing.cameras names {missing}, and the batch has {there}; correct the names."
            )
        return [IMAGE_PREFIX + name for name in wanted]

    def _present(self, batch: Mapping[str, Any], keys: Sequence[str]) -> Tensor:
        masks = [batch.get(f"{key}_padding_mask") for key in keys]
        image = batch[keys[0]]
        here = torch.ones(len(image), dtype=torch.bool, device=image.device)
        return torch.stack([here if mask is None else mask.bool() for mask in masks], 1)


class LazyTeacher:
    """A `protocols.Teacher` whose weights are loaded by the first batch: evaluation never needs them.

    Its width and depth, which the projector needs, are kept in the policy's configuration.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._teacher: Teacher | None = None
        self._device: torch.device | str = "cpu"
        if self.settings.teacher_dim is None or self.settings.teacher_depth is None:
            teacher = self.loaded
            config.forcing = replace(self.settings, teacher_dim=teacher.dim, teacher_depth=teacher.depth)

    @property
    def settings(self) -> ForcingSettings:
        """Those of the policy's configuration, as they are now."""
        settings: ForcingSettings = self._config.forcing
        return settings

    @property
    def loaded(self) -> Teacher:
        """The teacher itself, or its cache.

        Raises:
            ConfigError: it is another one than the projector was made for.
        """
        if self._teacher is None:
            settings = self.settings
            with torch.random.fork_rng(devices=[]):  # whatever loading draws, training is not shifted
                teacher = self._load()
            known = (settings.teacher_dim or teacher.dim, settings.teacher_depth or teacher.depth)
            if known != (teacher.dim, teacher.depth):
                raise ConfigError(
                    f"teacher {teacher.name!r} has {teacher.dim} channels and {teacher.depth} layers; the "
                    f"policy was trained with one of {known[0]} and {known[1]}. Name that one in "
                    "--policy.forcing.teacher (or .cache)."
                )
            self._teacher = teacher.to(self._device)
        return self._teacher

    def _load(self) -> Teacher:
        settings = self.settings
        if settings.cache is not None:
            return CachedTeacher(settings.cache)
        return load_teacher(
            settings.teacher,
            resolution=settings.teacher_resolution,
            dtype=settings.teacher_dtype,
            device=self._device,
        )

    @property
    def dim(self) -> int:
        """Channels of one feature."""
        return self.settings.teacher_dim or self.loaded.dim

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.settings.teacher_depth or self.loaded.depth

    @property
    def projected(self) -> bool:
        """Whether the features are coordinates in a basis, as those of a cache may be."""
        return self.settings.cache is not None and self.loaded.projected

    @property
    def name(self) -> str:
        """The loaded teacher's, like all that follows."""
        return self.loaded.name

    @property
    def patch(self) -> int:
        """Pixels on a side of one patch."""
        return self.loaded.patch

    @property
    def resolution(self) -> int:
        """Pixels on a side at which views are encoded."""
        return self.loaded.resolution

    @property
    def licence(self) -> str:
        """SPDX identifier of the weights' licence."""
        return self.loaded.licence

    @property
    def fingerprint(self) -> str:
        """Changes when weights, config or preprocessing change."""
        return self.loaded.fingerprint

    def features(self, views: Views, layers: Sequence[int] = (-1,)) -> tuple[Tensor, ...]:
        """The loaded teacher's features."""
        return self.loaded.features(views, layers)

    def to(self, device: torch.device | str) -> Self:
        """Move it, or load it there later."""
        self._device = device
        if self._teacher is not None:
            self._teacher.to(device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self
