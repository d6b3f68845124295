"""Training batches as a pure function of (seed, step): resume needs no state, ranks change nothing.

The global batch of a step is a slice of an endless stream of per-epoch permutations; rank r of n takes the
r-th of n equal parts of it. Arms with one seed see the same batches with the same augmentation.
"""

from __future__ import annotations

import queue
import threading
import zlib
from collections.abc import Generator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spatial_forcing.alignment import (
    FRAME_PREFIX,
    FRAME_VALID_SUFFIX,
    GEOMETRY_PREFIX,
    IMAGE_PREFIX,
    compose,
    invert,
)
from spatial_forcing.data.augment import Augment, Draw, colour_jitter
from spatial_forcing.data.geometry import Size, common_frame, letterbox_map, letterboxed, warp
from spatial_forcing.data.reader import Dataset
from spatial_forcing.data.store import DecodedStore, store_bytes
from spatial_forcing.errors import ConfigError, DataError

STORE_LIMIT = 32 * 2**30
"""Datasets whose decoded frames take more bytes than this are decoded frame by frame instead."""
PREFETCHED = 2


class BatchLoader:
    """Batches with LeRobot's key names (see `protocols.Batch`), raw units.

    Args:
        dataset: the source.
        cameras: views, in the student's order.
        chunk: actions a sample, from its own frame on; past the episode's end the last one is repeated and
            `action_is_pad` is True.
        batch_size: samples of the *global* batch, over all ranks.
        seed: of the order and the augmentation.
        image_size: side or (height, width) of the student's images; frames of another size are letterboxed.
            None keeps the recorded size.
        episodes: use these only.
        augment: drawn for each (seed, step, sample, camera).
        keep_frames: add `frame.<camera>` and `geometry.<camera>`.
        rank, world_size: which part of the global batch to deliver.
        decoded: True builds the decoded store, False decodes on the fly, None decides by size.
        progress: show the progress of building the store.

    Raises:
        ConfigError: a size, chunk or camera list that cannot work.
        DataError: an unknown camera or episode.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        cameras: Sequence[str],
        chunk: int,
        batch_size: int,
        seed: int,
        image_size: int | Size | None = None,
        episodes: Sequence[int] | None = None,
        augment: Augment | None = None,
        keep_frames: bool = False,
        rank: int = 0,
        world_size: int = 1,
        decoded: bool | None = None,
        progress: bool = True,
    ) -> None:
        _check(cameras, chunk, batch_size, rank, world_size)
        self.dataset = dataset
        self.cameras = tuple(cameras)
        self.chunk, self.batch_size, self.seed = chunk, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.augment = augment
        self.keep_frames = keep_frames
        self._size: Size | None = (image_size, image_size) if isinstance(image_size, int) else image_size
        self._frame_sizes = {camera: dataset.info.frame_size(camera) for camera in self.cameras}
        self._samples = _sample_indices(dataset, episodes)
        self._stops = np.array([episode.stop for episode in dataset.episodes])
        if decoded is None:
            decoded = store_bytes(dataset, self.cameras) <= STORE_LIMIT
        self._store: DecodedStore | None = (
            DecodedStore.build(dataset, self.cameras, progress=progress, episodes=episodes)
            if decoded
            else None
        )
        # One cache a loader, so that it is freed with the loader.
        self._permutation = lru_cache(maxsize=4)(self._draw_permutation)

    @property
    def num_samples(self) -> int:
        """Frames of one epoch."""
        return len(self._samples)

    def indices(self, step: int) -> NDArray[np.int64]:
        """Absolute frame indices of the whole global batch of `step`."""
        positions = step * self.batch_size + np.arange(self.batch_size)
        epochs, offsets = np.divmod(positions, self.num_samples)
        picked = [
            self._permutation(int(epoch))[offset] for epoch, offset in zip(epochs, offsets, strict=True)
        ]
        return self._samples[np.array(picked)]

    def batch(self, step: int) -> dict[str, Any]:
        """This rank's part of the batch of `step`, on the CPU.

        Raises:
            DataError: a frame cannot be read, or a state or action is not finite; the frames are named.
        """
        share = self.batch_size // self.world_size
        part = np.arange(self.rank * share, (self.rank + 1) * share)
        index = self.indices(step)[part]
        batch: dict[str, Any] = {}
        for camera in self.cameras:
            self._add_view(batch, camera, index, step, part)
        stops = self._stops[self.dataset.episode_index[index]]
        wanted = index[:, None] + np.arange(self.chunk)
        rows = np.minimum(wanted, stops[:, None] - 1)
        batch["observation.state"] = torch.from_numpy(self.dataset.state[index])
        batch["action"] = torch.from_numpy(self.dataset.action[rows])
        batch["action_is_pad"] = torch.from_numpy(wanted >= stops[:, None])
        batch["task"] = [self.dataset.tasks[i] for i in self.dataset.task_index[index]]
        batch["index"] = torch.from_numpy(index)
        batch["episode_index"] = torch.from_numpy(self.dataset.episode_index[index].astype(np.int64))
        self._require_finite(batch)
        return batch

    def iterate(self, start: int, stop: int) -> Generator[dict[str, Any]]:
        """Batches of steps `start` to `stop` - 1, made ahead in a background thread.

        An error of the thread is raised here, in its place in the sequence.
        """
        ready: queue.Queue[dict[str, Any] | BaseException] = queue.Queue(PREFETCHED)
        stopped = threading.Event()

        def offer(item: dict[str, Any] | BaseException) -> None:
            while not stopped.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def produce() -> None:
            try:
                for step in range(start, stop):
                    if stopped.is_set():
                        return
                    offer(self.batch(step))
            except BaseException as error:
                offer(error)

        thread = threading.Thread(target=produce, name="batch-loader", daemon=True)
        thread.start()
        try:
            for _ in range(start, stop):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()

    def _draw_permutation(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)

    def _add_view(
        self, batch: dict[str, Any], camera: str, index: NDArray[np.int64], step: int, part: NDArray[Any]
    ) -> None:
        frames = torch.from_numpy(self._frames(index, camera)).permute(0, 3, 1, 2).contiguous()
        source = self._frame_sizes[camera]
        size = self._size or source
        draws = self._draws(camera, step, part, size)
        letterbox = letterbox_map(source, size)
        maps = compose(letterbox, torch.stack([d.affine for d in draws])) if draws else None
        image: Tensor = frames
        if maps is not None or size != source:
            maps = letterbox.expand(len(index), 2, 3).contiguous() if maps is None else maps
            image = warp(frames, maps, size)
        if self.augment is not None and self.augment.photometric:
            factors = zip(*((d.brightness, d.contrast, d.saturation) for d in draws), strict=True)
            image = colour_jitter(image.float() / 255, *factors)
        elif image.is_floating_point():
            image = (image + 0.5).to(torch.uint8)  # bilinear weights cannot leave [0, 255]
        batch[IMAGE_PREFIX + camera] = image
        if self.keep_frames:
            identity = letterbox.expand(len(index), 2, 3).clone()
            self._keep_frame(batch, camera, frames, identity if maps is None else maps)

    def _keep_frame(self, batch: dict[str, Any], camera: str, frames: Tensor, maps: Tensor) -> None:
        """The frames as a cache holds them: cameras of several sizes are letterboxed to one."""
        target = common_frame(self._frame_sizes.values())
        if len(set(self._frame_sizes.values())) > 1:
            frames, picture = letterboxed(frames, target)
            batch[FRAME_PREFIX + camera + FRAME_VALID_SUFFIX] = picture.expand(len(frames), *target).clone()
            maps = compose(invert(letterbox_map(self._frame_sizes[camera], target)), maps)
        batch[FRAME_PREFIX + camera] = frames
        batch[GEOMETRY_PREFIX + camera] = maps

    def _frames(self, index: NDArray[np.int64], camera: str) -> NDArray[np.uint8]:
        if self._store is not None:
            return self._store.images(index, camera)
        return np.stack([self.dataset.image(int(i), camera) for i in index])

    def _draws(self, camera: str, step: int, part: NDArray[Any], size: Size) -> list[Draw]:
        if self.augment is None:
            return []
        name = zlib.crc32(camera.encode())  # draws do not depend on which other cameras there are
        keys = ([self.seed, step, int(i), name] for i in part)
        return [self.augment.draw(np.random.default_rng(key), camera, size) for key in keys]

    def _require_finite(self, batch: dict[str, Any]) -> None:
        for key in ("observation.state", "action"):
            bad = ~torch.isfinite(batch[key]).flatten(1).all(1)
            if bool(bad.any()):
                frames = batch["index"][bad].tolist()
                raise DataError(
                    f"{key} is not finite in frames {frames} of {self.dataset.root}; "
                    f"run `spatial-forcing data check {self.dataset.root}` and leave out those episodes."
                )


def _check(cameras: Sequence[str], chunk: int, batch_size: int, rank: int, world_size: int) -> None:
    if not cameras or len(set(cameras)) != len(cameras):
        raise ConfigError(f"cameras are {tuple(cameras)}; give at least one, each once.")
    if chunk < 1:
        raise ConfigError(f"chunk is {chunk}; expected at least 1.")
    if batch_size < 1 or batch_size % world_size:
        raise ConfigError(
            f"batch_size {batch_size} (all processes together) cannot be shared by {world_size} processes; "
            f"choose a multiple of {world_size}."
        )
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not in 0 to {world_size - 1}.")


def _sample_indices(dataset: Dataset, episodes: Sequence[int] | None) -> NDArray[np.int64]:
    numbers = range(len(dataset.episodes)) if episodes is None else episodes
    unknown = [number for number in numbers if not 0 <= number < len(dataset.episodes)]
    if unknown or not len(numbers):
        raise DataError(
            f"episodes {unknown or '(none)'} are not in {dataset.root}; it has {len(dataset.episodes)}."
        )
    spans = [dataset.episodes[number] for number in numbers]
    return np.concatenate([np.arange(span.start, span.stop) for span in spans])
