"""Reads LeRobot v3.0 datasets: numbers as arrays in memory, images decoded on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spatial_forcing.data.images import decode_colour, decode_depth
from spatial_forcing.data.info import ACTION, BOOKKEEPING, STATE, DatasetInfo, Keys, extrinsic_key
from spatial_forcing.data.problems import RESTORE, Problem, refuse
from spatial_forcing.data.stats import Stats, vector_stats
from spatial_forcing.data.structure import (
    bookkeeping,
    episode_table,
    features,
    file_paths,
    task_table,
    video_spans,
)
from spatial_forcing.data.tables import image_bytes, read_table, read_tasks, to_numpy
from spatial_forcing.data.video import VideoReader, packets_digest
from spatial_forcing.data.writer import STAGING, read_episode_rows
from spatial_forcing.errors import DataError

OPEN_COLUMNS = 16
"""Image columns of recently read row groups that stay in memory."""
TRIED = 3
"""Episodes of which one frame is tried until one can be decoded."""
OPEN_VIDEOS = 16
"""Video files that stay open."""


@dataclass(frozen=True)
class Episode:
    """One row of the episode table. `start` and `stop` are absolute frame indices (stop excluded);
    `row` is the row of `meta/episodes/` with the files it lies in.
    """

    index: int
    length: int
    start: int
    stop: int
    task: str
    row: dict[str, Any]


class Dataset:
    """A dataset opened for reading; safe to use from several threads.

    Attributes:
        root: the dataset's folder.
        info: the content of `meta/info.json`.
        episodes: the episode table, in order.
        tasks: instructions by `task_index`; the numbers may have gaps.
        store_folder: where the decoded store goes (see `store.store_folder`).
        state: (N, D) float32, action: (N, A) float32, raw units.
        timestamp: (N,) float32 seconds within the episode.
        episode_index, frame_index, task_index: (N,) int64.
    """

    def __init__(
        self,
        root: Path,
        info: DatasetInfo,
        episodes: list[Episode],
        tasks: dict[int, str],
        table: pa.Table,
        *,
        store: Path | None = None,
    ) -> None:
        self.root = root
        self.info = info
        self.store_folder = store
        self.episodes = episodes
        self.tasks = tasks
        self._table = table
        self.state = self._vector(STATE) if STATE in info.features else self._empty()
        self.action = self._vector(ACTION) if ACTION in info.features else self._empty()
        self.timestamp = self._scalar("timestamp").astype(np.float32)
        self.episode_index = self._scalar("episode_index")
        self.frame_index = self._scalar("frame_index")
        self.task_index = self._scalar("task_index")
        self._columns: OrderedDict[tuple[str, int, str], pa.ChunkedArray] = OrderedDict()
        self._row_groups: dict[str, NDArray[np.int64]] = {}
        self._videos: OrderedDict[str, VideoReader] = OrderedDict()
        self._file_starts = self._first_index_of_files()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, root: str | Path, *, keys: Keys | None = None, store: str | Path | None = None) -> Self:
        """Open the dataset in `root`, after the checks of `structure`; its notes are logged.

        Args:
            root: the dataset's folder.
            keys: names of this package -> names of the dataset's features, where they differ (see `Keys`).
            store: folder of the decoded store; default beside the dataset, or the user's cache folder where
                that cannot be written.

        Raises:
            DataError: not a v3.0 dataset, an unfinished recording without a committed episode, a missing or
                truncated file, or anything that `spatial-forcing data check` finds without decoding: tables
                or videos that disagree, files outside the folder, a camera whose frames have another size.
            ConfigError: `keys` names a feature that is not there.
        """
        root = Path(root)
        info = DatasetInfo.load(root, keys)
        if info.total_episodes == 0:
            staged = len(list((root / STAGING).glob("*.json")))
            raise DataError(
                f"{root} holds no committed episode ({staged} recorded, not finalised). "
                "Run the recording again (it resumes), or DatasetWriter.resume(root).finalize()."
            )
        rows = read_episode_rows(root, info)
        # A table that is read by these must be right first.
        refuse([*features(info), *episode_table(info, rows), *file_paths(root, info, rows)], root)
        tasks = read_tasks(root)
        episodes = [
            Episode(
                index=int(row["episode_index"]),
                length=int(row["length"]),
                start=int(row["dataset_from_index"]),
                stop=int(row["dataset_to_index"]),
                task=str((row.get("tasks") or [""])[0]),
                row={k: v for k, v in row.items() if not k.startswith("stats/")},
            )
            for row in rows
        ]
        wanted = _columns(info)
        tables = [read_table(root / file, wanted) for file in _data_files(info, episodes)]
        if not tables:
            raise DataError(f"{root}/meta/episodes lists no episode; run `spatial-forcing data check`.")
        try:
            table = pa.concat_tables(tables)
        except pa.ArrowException as error:
            raise DataError(f"{root}: its data files have different columns ({error}).") from error
        refuse(_table_problems(info, tasks, episodes, table), root)
        refuse(video_spans(root, info, rows, {}), root)
        opened = cls(root, info, episodes, tasks, table, store=None if store is None else Path(store))
        opened._compare_frames()
        return opened

    def __len__(self) -> int:
        return self.info.total_frames

    @property
    def fps(self) -> int:
        """Frames per second."""
        return self.info.fps

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the colour cameras."""
        return tuple(self.info.cameras)

    def statistics(self, episodes: Sequence[int] | None = None) -> dict[str, Stats]:
        """Statistics of `observation.state` and `action` over some episodes (default: all), from the rows.

        `meta/stats.json` is not read: it may belong to other episodes than those that are trained on.

        Raises:
            DataError: the dataset lacks one of them, or a row is not finite (episode and frame are named).
        """
        numbers = range(len(self.episodes)) if episodes is None else episodes
        spans = [self.episodes[number] for number in numbers]
        index = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        found = {}
        for key, values in ((STATE, self.state), (ACTION, self.action)):
            if not values.shape[1]:
                guess = self.info.guess(key)
                raise DataError(
                    f"{self.root} has no {key!r}; "
                    + (f"give --keys {key}={guess}." if guess else "name the feature with --keys.")
                )
            bad = index[~np.isfinite(values[index]).all(1)]
            if len(bad):
                episode = self.episode_of(int(bad[0]))
                raise DataError(
                    f"{self.root}: {key} is not finite in {len(bad)} frames, the first is frame "
                    f"{bad[0] - episode.start} of episode {episode.index}; leave the episode out "
                    "(`episodes`), or record it again."
                )
            found[key] = vector_stats(values[index])
        return found

    def image(self, index: int, camera: str) -> NDArray[np.uint8]:
        """The stored frame, (H, W, 3) uint8, decoded.

        Raises:
            DataError: unknown camera, index out of range, unreadable image or video.
        """
        key = self.info.camera_key(camera)
        episode = self.episode_of(index)
        try:
            with self._lock:
                pixels = self._decoded(episode, key, index)
            if wrong := self._wrong_size(camera, pixels):
                raise DataError(wrong)
            return pixels
        except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three on damaged files
            raise DataError(
                f"{self.root}: episode {episode.index}, frame {index - episode.start}, camera {camera!r}: "
                f"{error} Run `spatial-forcing data check {self.root}`."
            ) from error

    def depth(self, index: int, camera: str) -> NDArray[np.float32]:
        """The depth map in metres, (H, W) float32; 0 means no measurement.

        Raises:
            DataError: the dataset has no depth for `camera`, or it cannot be read.
        """
        if camera not in self.info.depths:
            raise DataError(
                f"{self.root} has no depth for camera {camera!r}; it has depth for "
                f"{sorted(self.info.depths)}. Record with depth on."
            )
        key = self.info.depths[camera]
        if self.info.is_video(key):
            raise DataError(f"{key} is stored as video; this package reads depth as 16-bit images only.")
        with self._lock:
            data = self._encoded_image(self.episode_of(index), key, index)
        unit = (self.info.features[key].get("info") or {}).get("depth_unit") or "mm"
        return decode_depth(data, unit)

    def intrinsics(self, camera: str) -> NDArray[np.float64]:
        """The (3, 3) camera matrix in pixels. Raises `DataError` when it was not recorded."""
        feature = self.info.features[self.info.camera_key(camera)]
        matrix = (feature.get("info") or {}).get("intrinsics")
        if matrix is None:
            raise DataError(f"{self.root} has no intrinsics for camera {camera!r}; record them.")
        return np.asarray(matrix, dtype=np.float64)

    def extrinsics(self, index: int, camera: str) -> NDArray[np.float32]:
        """World from camera at a frame, (4, 4), OpenCV axes. Raises `DataError` when not recorded."""
        self.episode_of(index)
        if extrinsic_key(camera) not in self._table.column_names:
            raise DataError(f"{self.root} has no extrinsics for camera {camera!r}; record them.")
        column = self._table[extrinsic_key(camera)].slice(index, 1)
        return to_numpy(column, (4, 4)).astype(np.float32)[0]

    def episode_of(self, index: int) -> Episode:
        """The episode that frame `index` belongs to. Raises `DataError` when out of range."""
        if not 0 <= index < len(self):
            raise DataError(f"frame index {index} is out of range; {self.root} has {len(self)} frames.")
        return self.episodes[int(self.episode_index[index])]

    def content_hash(
        self, episode: int, cameras: Sequence[str] | None = None, *, geometry: bool = False
    ) -> str:
        """SHA-256 of an episode's encoded colour images (default: all cameras), in camera order.

        With `geometry`, also of the depth, intrinsics and extrinsics of these cameras, where there are any.
        It depends on neither the files the episode lies in nor its position in the dataset.
        """
        if not 0 <= episode < len(self.episodes):
            raise DataError(f"episode {episode} is out of range; there are {len(self.episodes)}.")
        entry = self.episodes[episode]
        digest = hashlib.sha256(f"{entry.length}".encode())
        for camera in cameras if cameras is not None else self.cameras:
            key = self.info.camera_key(camera)
            digest.update(key.encode())
            if self.info.is_video(key):
                prefix = f"videos/{self.info.source(key)}/"
                # Frames after the last row do not belong to the episode.
                start = float(entry.row[prefix + "from_timestamp"])
                stop = start + entry.length / self.fps
                digest.update(packets_digest(self._video_path(entry, key), start, stop, self.fps).encode())
                continue
            for index in range(entry.start, entry.stop):
                with self._lock:
                    digest.update(self._encoded_image(entry, key, index))
        if geometry:
            self._hash_geometry(digest, entry, self.cameras if cameras is None else cameras)
        return digest.hexdigest()

    def _hash_geometry(self, digest: hashlib._Hash, entry: Episode, cameras: Sequence[str]) -> None:
        for camera in cameras:
            info = self.info.features[self.info.camera_key(camera)].get("info") or {}
            digest.update(json.dumps([camera, info.get("intrinsics")]).encode())
            if camera in self.info.depths:
                for index in range(entry.start, entry.stop):
                    with self._lock:
                        digest.update(self._encoded_image(entry, self.info.depths[camera], index))
            if extrinsic_key(camera) in self._table.column_names:
                poses = [self.extrinsics(index, camera).tobytes() for index in range(entry.start, entry.stop)]
                digest.update(b"".join(poses))

    def source_files(self, cameras: Sequence[str]) -> list[Path]:
        """Every file that holds frames of `cameras`."""
        files = {self.root / file for file in _data_files(self.info, self.episodes)}
        for key in map(self.info.camera_key, cameras):
            if self.info.is_video(key):
                files.update(self._video_path(episode, key) for episode in self.episodes)
        return sorted(files)

    def _vector(self, key: str) -> NDArray[np.float32]:
        parts = []
        for name in self.info.columns(key):
            column = self._table[name]
            parts.append(np.array(to_numpy(column, None), np.float32).reshape(len(self), -1))
        joined = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        wanted = int(np.prod(self.info.features[key]["shape"]))
        if joined.shape[1] != wanted:
            raise DataError(
                f"{self.root}: {key} has {joined.shape[1]} numbers a row, meta/info.json says {wanted}. "
                f"Run `spatial-forcing data check {self.root}`."
            )
        return joined

    def _compare_frames(self) -> None:
        """A frame of every camera must have the size that `meta/info.json` gives.

        One frame that cannot be decoded is no reason to refuse the dataset: its episode may be left out.

        Raises:
            DataError: another size, or none of the first episodes' frames can be decoded.
        """
        for camera, key in self.info.cameras.items():
            tried = self.episodes[:TRIED]
            for episode in tried:
                try:
                    pixels = self._decoded(episode, key, episode.start)
                except (OSError, ValueError, SyntaxError) as error:
                    if episode is not tried[-1]:
                        continue
                    raise DataError(
                        f"{self.root}: camera {camera!r}: no frame of episodes 0 to {episode.index} can be "
                        f"decoded ({error}). Run `spatial-forcing data check {self.root}`."
                    ) from error
                if wrong := self._wrong_size(camera, pixels):
                    raise DataError(
                        f"{self.root}: episode {episode.index}, frame 0, camera {camera!r}: {wrong} Correct "
                        "the shape and names of the feature there."
                    )
                break

    def _decoded(self, episode: Episode, key: str, index: int) -> NDArray[np.uint8]:
        if self.info.is_video(key):
            return self._video_frame(episode, key, index)
        return decode_colour(self._encoded_image(episode, key, index))

    def _wrong_size(self, camera: str, pixels: NDArray[np.uint8]) -> str:
        wanted, found = self.info.frame_size(camera), pixels.shape[:2]
        return "" if found == wanted else f"it is {found} pixels, meta/info.json says {wanted}."

    def _scalar(self, key: str) -> NDArray[Any]:
        return np.array(to_numpy(self._table[key], (1,)))

    def _empty(self) -> NDArray[np.float32]:
        return np.zeros((len(self), 0), dtype=np.float32)

    def _first_index_of_files(self) -> dict[str, int]:
        starts: dict[str, int] = {}
        for episode in self.episodes:
            file = _data_file(self.info, episode)
            starts[file] = min(starts.get(file, episode.start), episode.start)
        return starts

    def _encoded_image(self, episode: Episode, key: str, index: int) -> bytes:
        file = _data_file(self.info, episode)
        row = index - self._file_starts[file]
        if file not in self._row_groups:
            metadata = pq.read_metadata(self.root / file)
            sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            self._row_groups[file] = np.cumsum([0, *sizes])
        bounds, name = self._row_groups[file], self.info.source(key)
        group = int(np.searchsorted(bounds, row, side="right")) - 1
        column = _remembered(
            self._columns,
            (file, group, key),
            lambda: pq.ParquetFile(self.root / file).read_row_group(group, columns=[name])[name],
            OPEN_COLUMNS,
        )
        return image_bytes(column, row - int(bounds[group]))

    def _video_path(self, episode: Episode, key: str) -> Path:
        return self.root / self.info.episode_video(key, episode.row)

    def _video_frame(self, episode: Episode, key: str, index: int) -> NDArray[np.uint8]:
        path = self._video_path(episode, key)
        reader = _remembered(self._videos, str(path), lambda: VideoReader(path, self.fps), OPEN_VIDEOS)
        start = float(episode.row[f"videos/{self.info.source(key)}/from_timestamp"])
        return reader.frame(start + (index - episode.start) / self.fps)


