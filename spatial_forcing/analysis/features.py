"""Features of dataset frames: a student's visual tokens at any layer, and a teacher's patch features.

Shapes: N frame, V view, h x w grid of tokens, C channels.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spatial_forcing.alignment import (
    IMAGE_PREFIX,
    Alignment,
    TokenLayout,
    Views,
    invert,
    transform,
    views_from_batch,
)
from spatial_forcing.data import Dataset
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.forcing.layout import gather_tokens, grid_sizes
from spatial_forcing.forcing.tap import Tap, in_sequence
from spatial_forcing.protocols import Observation, PartlySeen, Student, Teacher
from spatial_forcing.teachers.frozen import SceneTeacher

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""


def silent(what: str, done: int, total: int) -> None:
    """A progress callback that does nothing."""


@dataclass(frozen=True)
class Frames:
    """Dataset frames in memory.

    Attributes:
        index: (N,) int64, absolute frame indices.
        cameras: names, in order.
        images: by camera (N, H, W, 3) uint8.
        state: (N, D) float32.
        tasks: N instructions.
    """

    index: NDArray[np.int64]
    cameras: tuple[str, ...]
    images: dict[str, NDArray[np.uint8]]
    state: NDArray[np.float32]
    tasks: list[str]

    def __len__(self) -> int:
        return len(self.index)

    @classmethod
    def read(cls, dataset: Dataset, index: Sequence[int], cameras: Sequence[str]) -> Frames:
        """Decode `index`. Raises `DataError` when the dataset lacks a camera."""
        rows = np.asarray(index, dtype=np.int64)
        images = {c: np.stack([dataset.image(int(i), c) for i in rows]) for c in cameras}
        tasks = [dataset.tasks[int(dataset.task_index[i])] for i in rows]
        return cls(rows, tuple(cameras), images, np.asarray(dataset.state[rows], np.float32), tasks)

    def observations(self, rows: slice) -> list[Observation]:
        """As an environment would return them."""
        return [
            {
                "images": {c: self.images[c][i] for c in self.cameras},
                "state": self.state[i],
                "task": self.tasks[i],
            }
            for i in range(*rows.indices(len(self)))
        ]

    def batch(self, rows: slice) -> dict[str, Any]:
        """As the training loader would collate them, without actions."""
        batch: dict[str, Any] = {
            IMAGE_PREFIX + c: torch.from_numpy(self.images[c][rows]).movedim(-1, 1) for c in self.cameras
        }
        batch["observation.state"] = torch.from_numpy(self.state[rows])
        batch["task"] = self.tasks[rows]
        batch["index"] = torch.from_numpy(self.index[rows])
        return batch

    def slices(self, size: int) -> Iterator[slice]:
        """Consecutive batches."""
        return (slice(i, min(i + size, len(self))) for i in range(0, len(self), size))


def student_features(
    student: Student,
    frames: Frames,
    layers: Sequence[int],
    *,
    batch_size: int = 32,
    progress: Progress = silent,
) -> dict[int, Tensor]:
    """The residual stream after `layers` blocks at the visual tokens, (N, V, h, w, C) float32 by layer.

    The student runs as it is deployed (`act`, eval mode) and is not changed. Where it pads a view, the tokens
    are resampled so that the grid covers the camera's frame.

    Raises:
        ConfigError: a layer outside 0..number of blocks, or a hook that never fires.
        DataError: the student lacks a view, or none of a view is valid.
    """
    depth = len(student.blocks)
    if bad := [k for k in layers if not 0 <= k <= depth]:
        raise ConfigError(f"layers {bad} are not 0..{depth}: this student has {depth} blocks.")
    tap = Tap(student.blocks, layers, student.final_norm)
    training = student.training if isinstance(student, nn.Module) else False
    parts: dict[int, list[Tensor]] = {k: [] for k in tap.depths}
    try:
        if isinstance(student, nn.Module):
            student.eval()
        for rows in frames.slices(batch_size):
            alignment = _whole(student.alignment(frames.batch(rows)))
            layout, views = alignment.layout, alignment.views
            with tap.armed() as states, torch.inference_mode():
                student.act(frames.observations(rows), torch.Generator().manual_seed(0))
            for k, calls in states.items():
                hidden = in_sequence(calls, alignment.sequence, k)
                tokens = gather_tokens(hidden, layout).unflatten(1, layout.index.shape[1:])
                parts[k].append(on_frame(tokens.float(), layout, views).cpu())
            progress("student tokens", rows.stop, len(frames))
    finally:
        tap.detach()
        if isinstance(student, nn.Module):
            student.train(training)
    return {k: torch.cat(chunks).clone() for k, chunks in parts.items()}


def teacher_features(
    teacher: Teacher,
    frames: Frames,
    *,
    layer: int = -1,
    batch_size: int = 32,
    progress: Progress = silent,
    seconds: list[float] | None = None,
) -> Tensor:
    """Patch features of one teacher layer on its own grid, (N, V, h, w, C) float32.

    `seconds` is filled with the wall clock of a frame, one entry for each batch.
    """
    parts = []
    for rows in frames.slices(batch_size):
        views = views_from_batch(frames.batch(rows), frames.cameras)
        started = time.perf_counter()
        parts.append(teacher.features(views, (layer,))[0].float().cpu())
        if seconds is not None:
            seconds.append((time.perf_counter() - started) / (rows.stop - rows.start))
        progress("teacher features", rows.stop, len(frames))
    return torch.cat(parts)


def randomised(student: nn.Module, seed: int = 0) -> nn.Module:
    """A copy whose weights are permuted within each tensor: a student without knowledge, of the same scale.

    Works for every student, whatever draws its initial weights. Vectors (norms, biases) and buffers
    (statistics) stay.
    """
    copied = copy.deepcopy(student)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.ndim > 1:
                order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].view(parameter.shape))
    return copied


def student_cameras(student: Student, dataset: Dataset) -> tuple[str, ...]:
    """The cameras whose tokens can be read, in the student's order; for one that does not say, all of the
    dataset's.
    """
    own = student.aligned_cameras if isinstance(student, PartlySeen) else student.cameras
    return tuple(own or dataset.cameras)


def read_depth(dataset: Dataset, index: Sequence[int], camera: str, side: int, clip: float) -> Tensor:
    """Depth at `side` x `side` points of the frame, (N, side, side) metres, clipped; 0 where not measured."""
    maps = [torch.from_numpy(np.array(dataset.depth(int(i), camera))) for i in index]
    # Nearest, not mean: a mean over an edge is a depth that is nowhere in the scene.
    small = nn.functional.interpolate(torch.stack(maps)[:, None], (side, side), mode="nearest-exact")[:, 0]
    return small.clamp(max=clip)


def _whole(alignment: Alignment) -> Alignment:
    """The alignment, if every view has tokens. Raises `DataError` otherwise."""
    layout, views = alignment.layout, alignment.views
    if not bool(views.present.all()) or not bool(layout.valid.flatten(2).any(-1).all()):
        raise DataError("a view of the student is absent or has no valid token; probe it with every camera.")
    return alignment


def on_frame(tokens: Tensor, layout: TokenLayout, views: Views) -> Tensor:
    """Token grids (B, V, h, w, C) of padded or cropped views, resampled to cover the camera's frame evenly.

    The frame is the part of `views.images` that is valid; the inverse of `student_to_view` says where it is
    in the student's token image. Grids that cover it as they are stay untouched.
    """
    straight = torch.eye(2, 3, device=views.student_to_view.device).expand_as(views.student_to_view)
    if bool(views.valid.all()) and torch.equal(views.student_to_view, straight) and bool(layout.valid.all()):
        return tokens
    B, V, h, w, C = tokens.shape
    low, high = _valid_box(views.valid)
    sizes = grid_sizes(layout).to(tokens.device)
    # Centres of an h x w grid over the frame, from -1 to 1 from edge to edge.
    ys, xs = ((2 * torch.arange(n, device=tokens.device) + 1) / n - 1 for n in (h, w))
    points = torch.stack(torch.broadcast_tensors(xs[None, :], ys[:, None]), -1).flatten(0, 1)
    points = (low + high)[:, :, None] / 2 + points * ((high - low) / 2)[:, :, None]
    points = transform(invert(views.student_to_view.to(tokens.device)), points)
    # Grids that are padded at the right and the bottom hold real tokens in a part of it only.
    share = sizes.flip(-1) / torch.tensor([w, h], device=tokens.device)
    points = (points + 1) * share[:, :, None] - 1
    sampled = nn.functional.grid_sample(
        tokens.flatten(0, 1).permute(0, 3, 1, 2),
        points.view(B * V, h, w, 2).to(tokens.dtype),
        padding_mode="border",
        align_corners=False,
    )
    return sampled.permute(0, 2, 3, 1).reshape(B, V, h, w, C)


def _valid_box(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Edges of the valid rectangle of each view, (B, V, 2) each, x first, in [-1, 1] from edge to edge."""
    low, high = [], []
    for axis, size in ((-2, valid.shape[-1]), (-1, valid.shape[-2])):
        used = valid.any(axis).float()
        first = used.argmax(-1)
        last = size - used.flip(-1).argmax(-1)
        low.append(2 * first / size - 1)
        high.append(2 * last / size - 1)
    return torch.stack(low, -1), torch.stack(high, -1)


def predicted_depth(teacher: SceneTeacher, frames: Frames, side: int, clip: float) -> dict[str, Tensor]:
    """A teacher's own depth of real images, (N, side, side) by camera, clipped; its unit is the model's."""
    parts = []
    for rows in frames.slices(16):
        views = views_from_batch(frames.batch(rows), frames.cameras)
        maps = teacher.predict(views, ("depth",))["depth"][..., 0].float()
        small = nn.functional.interpolate(maps.flatten(0, 1)[:, None], (side, side), mode="nearest-exact")
        parts.append(small[:, 0].unflatten(0, maps.shape[:2]).cpu())
    depth = torch.cat(parts).clamp(max=clip)
    return {camera: depth[:, number] for number, camera in enumerate(frames.cameras)}
