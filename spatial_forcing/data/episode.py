"""One episode on its way to disk: validated and encoded frame by frame, in any process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.data.images import depth_to_millimetres, encode_png
from spatial_forcing.data.info import ACTION, STATE, DatasetInfo, extrinsic_key
from spatial_forcing.data.stats import (
    Stats,
    image_stats,
    sampled_indices,
    thumbnail,
    vector_stats,
)
from spatial_forcing.data.video import VideoEncoder
from spatial_forcing.errors import DataError

Frame = Mapping[str, Any]
"""{"images": {camera: (H, W, 3) uint8}, "state": (D,), "action": (A,)} and, where the dataset has them,
"depth": {camera: (H, W) metres}, "extrinsics": {camera: (4, 4) world from camera}."""


@dataclass(frozen=True)
class EncodedEpisode:
    """A finished episode that only has to be written; plain data that crosses process borders.

    Attributes:
        tasks: the instruction of each frame.
        columns: feature -> (N, ...) array, or N encoded images.
        videos: feature -> mp4 file content.
        stats: feature -> statistics of this episode.
    """

    tasks: list[str]
    columns: dict[str, Any]
    videos: dict[str, bytes]
    stats: dict[str, Stats]

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def nbytes(self) -> int:
        """Bytes of its images and videos."""
        images = (sum(map(len, c)) for c in self.columns.values() if isinstance(c, list))
        return sum(images) + sum(map(len, self.videos.values()))


class EpisodeEncoder:
    """Collects the frames of one episode and encodes images at once, so that memory stays small."""

    def __init__(self, info: DatasetInfo) -> None:
        self._info = info
        self._tasks: list[str] = []
        self._vectors: dict[str, list[NDArray[np.float32]]] = {key: [] for key in info.vectors}
        self._images: dict[str, list[bytes]] = {}
        self._videos: dict[str, VideoEncoder] = {}
        self._thumbnails: dict[str, list[NDArray[Any]]] = {key: [] for key in info.visual.values()}

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, frame: Frame, task: str) -> None:
        """Append one frame. A refused frame leaves the episode as it was.

        Raises:
            DataError: a camera, depth map, pose or vector is missing, unexpected, not finite or has a wrong
                shape or dtype. The message names it and the frame.
        """
        place = f"frame {len(self)}"
        if frame.get("extrinsics") and not any(extrinsic_key(c) in self._vectors for c in self._info.cameras):
            raise DataError(
                f"{place}: extrinsics are given, but the dataset has none; create it with extrinsics=True."
            )
        vectors = {key: self._vector(frame, key, place) for key in self._vectors}
        images = {
            self._info.cameras[name]: image
            for name, image in self._named(frame, "images", self._info.cameras, place).items()
        }
        for key, image in images.items():
            self._expect(image, key, np.uint8, place)
        for name, depth in self._named(frame, "depth", self._info.depths, place).items():
            images[self._info.depths[name]] = depth_to_millimetres(np.asarray(depth))
            self._expect(images[self._info.depths[name]], self._info.depths[name], np.uint16, place)
        for key, vector in vectors.items():
            self._vectors[key].append(vector)
        for key, image in images.items():
            self._encode(key, image)
        self._tasks.append(task)

    def finish(self) -> EncodedEpisode:
        """The encoded episode. Raises `DataError` when no frame was added."""
        if not self._tasks:
            raise DataError("an episode without frames cannot be saved; call add_frame first.")
        columns: dict[str, Any] = {key: np.stack(rows) for key, rows in self._vectors.items()}
        stats = {key: vector_stats(column) for key, column in columns.items()}
        for key, thumbnails in self._thumbnails.items():
            sampled = [thumbnails[i] for i in sampled_indices(len(self))]
            stats[key] = image_stats(sampled, depth=key in self._info.depths.values())
        videos = {key: encoder.finish() for key, encoder in self._videos.items()}
        return EncodedEpisode(self._tasks, {**columns, **self._images}, videos, stats)

    def _encode(self, key: str, image: NDArray[Any]) -> None:
        self._thumbnails[key].append(thumbnail(image).copy())
        if not self._info.is_video(key):
            self._images.setdefault(key, []).append(encode_png(image))
            return
        if key not in self._videos:
            self._videos[key] = VideoEncoder(image.shape[0], image.shape[1], self._info.fps)
        self._videos[key].add(image)

    def _named(self, frame: Frame, kind: str, wanted: Mapping[str, str], place: str) -> Mapping[str, Any]:
        given = frame.get(kind) or {}
        if set(given) != set(wanted):
            raise DataError(
                f"{place}: {kind} are given for cameras {sorted(given)}; the dataset has {sorted(wanted)}. "
                "Give exactly these, or create the dataset with the cameras you record."
            )
        return given

    def _vector(self, frame: Frame, key: str, place: str) -> NDArray[np.float32]:
        names: dict[str, tuple[str, ...]] = {STATE: ("state",), ACTION: ("action",)}
        names.update({extrinsic_key(name): ("extrinsics", name) for name in self._info.cameras})
        value: Any = frame
        for part in names.get(key, (key,)):
            value = None if value is None else value.get(part)
        shape = self._info.vectors[key]
        if value is None:
            raise DataError(f"{place}: {key} is missing; give {'.'.join(names.get(key, (key,)))} {shape}.")
        array = np.asarray(value, dtype=self._info.features[key]["dtype"])
        if array.shape != shape:
            raise DataError(f"{place}: {key} has shape {array.shape}; the dataset says {shape}.")
        if not np.isfinite(array).all():
            raise DataError(f"{place}: {key} is not finite ({array.tolist()}); correct the recording.")
        return array

    def _expect(self, image: NDArray[Any], key: str, dtype: type, place: str) -> None:
        wanted = tuple(self._info.features[key]["shape"])
        if not isinstance(image, np.ndarray) or image.shape != wanted or image.dtype != dtype:
            there = (getattr(image, "shape", None), str(getattr(image, "dtype", type(image))))
            raise DataError(f"{place}: {key} is {there}; expected {wanted} of {np.dtype(dtype)}.")
