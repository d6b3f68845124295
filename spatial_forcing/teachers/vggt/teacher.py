"""VGGT as a frozen teacher.

Shapes: B batch, V views, h x w patch grid, C = 2 x embed_dim channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spatial_forcing.errors import CheckpointError
from spatial_forcing.registry import did_you_mean
from spatial_forcing.teachers.cards import (
    RANDOM,
    RANDOM_LICENCE,
    TEACHERS,
    UNKNOWN_LICENCE,
    Framing,
    TeacherCard,
    check_variant,
)
from spatial_forcing.teachers.frozen import DEFAULT_MEMORY, SceneTeacher, lower_weights, random_stream
from spatial_forcing.teachers.preprocess import RESIZE_RULE
from spatial_forcing.teachers.vggt.config import VGGTConfig
from spatial_forcing.teachers.vggt.keys import to_published
from spatial_forcing.teachers.vggt.loading import Source, find_local, find_on_hub, load_vggt
from spatial_forcing.teachers.vggt.model import HEADS, VGGT

NANO_FOLDER = Path(__file__).parent / "nano"
VGGT_1B = "facebook/VGGT-1B"


class VGGTTeacher(SceneTeacher):
    """A frozen VGGT that implements `protocols.Teacher`; `predict` gives camera, depth and points.

    Args:
        model: the network; put in eval mode, its parameters stop requiring gradients.
        name: registry name, hub id or path.
        licence: SPDX identifier of the weights.
        resolution: pixels of the longer side at which views are encoded; default the model's own.
            VGGT-1B: 518 as published, 392, or 224 (a 16 x 16 grid, one patch for each token of most VLAs).
        dtype: float32, or the type of the matrix products (bfloat16, float16). The aggregator's weights are
            then kept in it; norms, residual stream, heads and results stay float32.
        framing, memory: see `frozen.FrozenTeacher`.
        compile: True compiles the blocks with `torch.compile`; a text names its backend.

    Raises:
        ConfigError: like `frozen.FrozenTeacher`.
    """

    heads = HEADS

    def __init__(
        self,
        model: VGGT,
        *,
        name: str,
        licence: str,
        resolution: int | None = None,
        dtype: torch.dtype = torch.float32,
        framing: Framing = "fit",
        memory: int = DEFAULT_MEMORY,
        compile: bool | str = False,
    ) -> None:
        self.model = model
        super().__init__(
            model,
            name=name,
            licence=licence,
            resolution=model.config.img_size if resolution is None else resolution,
            dtype=dtype,
            framing=framing,
            memory=memory,
        )
        lower_weights(model.aggregator, dtype)
        if compile:
            for block in (*model.aggregator.frame_blocks, *model.aggregator.global_blocks):
                block.compile(backend="inductor" if compile is True else compile)

    @property
    def dim(self) -> int:
        """C, channels of one feature: frame and global halves."""
        return 2 * self.model.config.embed_dim

    @property
    def depth(self) -> int:
        """Number of layers that can be asked for."""
        return self.model.config.depth

    @property
    def patch(self) -> int:
        """Pixels on a side of one patch."""
        return self.model.config.patch_size

    def _weights(self) -> dict[str, Tensor]:
        # The heads do not count: they do not change the features.
        return {k: v for k, v in to_published(self.model).items() if k.startswith("aggregator.")}

    def _facts(self) -> dict[str, Any]:
        return {"config": self.model.config.to_dict(), "resize": RESIZE_RULE}

    def _bytes(self, views: int, height: int, width: int, layers: int) -> int:
        return self.model.aggregator.activation_bytes(views, height, width, layers)

    @property
    def _head_layers(self) -> int:
        return len(self.model.config.dpt.layers)

    def _encode(self, images: Tensor, layers: Sequence[int]) -> Sequence[Tensor]:
        grid = tuple(side // self.patch for side in images.shape[-2:])
        start = self.model.aggregator.patch_start_idx
        return [tokens[:, :, start:].unflatten(2, grid) for tokens in self.model.aggregator(images, layers)]

    def _predict(self, images: Tensor, heads: Sequence[str]) -> dict[str, Tensor]:
        """As `VGGT.forward`, without the iterations."""
        maps = self.model(images, heads)
        maps.pop("pose_enc_iterations", None)
        return maps


def load_vggt_teacher(
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
) -> VGGTTeacher:
    """The loader of VGGT cards, and of checkpoints that have no card. `options` are `VGGTTeacher`'s.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of another architecture.
        ConfigError: the resolution is not a multiple of the patch size.
    """
    check_variant(source, variant, {})
    if random_weights:
        with random_stream(0):
            model = VGGT(_config(source, card), heads=heads).to(device)
        name, licence = RANDOM + source, RANDOM_LICENCE
        return VGGTTeacher(model, name=name, licence=licence, resolution=resolution, dtype=dtype, **options)
    found = _find(source, card)
    model = load_vggt(found, heads=heads, device=device)
    licence = card.licence if card is not None else _licence_of(found)
    return VGGTTeacher(model, name=source, licence=licence, resolution=resolution, dtype=dtype, **options)


def _config(source: str, card: TeacherCard | None) -> VGGTConfig:
    if card is not None and card.folder is None:
        return VGGTConfig()  # the published models have one size; nothing needs to be downloaded for it
    return _find(source, card).config


def _find(source: str, card: TeacherCard | None) -> Source:
    if card is not None and card.folder is not None:
        if not card.folder.is_dir():
            raise CheckpointError(
                f"the weights of {source!r} are not in this installation ({card.folder} is missing); "
                "reinstall spatial-forcing, or make them with `spatial-forcing teacher pretrain`."
            )
        return find_local(card.folder)
    if card is None and Path(source).exists():
        return find_local(source)
    try:
        return find_on_hub(source)
    except CheckpointError as error:
        hint = "" if card is not None else did_you_mean(source, TEACHERS)
        raise CheckpointError(f"{error}{hint}") from error


def _licence_of(source: Source) -> str:
    if source.licence is not None:
        return source.licence
    # A bare file of this size is almost surely the published, non-commercial one.
    return TEACHERS[VGGT_1B].licence if source.config == VGGTConfig() else UNKNOWN_LICENCE
