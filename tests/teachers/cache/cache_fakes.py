"""What the cache's tests share: frames that follow from their number, and a teacher that counts them."""

from __future__ import annotations

import numpy as np
import torch

from spatial_forcing.alignment import Views
from spatial_forcing.teachers.cache import SourceEpisode, build_cache
from tests.fakes import CAMERAS, FakeTeacher

LENGTHS = (3, 5, 2, 4)


class FakeSource:
    """Frames are a function of the episode's seed and the frame's number in it."""

    cameras = CAMERAS
    size = 20
    wanted = None

    def __init__(self, lengths=LENGTHS, absent=()):
        starts = np.cumsum([0, *lengths])
        self.identity = "demo"
        self.seeds = list(range(len(lengths)))
        self.spans = [(int(start), length) for start, length in zip(starts, lengths, strict=False)]
        self.absent = set(absent)

    @property
    def episodes(self):
        return [
            SourceEpisode(start, length, number, f"hash{self.seeds[number]}")
            for number, (start, length) in enumerate(self.spans)
        ]

    def __len__(self):
        return sum(length for _, length in self.spans)

    def images(self, indices, camera):
        return np.stack([self._image(int(index), camera) for index in indices])

    def _image(self, index, camera):
        number = next(i for i, (start, n) in enumerate(self.spans) if start <= index < start + n)
        key = [self.seeds[number], index - self.spans[number][0], self.cameras.index(camera)]
        shape = (self.size, self.size, 3)
        return np.random.default_rng(key).integers(0, 256, shape, dtype=np.uint8)

    def present(self, indices, camera):
        return np.array([(int(index), camera) not in self.absent for index in indices])


class CountingTeacher(FakeTeacher):
    """Counts frames, and can die at one of them as a killed process would."""

    def __init__(self, dies_at=None, **kwargs):
        super().__init__(**kwargs)
        self.frames, self.dies_at = [], dies_at

    def features(self, views, layers=(-1,)):
        self.frames += views.keys.tolist()
        if self.dies_at in views.keys.tolist():
            raise KeyboardInterrupt
        return super().features(views, layers)


def build(teacher, source, folder, **options):
    return build_cache(
        teacher, source, folder, **{"batch_size": 2, "shard_bytes": 2500, "progress": False, **options}
    )


def views_of(source, indices, cameras=CAMERAS):
    indices = np.asarray(indices)
    images = np.stack([source.images(indices, camera) for camera in cameras], 1)
    present = np.stack([source.present(indices, camera) for camera in cameras], 1)
    return Views.create(
        torch.from_numpy(images).movedim(-1, 2),
        cameras,
        present=torch.from_numpy(present),
        keys=torch.from_numpy(indices),
    )
