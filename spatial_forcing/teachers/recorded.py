"""Recorded depth as a teacher: a token's target is the geometry that was measured there.

No weights, no licence, no network. Nothing in the paper; the form of the target is this project's own.

Shapes: B batch, V views, h x w cells, H x W pixels, C channels.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from spatial_forcing.alignment import Views
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.teachers.cards import TEACHERS, VARIANT, TeacherCard, check_variant
from spatial_forcing.teachers.layers import resolve_layers
from spatial_forcing.teachers.preprocess import resized_shape

RECORDED_DEPTH = "recorded-depth"
LICENCE = "LicenseRef-of-the-dataset"
Points = Literal["auto", "camera", "world"]
VARIANTS: Mapping[str, tuple[str, ...]] = {"points": ("auto", "camera", "world")}
CELL = 14
"""Pixels of a cell at the nominal resolution; 224 px are 16 x 16 cells."""
RESOLUTION = 224
SAMPLES = 4
"""Pixels on a side that are looked at in a cell; the one of median depth stands for it."""
WAVELENGTHS = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25)
"""Of the sin-cos encoding: metres of a point, e-folds of depth, and components of a normal."""
NEAREST = 0.01
"""Metres; depth below it counts as not measured."""
VERSION = 1
"""Part of the fingerprint: change it when the arithmetic changes."""


def reads_depth(name: str) -> bool:
    """Whether the teacher of this name looks at a dataset's depth instead of its images."""
    return name.partition(VARIANT)[0] == RECORDED_DEPTH


class DepthInfo(Protocol):
    """The part of `spatial_forcing.data.DatasetInfo` that this teacher reads."""

    @property
    def depths(self) -> Mapping[str, str]:
        """Feature of the depth by camera."""
        ...


class DepthDataset(Protocol):
    """The part of `spatial_forcing.data.Dataset` that this teacher reads."""

    @property
    def info(self) -> DepthInfo:
        """What the dataset holds."""
        ...

    def depth(self, index: int, camera: str) -> NDArray[np.float32]:
        """(H, W) metres, 0 where nothing was measured. Raises `DataError` where a camera has none."""
        ...

    def intrinsics(self, camera: str) -> NDArray[np.float64]:
        """(3, 3) in pixels of the depth map. Raises `DataError` when not recorded."""
        ...

    def extrinsics(self, index: int, camera: str) -> NDArray[np.float32]:
        """World from camera, (4, 4), OpenCV axes. Raises `DataError` when not recorded."""
        ...


