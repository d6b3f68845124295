"""Controls that a real teacher must beat: what the alignment gives with targets unrelated to the frame.

`random:NAME` (in `load_teacher`) is the architecture with random weights. `ShuffledTeacher` gives each frame
the features of another: targets of the right kind, from the right camera, about the wrong scene.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spatial_forcing.alignment import Views
from spatial_forcing.errors import ConfigError
from spatial_forcing.teachers.cache import CachedTeacher

SHUFFLED = "shuffled:"
"""Before a cached teacher's name in a training configuration: `ShuffledTeacher`."""


class MovedTeacher(ABC):
    """A cache that gives a frame the features of another one. Implements `Teacher`.

    All views of a frame come from the same other frame and follow the student's crop as its own would.

    Args:
        cached: the features.
        name, suffix: of this teacher; what is added to the cache's fingerprint.
    """

    def __init__(self, cached: CachedTeacher, name: str, suffix: str) -> None:
        self.cached = cached
        self.name, self.licence = name, cached.licence
        self.dim, self.depth = cached.dim, cached.depth
        self.patch, self.resolution = cached.patch, cached.resolution
        self.projected, self.partial = cached.projected, cached.partial
        self.fingerprint = f"{cached.fingerprint}-{suffix}"

    @abstractmethod
    def donors(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """The frames whose features the frames `keys` (n,) get, (n,)."""

    def features(self, views: Views, layers: Sequence[int] = (-1,)) -> tuple[Tensor, ...]:
        """Another frame's features, one (B, V, h, w, C) float32 tensor a layer; see `CachedTeacher`."""
        if views.keys is not None:
            moved = torch.from_numpy(self.donors(views.keys.cpu().numpy()))
            views = replace(views, keys=moved.to(views.keys.device))
        return self.cached.features(views, layers)

    def to(self, device: torch.device | str) -> Self:
        """Deliver features on `device`."""
        self.cached.to(device)
        return self


class ShuffledTeacher(MovedTeacher):
    """A cache whose frames are permuted once, within the same cameras.

    No frame keeps its own features; each goes to one with the same views present. The permutation is fixed
    for a cache and a seed.

    Args:
        cached: the features.
        seed: of the permutation.
    """

    def __init__(self, cached: CachedTeacher, seed: int = 0) -> None:
        super().__init__(cached, SHUFFLED + cached.name, f"shuffled-{seed}")
        self.seed = seed
        self._frames: NDArray[np.int64] | None = None
        self._donors: NDArray[np.int64] | None = None

    def donors(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """The frames whose features the frames `keys` (n,) get, (n,)."""
        if self._frames is None or self._donors is None:
            self._frames = self.cached.frames
            self._donors = _cycle(self._frames, self.cached.present(self._frames), self.seed)
        at = np.searchsorted(self._frames, keys).clip(max=len(self._frames) - 1)
        # Frames that are not cached stay as they are; the cache names them.
        return np.where(self._frames[at] == keys, self._donors[at], keys)


class FutureTeacher(MovedTeacher):
    """A cache that gives a frame the features of a later one of its episode (FRAPPE, arXiv 2602.17259).

    Frames near the end of an episode get those of its last frame.

    Args:
        cached: the features.
        frames: how much later, at least 1.

    Raises:
        ConfigError: `frames` is below 1.
    """

    def __init__(self, cached: CachedTeacher, frames: int) -> None:
        if frames < 1:
            raise ConfigError(f"future is {frames} frames; expected 1 or more.")
        super().__init__(cached, cached.name, f"future-{frames}")
        self.frames = frames

    def donors(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """The frames whose features the frames `keys` (n,) get, (n,)."""
        return np.minimum(keys + self.frames, self.cached.last_frames(keys))


def _cycle(frames: NDArray[np.int64], present: NDArray[np.bool_], seed: int) -> NDArray[np.int64]:
    """A random cycle through the frames of each presence pattern: a permutation without a fixed point."""
    donors = frames.copy()
    rng = np.random.default_rng(seed)
    patterns, which = np.unique(present, axis=0, return_inverse=True)
    for index in range(len(patterns)):
        order = rng.permutation(np.flatnonzero(which.reshape(-1) == index))
        donors[order] = frames[np.roll(order, 1)]
    return donors
