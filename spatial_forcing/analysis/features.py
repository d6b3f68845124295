"""Features of dataset frames: a student's visual tokens at any layer, and a teacher's patch features.

Shapes: N frame, V view, h x w grid of tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spatial_forcing.data import Dataset
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.forcing.layout import gather_tokens
from spatial_forcing.forcing.tap import Tap
from spatial_forcing.protocols import Observation, Student, Teacher, TokenLayout
from spatial_forcing.views import IMAGE_PREFIX, Views, views_from_batch

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""


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

    The student runs as it is deployed (`act`, eval mode) and is not changed.

    Raises:
        ConfigError: a layer outside 0..number of blocks, or a hook that never fires.
        DataError: the student pads its views (their tokens do not cover the camera's frame).
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
            layout = _full_frame_layout(student, frames.batch(rows))
            tap.arm()
            with torch.inference_mode():
                student.act(frames.observations(rows), torch.Generator().manual_seed(0))
            for k, hidden in tap.take().items():
                tokens = gather_tokens(hidden, layout).unflatten(1, layout.index.shape[1:])
                parts[k].append(tokens.float().cpu())
            progress("student tokens", rows.stop, len(frames))
    finally:
        tap.detach()
        if isinstance(student, nn.Module):
            student.train(training)
    return {k: torch.cat(chunks).clone() for k, chunks in parts.items()}


def teacher_features(
    teacher: Teacher, frames: Frames, *, layer: int = -1, batch_size: int = 32, progress: Progress = silent
) -> Tensor:
    """Patch features of one teacher layer on its own grid, (N, V, h, w, C) float32."""
    parts = []
    for rows in frames.slices(batch_size):
        views = views_from_batch(frames.batch(rows), frames.cameras)
        parts.append(teacher.features(views, (layer,))[0].float().cpu())
        progress("teacher features", rows.stop, len(frames))
    return torch.cat(parts)


def student_cameras(student: Student, dataset: Dataset) -> tuple[str, ...]:
    """The cameras the student sees, in its order; for a student that does not say, all of the dataset's."""
    return tuple(getattr(student, "cameras", dataset.cameras))


def read_depth(dataset: Dataset, index: Sequence[int], camera: str, side: int, clip: float) -> Tensor:
    """Depth at `side` x `side` points of the frame, (N, side, side) metres, clipped; 0 where not measured."""
    maps = [torch.from_numpy(np.array(dataset.depth(int(i), camera))) for i in index]
    # Nearest, not mean: a mean over an edge is a depth that is nowhere in the scene.
    small = nn.functional.interpolate(torch.stack(maps)[:, None], (side, side), mode="nearest-exact")[:, 0]
    return small.clamp(max=clip)


def _full_frame_layout(student: Student, batch: dict[str, Any]) -> TokenLayout:
    views: Views = student.views(batch)
    layout = student.layout(batch)
    if not (bool(views.valid.all()) and bool(layout.valid.all())):
        raise DataError(
            "the student pads its views, or one is absent, so its token grid does not cover the camera's "
            "frame. Probe it on frames of its own aspect ratio with every camera present."
        )
    return layout