class RecordedDepth:
    """What a dataset's depth says of each cell of a view. Implements `Teacher` and `PartialTeacher`.

    A feature is the sin-cos encoding of the logarithm of depth, the surface normal and the point of the pixel
    of median depth in the cell: in the camera's frame and, where the dataset has extrinsics, in the world's.
    The cosine of two features is then the mean, over these numbers and over wavelengths from 8 to 0.25, of
    the cosine of their difference. A cell of which less than half is measured has a row of zeros, and a token
    that reads such cells has no target.

    Args:
        dataset: with depth and intrinsics of the views' cameras.
        points: "auto" (camera frame, and world frame where there are extrinsics), "camera" or "world".
        resolution: 14 times the cells along the longer side of a view.

    Raises:
        ConfigError: the resolution is no multiple of 14, or `points` is unknown.
    """

    projected = False
    partial = True
    depth = 1
    patch = CELL
    licence = LICENCE

    def __init__(self, dataset: DepthDataset, points: Points = "auto", resolution: int = RESOLUTION) -> None:
        check_variant(RECORDED_DEPTH, {"points": points}, VARIANTS)
        resized_shape(1, 1, resolution, CELL, "fit")
        self.dataset, self.points, self.resolution = dataset, points, resolution
        self.name = RECORDED_DEPTH if points == "auto" else f"{RECORDED_DEPTH}{VARIANT}points={points}"
        self.device = torch.device("cpu")
        self._posed: bool | None = None if points == "auto" else points == "world"

    @property
    def posed(self) -> bool:
        """Whether features hold points in the world's frame; "auto": whether the dataset has extrinsics."""
        if self._posed is None:
            try:
                for camera in self.dataset.info.depths:
                    self.dataset.extrinsics(0, camera)
                self._posed = True
            except DataError:
                self._posed = False
        return self._posed

    @property
    def dim(self) -> int:
        """C: two for each wavelength of each number."""
        return 2 * len(WAVELENGTHS) * (7 + 3 * (self.points == "auto" and self.posed))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the settings and the encoding; the dataset's own hashes say what was read."""
        facts = [VERSION, self.points, self.posed, self.resolution, CELL, SAMPLES, WAVELENGTHS, NEAREST]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @torch.no_grad()
    def features(self, views: Views, layers: Sequence[int] = (-1,)) -> tuple[Tensor, ...]:
        """The encoded geometry of the frames `views.keys`, one (B, V, h, w, C) float32 tensor a layer.

        Pixels are not looked at.

        Raises:
            ConfigError: a layer other than 0 or -1.
            DataError: views without keys, or a camera without depth, intrinsics or (for "world") extrinsics.
        """
        resolve_layers(layers, self.depth)
        if views.keys is None:
            raise DataError(
                f"{self.name!r} needs Views.keys, the absolute frame index of each sample; put `index` into "
                "the batch."
            )
        height, width = views.valid.shape[-2:]
        rows, columns = resized_shape(height, width, self.resolution, CELL, "fit")
        grid = (rows // CELL, columns // CELL)
        B, V = views.present.shape
        result = torch.zeros(B, V, *grid, self.dim)
        present = views.present.cpu()
        for sample, key in enumerate(views.keys.tolist()):
            for view, camera in enumerate(views.cameras):
                if present[sample, view]:
                    result[sample, view] = self.encode(key, camera, grid)
        return (result.to(self.device),) * len(layers)

    def encode(self, index: int, camera: str, grid: tuple[int, int]) -> Tensor:
        """The features of a frame's view, (*grid, C) float32."""
        depth = torch.from_numpy(self.dataset.depth(index, camera))
        points, normals, measured = surface(depth, torch.from_numpy(self.dataset.intrinsics(camera)).float())
        numbers = [depth.clamp(min=NEAREST).log()[..., None], normals]
        if self.points != "world":
            numbers.append(points)
        if self.posed:
            pose = torch.from_numpy(self.dataset.extrinsics(index, camera)).float()
            numbers.append(points @ pose[:3, :3].T + pose[:3, 3])
            if self.points == "world":
                numbers[1] = normals @ pose[:3, :3].T
        values, known = median_cells(torch.cat(numbers, dim=-1), depth, measured, grid)
        angles = values[..., None] * (2 * math.pi / torch.tensor(WAVELENGTHS))
        encoded = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)
        return encoded * known[..., None]

    def to(self, device: torch.device | str) -> Self:
        """Deliver features on `device`."""
        self.device = torch.device(device)
        return self


