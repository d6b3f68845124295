"""VGGT as a frozen teacher.

Shapes: B batch, V views, h x w patch grid, C = 2 x embed_dim channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spatial_forcing.alignment import Views
from spatial_forcing.errors import CheckpointError
from spatial_forcing.registry import did_you_mean
from spatial_forcing.teachers.cards import RANDOM, RANDOM_LICENCE, TEACHERS, Framing, TeacherCard
from spatial_forcing.teachers.frozen import DEFAULT_MEMORY, FrozenTeacher, lower_weights, random_stream
from spatial_forcing.teachers.preprocess import RESIZE_RULE, Framed
from spatial_forcing.teachers.vggt.aggregator import resolve_layers
from spatial_forcing.teachers.vggt.config import VGGTConfig
from spatial_forcing.teachers.vggt.keys import to_published
from spatial_forcing.teachers.vggt.loading import Source, find_local, find_on_hub, load_vggt
from spatial_forcing.teachers.vggt.model import HEADS, VGGT

NANO_FOLDER = Path(__file__).parent / "nano"
UNKNOWN_LICENCE = "LicenseRef-unknown"
VGGT_1B = "facebook/VGGT-1B"


class VGGTTeacher(FrozenTeacher):
    """A frozen VGGT that implements `protocols.Teacher`.

    Args:
        model: the network; put in eval mode, its parameters stop requiring gradients.
        name: registry name, hub id or path.
        licence: SPDX identifier of the weights.
        resolution: pixels of the longer side at which views are encoded; default the model's own.
            VGGT-1B: 518 as published, 392, or 224 (a 16 x 16 grid, one patch for each token of most VLAs).
        dtype: float32, or the type of the matrix products (bfloat16, float16). The aggregator's weights are
            then kept in it; norms, residual stream, heads and results stay float32.
        framing, memory: see `FrozenTeacher`.
        compile: True compiles the blocks with `torch.compile`; a text names its backend.

    Raises:
        ConfigError: like `FrozenTeacher`.
    """

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

    @torch.no_grad()
    def features(self, views: Views, layers: Sequence[int] = (-1,)) -> tuple[Tensor, ...]:
        """Patch features of the asked layers, one (B, V, h, w, C) float32 tensor each.

        Views are resized to `resolution` without changing what they show (see `framing`). Those present in
        a sample are encoded together, in the order of `views.cameras`; the first of them is VGGT's reference
        view. Absent ones get zero rows and influence nothing.

        Args:
            views: what to encode; moved to the teacher's device.
            layers: 0-based, negative from the end; later layers do not run.

        Raises:
            ConfigError: a layer does not exist.
        """
        resolve_layers(layers, self.depth)
        grid = self._grid(*views.images.shape[-2:])
        B, V = views.present.shape
        results: tuple[Tensor, ...] = ()
        for rows, columns, framed in self._scenes(views, len(set(layers))):
            with self._precision():
                tokens = self.model.aggregator(framed.images.unflatten(0, (len(rows), -1)), layers)
            # Not before the first forward, whose peak they would raise.
            results = results or self._zeros(B, V, *grid, count=len(layers))
            for result, layer in zip(results, tokens, strict=True):
                result[rows[:, None], columns] = self._patches(layer, framed, grid)
        return results or self._zeros(B, V, *grid, count=len(layers))

    def _zeros(self, *lead: int, count: int) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(*lead, self.dim, device=self.device) for _ in range(count))

    def _patches(self, tokens: Tensor, framed: Framed, grid: tuple[int, int]) -> Tensor:
        """Aggregator output (B, S, P, C) to the features of the views without padding, (B, S, *grid, C)."""
        shape = tuple(side // self.patch for side in framed.images.shape[-2:])
        patches = tokens[:, :, self.model.aggregator.patch_start_idx :].flatten(0, 1).unflatten(1, shape)
        return self._without_padding(patches.float(), framed, grid).unflatten(0, tokens.shape[:2])

    @torch.no_grad()
    def predict(self, views: Views, heads: Sequence[str] = HEADS) -> dict[str, Tensor]:
        """The heads' predictions: camera, depth and points, as `VGGT.forward` without the iterations.

        Pixels are those of the resized views; absent views get zeros.

        Raises:
            ConfigError: a head is unknown, or the teacher was loaded without heads.
        """
        results: dict[str, Tensor] = {}
        for rows, columns, framed in self._scenes(views, len(self.model.config.dpt.layers)):
            with self._precision():
                maps = self.model(framed.images.unflatten(0, (len(rows), -1)), heads)
            maps.pop("pose_enc_iterations", None)
            for name, values in maps.items():
                if name not in results:
                    results[name] = values.new_zeros(*views.present.shape, *values.shape[2:])
                results[name][rows[:, None], columns] = values
        return results


def load_vggt_teacher(
    source: str,
    card: TeacherCard | None,
    *,
    resolution: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
    heads: bool,
    random_weights: bool = False,
    **options: Any,
) -> VGGTTeacher:
    """The loader of VGGT cards, and of checkpoints that have no card. `options` are `VGGTTeacher`'s.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of another architecture.
        ConfigError: the resolution is not a multiple of the patch size.
    """
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
