"""VGGT as a frozen teacher.

Shapes: B batch, V views, h x w patch grid, C = 2 x embed_dim channels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from spatial_forcing.errors import CheckpointError
from spatial_forcing.registry import did_you_mean
from spatial_forcing.teachers.base import TEACHERS, TeacherCard
from spatial_forcing.teachers.vggt.aggregator import resolve_layers
from spatial_forcing.teachers.vggt.config import VGGTConfig
from spatial_forcing.teachers.vggt.keys import to_published
from spatial_forcing.teachers.vggt.loading import Source, find_local, find_on_hub, load_vggt
from spatial_forcing.teachers.vggt.model import HEADS, VGGT
from spatial_forcing.teachers.vggt.preprocess import RESIZE_RULE, resize, resized_shape
from spatial_forcing.views import Views

NANO_FOLDER = Path(__file__).parent / "nano"
UNKNOWN_LICENCE = "LicenseRef-unknown"
VGGT_1B = "facebook/VGGT-1B"


class VGGTTeacher:
    """A frozen VGGT that implements `protocols.Teacher`.

    Deliberately no `nn.Module`: kept as an attribute of one, it stays out of its state dict,
    optimizer and parallel wrappers. It refuses to be pickled, and a deep copy is itself.

    Args:
        model: the network; put in eval mode, its parameters stop requiring gradients.
        name: registry name, hub id or path.
        licence: SPDX identifier of the weights.
        resolution: pixels of the longer side at which views are encoded; default the model's own.
        dtype: float32, or the type of matrix products under autocast (bfloat16, float16). Weights,
            residual stream and results stay float32.

    Raises:
        ConfigError: the resolution is not a multiple of the patch size.
    """

    def __init__(
        self,
        model: VGGT,
        *,
        name: str,
        licence: str,
        resolution: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.licence = licence
        self.resolution = model.config.img_size if resolution is None else resolution
        self.dtype = dtype
        resized_shape(1, 1, self.resolution, self.patch, "fit")
        self._fingerprint: tuple[int, str] | None = None

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

    @property
    def device(self) -> torch.device:
        """Where the weights are, and the results."""
        return self.model.aggregator.camera_token.device

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the aggregator's weights, the config, the arithmetic type and the preprocessing.

        The heads do not count: they do not change the features.
        """
        version = sum(parameter._version for parameter in self.model.aggregator.parameters())
        if self._fingerprint is None or self._fingerprint[0] != version:
            self._fingerprint = (version, self._digest())
        return self._fingerprint[1]

    def _digest(self) -> str:
        facts = {
            "config": self.model.config.to_dict(),
            "resolution": self.resolution,
            "resize": RESIZE_RULE,
            "dtype": str(self.dtype),
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for key, tensor in sorted(to_published(self.model).items()):
            if key.startswith("aggregator."):
                digest.update(f"{key} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @torch.no_grad()
    def features(self, views: Views, layers: Sequence[int] = (-1,)) -> tuple[Tensor, ...]:
        """Patch features of the asked layers, one (B, V, h, w, C) float32 tensor each.

        Views are resized to `resolution` without changing what they show (see `preprocess.fit`). Those
        present in a sample are encoded together, in the order of `views.cameras`; the first of them is
        VGGT's reference view. Absent ones get zero rows and influence nothing.

        Args:
            views: what to encode; moved to the teacher's device.
            layers: 0-based, negative from the end; later layers do not run.

        Raises:
            ConfigError: a layer does not exist.
        """
        resolve_layers(layers, self.depth)
        H, W = views.images.shape[-2:]
        height, width = resized_shape(H, W, self.resolution, self.patch, "fit")
        grid = (height // self.patch, width // self.patch)
        B, V = views.present.shape
        results = tuple(torch.zeros(B, V, *grid, self.dim, device=self.device) for _ in layers)
        start = self.model.aggregator.patch_start_idx
        for rows, columns, images in self._scenes(views):
            with self._precision():
                tokens = self.model.aggregator(images, layers)
            for result, layer in zip(results, tokens, strict=True):
                result[rows[:, None], columns] = layer[:, :, start:].unflatten(2, grid).float()
        return results

    @torch.no_grad()
    def predict(self, views: Views, heads: Sequence[str] = HEADS) -> dict[str, Tensor]:
        """What the heads see: camera, depth and points, as `VGGT.forward` without the iterations.

        Pixels are those of the resized views; absent views get zeros.

        Raises:
            ConfigError: a head is unknown, or the teacher was loaded without heads.
        """
        results: dict[str, Tensor] = {}
        for rows, columns, images in self._scenes(views):
            with self._precision():
                maps = self.model(images, heads)
            maps.pop("pose_enc_iterations", None)
            for name, values in maps.items():
                if name not in results:
                    results[name] = values.new_zeros(*views.present.shape, *values.shape[2:])
                results[name][rows[:, None], columns] = values
        return results

    def _scenes(self, views: Views) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Samples that have the same views: (sample indices, view indices, resized images of those)."""
        patterns, which = torch.unique(views.present.to(self.device), dim=0, return_inverse=True)
        source = views.images.to(self.device, torch.float32)
        for index, pattern in enumerate(patterns):
            rows, columns = (which == index).nonzero().flatten(), pattern.nonzero().flatten()
            if len(columns):
                images = source[rows[:, None], columns]
                resized = resize(images.flatten(0, 1), self.resolution, self.patch)
                yield rows, columns, resized.unflatten(0, images.shape[:2])

    def _precision(self) -> torch.autocast:
        """Autocast to our own type, whatever the caller's autocast says."""
        kind = self.device.type
        if self.dtype == torch.float32:
            return torch.autocast(kind, enabled=False)
        return torch.autocast(kind, dtype=self.dtype)

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, in place."""
        self.model.to(device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # frozen: copies of a student (for averaging, say) share it

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"the teacher {self.name!r} is not pickled, so that its weights end up in no checkpoint; "
            "store its name and call load_teacher again."
        )


def load_vggt_teacher(
    source: str,
    card: TeacherCard | None,
    *,
    resolution: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
    heads: bool,
) -> VGGTTeacher:
    """The loader of VGGT cards, and of checkpoints that have no card.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of another architecture.
        ConfigError: the resolution is not a multiple of the patch size.
    """
    found = _find(source, card)
    model = load_vggt(found, heads=heads, device=device)
    licence = card.licence if card is not None else _licence_of(found)
    return VGGTTeacher(model, name=source, licence=licence, resolution=resolution, dtype=dtype)


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