def surface(depth: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Points and normals of a depth map.

    Args:
        depth: (H, W) metres along the optical axis, 0 where nothing was measured.
        intrinsics: (3, 3) in pixels; pixel (row i, column j) is centred at (j + 0.5, i + 0.5).

    Returns:
        Points (H, W, 3) in metres in the camera's frame, unit normals (H, W, 3) that look at the camera, and
        (H, W) bool: where both are known. Of two neighbours the one of more similar depth gives the slope, so
        that a normal does not reach over an edge.
    """
    height, width = depth.shape
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    x = (u - intrinsics[0, 2]) / intrinsics[0, 0]
    y = (v - intrinsics[1, 2]) / intrinsics[1, 1]
    points = torch.stack([x * depth, y * depth, depth], dim=-1)
    seen = depth >= NEAREST
    across, has_across = _slope(points, seen, 1)
    down, has_down = _slope(points, seen, 0)
    normals = F.normalize(torch.linalg.cross(down, across, dim=-1), dim=-1)
    away = (normals * points).sum(-1, keepdim=True) > 0
    normals = torch.where(away, -normals, normals)
    return points, normals, seen & has_across & has_down & (normals.norm(dim=-1) > 0.5)


def _slope(points: Tensor, seen: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Change of `points` (H, W, 3) from a pixel to the next along `axis`, and where it is known."""
    step = points.diff(dim=axis)
    both = seen.narrow(axis, 1, seen.shape[axis] - 1) & seen.narrow(axis, 0, seen.shape[axis] - 1)
    jump = torch.where(both, step[..., 2].abs(), torch.inf)
    pad = (1, 0) if axis == 1 else (0, 0, 1, 0)
    after = (0, 1) if axis == 1 else (0, 0, 0, 1)
    before_jump, after_jump = F.pad(jump, pad, value=torch.inf), F.pad(jump, after, value=torch.inf)
    before = F.pad(step.movedim(-1, 0), pad).movedim(0, -1)
    behind = F.pad(step.movedim(-1, 0), after).movedim(0, -1)
    chosen = torch.where((before_jump < after_jump)[..., None], before, behind)
    return chosen, torch.minimum(before_jump, after_jump).isfinite()


def median_cells(
    values: Tensor, depth: Tensor, measured: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Of each cell the values of the measured pixel of median depth, and whether half of it is measured.

    Args:
        values: (H, W, N).
        depth, measured: (H, W).
        grid: cells (h, w).

    Returns:
        (h, w, N), and (h, w) float, 0 or 1.
    """
    rows, columns = (_spread(size, count) for size, count in zip(depth.shape, grid, strict=True))
    at = rows[:, None, :, None] * depth.shape[1] + columns[None, :, None, :]
    at = at.flatten(2)  # (h, w, samples)
    known = measured.flatten()[at]
    order = torch.where(known, depth.flatten()[at], torch.inf).argsort(dim=-1)
    middle = ((known.sum(-1) - 1) // 2).clamp(min=0)
    picked = at.gather(-1, order.gather(-1, middle[..., None]))[..., 0]
    return values.flatten(0, 1)[picked], (2 * known.sum(-1) >= at.shape[-1]).float()


def _spread(size: int, cells: int) -> Tensor:
    """(cells, SAMPLES) pixel indices, evenly spread over each cell."""
    centres = (torch.arange(cells * SAMPLES, dtype=torch.float64) + 0.5) * size / (cells * SAMPLES)
    return centres.long().clamp(max=size - 1).unflatten(0, (cells, SAMPLES))


def load_recorded(
    source: str,
    card: TeacherCard | None,
    *,
    resolution: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
    heads: bool,
    random_weights: bool,
    variant: Mapping[str, str],
    dataset: DepthDataset | None = None,
    **options: Any,
) -> RecordedDepth:
    """The loader of `recorded-depth`; needs `dataset`.

    Raises:
        ConfigError: no dataset, random weights of a teacher that has none, or an unknown setting in the name.
    """
    chosen = check_variant(source, variant, VARIANTS)
    if random_weights:
        raise ConfigError(f"{source!r} has no weights that could be random; leave 'random:' out.")
    if dataset is None:
        raise ConfigError(
            f"{source!r} reads the depth of a dataset, and none is at hand here; name it in `train`, "
            "`compare`, `cache build` or `probe`, which have one, or give load_teacher(..., "
            "dataset=Dataset.open(FOLDER))."
        )
    points = cast(Points, chosen["points"])
    return RecordedDepth(dataset, points, RESOLUTION if resolution is None else resolution).to(device)


TEACHERS.add(
    RECORDED_DEPTH,
    TeacherCard(
        name=RECORDED_DEPTH,
        loader=load_recorded,
        licence=LICENCE,
        note="The dataset's own depth, normals and points; no weights. Needs depth and intrinsics.",
    ),
)
