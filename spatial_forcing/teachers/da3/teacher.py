"""Depth Anything 3 as a frozen teacher.

Shapes: B batch, V views, h x w patch grid, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from spatial_forcing.alignment import Views
from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.registry import did_you_mean
from spatial_forcing.teachers.cards import (
    RANDOM,
    RANDOM_LICENCE,
    TEACHERS,
    UNKNOWN_LICENCE,
    Framing,
    TeacherCard,
    TeacherFacts,
    check_variant,
)
from spatial_forcing.teachers.da3.backbone import REFERENCES, Reference
from spatial_forcing.teachers.da3.config import DA3Config
from spatial_forcing.teachers.da3.loading import DA3Source, find_da3, load_da3, published_name
from spatial_forcing.teachers.da3.model import DA3, HEADS
from spatial_forcing.teachers.da3.preprocess import RESIZE_RULE, resize, resized_sizes
from spatial_forcing.teachers.frozen import DEFAULT_MEMORY, SceneTeacher, lower_weights, random_stream
from spatial_forcing.teachers.pose import encode_pose
from spatial_forcing.teachers.preprocess import IMAGENET_MEAN, IMAGENET_STD, Framed, place

Half = Literal["both", "local", "global"]
ViewMode = Literal["together", "alone"]
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "half": ("both", "local", "global"),
    "reference": REFERENCES,
    "views": ("together", "alone"),
}
"""What a name may say after `?`, the default first."""
RESOLUTION = 504
"""Pixels of the longer side, as published: 36 patches."""


class DA3Teacher(SceneTeacher):
    """A frozen Depth Anything 3 that implements `protocols.Teacher`; `predict` gives depth and cameras.

    Layer k is block k. An any-view model's features are the state after the newest block that saw each view
    alone beside that of block k with the final norm; blocks of an odd number from the model's start on attend
    to all views. A single-view model's (METRIC, MONO) are block k's with the final norm.

    Args:
        model: the network; put in eval mode, its parameters stop requiring gradients.
        name: registry name, hub id or path.
        licence: SPDX identifier of the weights.
        half: "both" halves of an any-view model's features, as released, or one of them.
        reference: which of three or more views is the reference. The default is the first, so that features
            do not depend on which view looks like the middle of the others ("saddle_balanced", as released).
        views: encode the views of a sample "together", or each "alone".
        resolution: pixels of the longer side at which views are encoded; default 504, as published.
        dtype: float32, or the type of the matrix products (bfloat16, float16). The backbone's weights are
            then kept in it; norms, residual stream, heads and results stay float32.
        framing, memory: see `frozen.FrozenTeacher`.
        compile: True compiles the blocks with `torch.compile`; a text names its backend.

    Raises:
        ConfigError: like `frozen.FrozenTeacher`; a half of a single-view model.
    """

    heads = HEADS

    def __init__(
        self,
        model: DA3,
        *,
        name: str,
        licence: str,
        half: Half = "both",
        reference: Reference = "first",
        views: ViewMode = "together",
        resolution: int | None = None,
        dtype: torch.dtype = torch.float32,
        framing: Framing = "fit",
        memory: int = DEFAULT_MEMORY,
        compile: bool | str = False,
    ) -> None:
        self.model = model
        self.half, self.reference, self.views = half, reference, views
        own = min(RESOLUTION, model.config.img_size) // model.config.patch_size * model.config.patch_size
        super().__init__(
            model,
            name=name,
            licence=licence,
            resolution=own if resolution is None else resolution,
            dtype=dtype,
            framing=framing,
            memory=memory,
        )
        if half != "both" and not model.config.any_view:
            raise ConfigError(f"{name!r} sees every view alone; its features have no {half!r} half.")
        lower_weights(model.backbone, dtype)
        if compile:
            for block in model.backbone.blocks:
                block.compile(backend="inductor" if compile is True else compile)

    @property
    def dim(self) -> int:
        """C, channels of one feature."""
        return self.model.config.output_dim if self.half == "both" else self.model.config.embed_dim

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.model.config.depth

    @property
    def patch(self) -> int:
        """Pixels on a side of one patch."""
        return self.model.config.patch_size

    @property
    def _head_layers(self) -> int:
        return len(self.model.config.head.layers)

    def _weights(self) -> dict[str, Tensor]:
        # The heads do not count: they do not change the features.
        return {published_name(f"backbone.{k}"): v for k, v in self.model.backbone.state_dict().items()}

    def _facts(self) -> dict[str, Any]:
        variant = {"half": self.half, "reference": self.reference, "views": self.views}
        return {"config": self.model.config.to_dict(), "resize": RESIZE_RULE, **variant}

    def _bytes(self, views: int, height: int, width: int, layers: int) -> int:
        return self.model.backbone.activation_bytes(views, height, width, layers)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        return resized_sizes((height, width), self.resolution, self.patch)[1]

    def _frame(self, images: Tensor, valid: Tensor) -> Framed:
        return place(resize(images, self.resolution, self.patch), valid, self.resolution, self.framing)

    def features(self, views: Views, layers: Sequence[int] = (-1,)) -> tuple[Tensor, ...]:
        """See `SceneTeacher.features`.

        Raises:
            ConfigError: a layer does not exist, or a single-view model is given several views at once.
        """
        self._check_views(views)
        return super().features(views, layers)

    def predict(self, views: Views, heads: Sequence[str] | None = None) -> dict[str, Tensor]:
        """See `SceneTeacher.predict`.

        Returns:
            "depth": `depth` (B, V, H, W, 1) > 0, and `depth_conf` (B, V, H, W) of any-view models or `sky` of
            single-view ones. METRIC's depth times the focal length in pixels over 300 is in metres. "camera":
            `pose_enc` (B, V, 9), as VGGT's.
        """
        self._check_views(views)
        has = self.heads if self.model.config.any_view else ("depth",)
        return super().predict(views, has if heads is None else heads)

    def _check_views(self, views: Views) -> None:
        if self.model.config.any_view or self.views == "alone":
            return
        if int(views.present.sum(1).max()) > 1:
            raise ConfigError(
                f"{self.name!r} is a single-view model and was given {', '.join(views.cameras)} at once. "
                f"Name {self.name + '?views=alone'!r} to encode each by itself, or an any-view model such as "
                "depth-anything/DA3-BASE."
            )

    def _together(self, images: Tensor) -> Tensor:
        """Normalised scenes as the model gets them: with `views="alone"`, one for each view."""
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        images = (images - mean) / std
        return images.flatten(0, 1)[:, None] if self.views == "alone" else images

    def _encode(self, images: Tensor, layers: Sequence[int]) -> Sequence[Tensor]:
        grid = tuple(side // self.patch for side in images.shape[-2:])
        C = self.model.config.embed_dim
        part = {"both": slice(None), "local": slice(0, C), "global": slice(C, None)}[self.half]
        outputs = self.model.backbone(self._together(images), layers, reference=self.reference)
        lead = images.shape[:2]
        return [
            tokens[:, :, 1:, part].unflatten(2, grid).flatten(0, 1).unflatten(0, lead) for tokens in outputs
        ]

    def _predict(self, images: Tensor, heads: Sequence[str]) -> dict[str, Tensor]:
        found = self.model(self._together(images), heads, reference=self.reference)
        size = (images.shape[-2], images.shape[-1])
        maps: dict[str, Tensor] = {}
        if "depth" in found:
            maps["depth"] = found["depth"][..., None]
            maps |= {name: found[name] for name in ("depth_conf", "sky") if name in found}
        if "extrinsics" in found:
            maps["pose_enc"] = encode_pose(found["extrinsics"], found["intrinsics"], size)
        return {name: values.flatten(0, 1).unflatten(0, images.shape[:2]) for name, values in maps.items()}


def load_da3_teacher(
    source: str,
    card: TeacherCard | None,
    *,
    resolution: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
    heads: bool,
    random_weights: bool = False,
    variant: Mapping[str, str],
    **options: Any,
) -> DA3Teacher:
    """The loader of Depth Anything 3: of cards, folders and hub ids. `options` are `DA3Teacher`'s.

    Raises:
        CheckpointError: the checkpoint is missing, gated, damaged or of another architecture.
        ConfigError: the resolution is not a multiple of the patch size, or an unknown setting in the name.
    """
    chosen = check_variant(source, variant, VARIANTS)
    name = source + "?" * bool(variant) + "&".join(f"{key}={value}" for key, value in sorted(variant.items()))
    if random_weights:
        with random_stream(0):
            model = DA3(_config(source, card), heads=heads).to(device)
        name, licence = RANDOM + name, RANDOM_LICENCE
    else:
        found = _find(source, card)
        model = load_da3(found, heads=heads, device=device)
        licence = card.licence if card is not None else found.licence or UNKNOWN_LICENCE
    return DA3Teacher(
        model,
        name=name,
        licence=licence,
        half=cast(Half, chosen["half"]),
        reference=cast(Reference, chosen["reference"]),
        views=cast(ViewMode, chosen["views"]),
        resolution=resolution,
        dtype=dtype,
        **options,
    )


def _config(source: str, card: TeacherCard | None) -> DA3Config:
    known = DA3_CARDS.get(source)
    return _find(source, card).config if known is None else known


def _find(source: str, card: TeacherCard | None) -> DA3Source:
    if card is None and Path(source).exists():
        return find_da3(source)
    try:
        return find_da3(source, on_hub=True)
    except CheckpointError as error:
        hint = "" if card is not None else did_you_mean(source, TEACHERS)
        raise CheckpointError(f"{error}{hint}") from error


DA3_CARDS: dict[str, DA3Config] = {}
"""Sizes of the registered models, so that random weights of them need no download."""


def register(
    name: str,
    config: DA3Config,
    licence: str,
    note: str,
    facts: TeacherFacts,
    *,
    commercial: str | None = None,
) -> None:
    """Add a card of published weights."""
    DA3_CARDS[name] = config
    TEACHERS.add(name, TeacherCard(name, load_da3_teacher, licence, note, commercial, facts=facts))