def _remembered(memory: OrderedDict[Any, Any], key: Any, make: Any, limit: int) -> Any:
    """The value under `key`, made if absent; the least recently used beyond `limit` are dropped."""
    if key in memory:
        memory.move_to_end(key)
        return memory[key]
    value = make()
    memory[key] = value
    while len(memory) > limit:
        dropped = memory.popitem(last=False)[1]
        if isinstance(dropped, VideoReader):
            dropped.close()
    return value


def _data_file(info: DatasetInfo, episode: Episode) -> str:
    return info.data_file(episode.row["data/chunk_index"], episode.row["data/file_index"])


def _data_files(info: DatasetInfo, episodes: Sequence[Episode]) -> list[str]:
    return list(dict.fromkeys(_data_file(info, episode) for episode in episodes))


def _columns(info: DatasetInfo) -> list[str]:
    """Names, in the files, of `info.numbers`."""
    return list(dict.fromkeys(name for key in info.numbers for name in info.columns(key)))


def _table_problems(
    info: DatasetInfo, tasks: dict[int, str], episodes: Sequence[Episode], table: pa.Table
) -> Iterator[Problem]:
    yield from task_table(info, tasks)
    if table.num_rows != info.total_frames:
        what = f"{table.num_rows} rows, info.json says {info.total_frames} frames"
        yield Problem(None, "data", what, RESTORE)
        return
    missing = [name for name in _columns(info) if name not in table.column_names]
    if missing:
        yield Problem(None, "data", f"the columns {missing} are missing", RESTORE)
        return
    columns = {key: to_numpy(table[key], (1,)) for key in BOOKKEEPING if key in table.column_names}
    for episode in episodes:
        part = {key: values[episode.start : episode.stop] for key, values in columns.items()}
        yield from bookkeeping(info, tasks, episode.row, episode.start, part, file=_data_file(info, episode))
