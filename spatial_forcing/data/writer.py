"""Writes LeRobot v3.0 datasets. An interruption loses at most the running episode.

Finished episodes are staged one by one under `.recording/` (a marker file written last makes one count);
`finalize` packs them into the files of the format and commits by replacing `meta/info.json`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spatial_forcing.data.episode import EncodedEpisode, EpisodeEncoder, Frame
from spatial_forcing.data.info import (
    BOOKKEEPING,
    EPISODES_FILE,
    VIDEO_FILE,
    DatasetInfo,
    make_features,
)
from spatial_forcing.data.stats import NAMES, Stats, combine_stats, save_stats, vector_stats
from spatial_forcing.data.tables import (
    frame_schema,
    frame_table,
    read_table,
    read_tasks,
    to_numpy,
    write_table,
    write_tasks,
)
from spatial_forcing.data.video import codec_parameters, join_videos
from spatial_forcing.errors import DataError
from spatial_forcing.storage import write_json

STAGING = ".recording"
MEGABYTE = 2**20
EPISODE_COLUMNS = (
    "episode_index",
    "length",
    "dataset_from_index",
    "dataset_to_index",
    "data/chunk_index",
    "data/file_index",
)
"""Columns of `meta/episodes` that every dataset has."""


class DatasetWriter:
    """`create` or `resume`, then `add_frame` ... `save_episode` ... `finalize` (also a context manager,
    which finalises on a clean exit).
    """

    def __init__(self, root: Path, info: DatasetInfo, tasks: list[str], staged: list[dict[str, Any]]) -> None:
        self.root = root
        self.info = info
        self._tasks = tasks
        self._staged = staged
        self._encoder = EpisodeEncoder(info)

    @classmethod
    def create(
        cls,
        root: str | Path,
        *,
        fps: int,
        cameras: Mapping[str, tuple[int, int]],
        state_dim: int,
        action_dim: int,
        state_names: Sequence[str] | None = None,
        action_names: Sequence[str] | None = None,
        video: bool = False,
        depth: bool = False,
        extrinsics: bool = False,
        robot_type: str | None = None,
        intrinsics: Mapping[str, NDArray[np.floating[Any]]] | None = None,
        data_files_size_in_mb: int = 100,
        video_files_size_in_mb: int = 200,
    ) -> Self:
        """Start a dataset in an empty or new folder; the features are those of `make_features`.

        Raises:
            DataError: the folder holds something already.
            ConfigError: a wrong setting.
        """
        features = make_features(
            cameras,
            state_dim,
            action_dim,
            state_names=state_names,
            action_names=action_names,
            video=video,
            depth=depth,
            extrinsics=extrinsics,
            intrinsics=intrinsics,
        )
        info = DatasetInfo(
            fps=fps,
            features=features,
            robot_type=robot_type,
            video_path=VIDEO_FILE if video else None,
            data_files_size_in_mb=data_files_size_in_mb,
            video_files_size_in_mb=video_files_size_in_mb,
        )
        return cls.start(root, info)

    @classmethod
    def start(cls, root: str | Path, info: DatasetInfo) -> Self:
        """Start the dataset that `info` describes in an empty or new folder.

        Raises:
            DataError: the folder holds something already.
        """
        root = Path(root)
        if root.exists() and any(root.iterdir()):
            raise DataError(
                f"{root} is not empty; continue it with DatasetWriter.resume, or choose another folder."
            )
        info.save(root)
        return cls(root, info, [], [])

    @classmethod
    def resume(cls, root: str | Path) -> Self:
        """Continue after the last complete episode, of an interrupted recording or a finished dataset."""
        root = Path(root)
        info = DatasetInfo.load(root)
        tasks = list(read_tasks(root).values())[: info.total_tasks] if info.total_tasks else []
        staged: list[dict[str, Any]] = []
        while (marker := _staged_path(root, info.total_episodes + len(staged), ".json")).is_file():
            staged.append(json.loads(marker.read_text()))
            tasks.extend(task for task in staged[-1]["tasks"] if task not in tasks)
        return cls(root, info, tasks, staged)

    @property
    def num_episodes(self) -> int:
        """Complete episodes, committed or staged."""
        return self.info.total_episodes + len(self._staged)

    @property
    def num_frames(self) -> int:
        """Frames of the complete episodes."""
        return self.info.total_frames + sum(row["length"] for row in self._staged)

    @property
    def tasks(self) -> list[str]:
        """Distinct instructions so far, in the order of `task_index`."""
        return list(self._tasks)

    def add_frame(self, frame: Frame, task: str) -> None:
        """Append a frame (see `episode.Frame`) to the running episode.

        Raises:
            DataError: the frame does not fit the dataset; the running episode stays as it was.
        """
        self._encoder.add(frame, task)

    def save_episode(self) -> None:
        """Stage the running episode on disk and begin the next."""
        self.write_episode(self._encoder.finish())
        self.discard_episode()

    def discard_episode(self) -> None:
        """Forget the frames since the last `save_episode`."""
        self._encoder = EpisodeEncoder(self.info)

    def write_episode(self, episode: EncodedEpisode) -> None:
        """Stage an episode that an `EpisodeEncoder`, perhaps of another process, has finished."""
        number, length = self.num_episodes, len(episode)
        self._tasks.extend(t for t in dict.fromkeys(episode.tasks) if t not in self._tasks)
        columns = {**self._bookkeeping(episode), **episode.columns}
        stats = {**episode.stats, **{key: vector_stats(columns[key]) for key in BOOKKEEPING}}
        for key, content in episode.videos.items():
            path = _staged_path(self.root, number, f".{key}.mp4")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        write_table(_staged_path(self.root, number, ".parquet"), frame_table(self.info, columns))
        row = {"length": length, "tasks": list(dict.fromkeys(episode.tasks)), "stats": _plain(stats)}
        write_json(_staged_path(self.root, number, ".json"), row)
        self._staged.append(row)

    def finalize(self) -> None:
        """Pack the staged episodes into the dataset's files; a no-op without new episodes.

        Interrupted, it can be repeated: until `meta/info.json` is replaced the old state stands.
        """
        if not self._staged:
            _remove_staging(self.root)
            return
        committed = read_episode_rows(self.root, self.info)
        rows = self._episode_rows(committed)
        self._pack_data(rows, committed)
        for key in (k for k in self.info.features if self.info.is_video(k)):
            self._pack_video(key, rows, committed)
        chunk, file = self._next_file(committed, "meta/episodes/")
        for row in rows:
            row.update({"meta/episodes/chunk_index": chunk, "meta/episodes/file_index": file})
        path = self.root / EPISODES_FILE.format(chunk_index=chunk, file_index=file)
        write_table(path, pa.Table.from_pylist(rows))
        info = replace(
            self.info,
            total_episodes=self.num_episodes,
            total_frames=self.num_frames,
            total_tasks=len(self._tasks),
        )
        save_stats(self.root, dataset_stats(self.root, info, [*committed, *rows]))
        write_tasks(self.root, self._tasks)
        info.save(self.root)
        self.info = info
        self._staged = []
        self.discard_episode()
        _remove_staging(self.root)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finalize()

    def _bookkeeping(self, episode: EncodedEpisode) -> dict[str, NDArray[Any]]:
        frames = np.arange(len(episode))
        return {
            "timestamp": (frames / self.info.fps).astype(np.float32),
            "frame_index": frames,
            "episode_index": np.full(len(episode), self.num_episodes),
            "index": frames + self.num_frames,
            "task_index": np.array([self._tasks.index(task) for task in episode.tasks]),
        }

    def _episode_rows(self, committed: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows, start = [], self.info.total_frames
        for number, staged in enumerate(self._staged, start=len(committed)):
            stop = start + staged["length"]
            row = {
                "episode_index": number,
                "tasks": staged["tasks"],
                "length": staged["length"],
                "dataset_from_index": start,
                "dataset_to_index": stop,
            }
            for key, stats in staged["stats"].items():
                row.update({f"stats/{key}/{name}": value for name, value in stats.items()})
            rows.append(row)
            start = stop
        return rows

    def _pack_data(self, rows: list[dict[str, Any]], committed: list[dict[str, Any]]) -> None:
        """Copy staged tables into data files, one row group an episode, so that one can be read alone."""
        files = [_staged_path(self.root, row["episode_index"], ".parquet") for row in rows]
        place = self._next_file(committed, "data/")
        for group in _groups(files, self.info.data_files_size_in_mb):
            target = self.root / self.info.data_file(*place)
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = target.with_name(target.name + ".tmp")
            with pq.ParquetWriter(beside, frame_schema(self.info), compression="snappy") as writer:
                for i in group:
                    writer.write_table(read_table(files[i]))
                    rows[i].update({"data/chunk_index": place[0], "data/file_index": place[1]})
            os.replace(beside, target)
            place = self._after(*place)

    def _pack_video(self, key: str, rows: list[dict[str, Any]], committed: list[dict[str, Any]]) -> None:
        files = [_staged_path(self.root, row["episode_index"], f".{key}.mp4") for row in rows]
        prefix = f"videos/{key}/"
        place = self._next_file(committed, prefix)
        # Packets are copied, which needs one encoding in a file.
        for group in _groups(files, self.info.video_files_size_in_mb, [codec_parameters(f) for f in files]):
            lengths = [rows[i]["length"] for i in group]
            target = self.root / self.info.video_file(key, *place)
            join_videos([files[i] for i in group], lengths, self.info.fps, target)
            starts = np.cumsum([0, *lengths]) / self.info.fps
            for i, start, stop in zip(group, starts, starts[1:], strict=False):
                rows[i].update(
                    {
                        prefix + "chunk_index": place[0],
                        prefix + "file_index": place[1],
                        prefix + "from_timestamp": float(start),
                        prefix + "to_timestamp": float(stop),
                    }
                )
            place = self._after(*place)

    def _next_file(self, committed: list[dict[str, Any]], prefix: str) -> tuple[int, int]:
        used = [(r[prefix + "chunk_index"], r[prefix + "file_index"]) for r in committed]
        return self._after(*max(used)) if used else (0, 0)

    def _after(self, chunk: int, file: int) -> tuple[int, int]:
        return (chunk, file + 1) if file + 1 < self.info.chunks_size else (chunk + 1, 0)


def read_episode_rows(root: Path, info: DatasetInfo) -> list[dict[str, Any]]:
    """The rows of `meta/episodes/`, in order; rows of an uncommitted `finalize` are left out."""
    rows: list[dict[str, Any]] = []
    for path in sorted((root / "meta" / "episodes").glob("*/*.parquet")):
        table = read_table(path)
        if lacking := sorted(set(EPISODE_COLUMNS) - set(table.column_names)):
            raise DataError(f"{path} lacks the columns {lacking}; restore it from where you got it.")
        rows.extend(table.to_pylist())
    return sorted(rows, key=lambda row: int(row["episode_index"]))[: info.total_episodes]


def dataset_stats(root: Path, info: DatasetInfo, rows: Sequence[dict[str, Any]]) -> dict[str, Stats]:
    """Statistics of the whole dataset: exact for numbers, from the episodes' for images."""
    keys = [*info.vectors, *BOOKKEEPING]
    files = sorted({info.data_file(row["data/chunk_index"], row["data/file_index"]) for row in rows})
    tables = [read_table(root / file, keys) for file in files]
    stats = {}
    for key in keys:
        shape = info.features[key]["shape"]
        stats[key] = vector_stats(np.concatenate([to_numpy(table[key], shape) for table in tables]))
    for key in info.visual.values():
        parts = [
            {name: np.asarray(row[f"stats/{key}/{name}"]) for name in NAMES}
            for row in rows
            if row.get(f"stats/{key}/mean") is not None
        ]
        if parts:
            stats[key] = combine_stats(parts)
    return stats


def _groups(
    files: Sequence[Path], megabytes: float, kinds: Sequence[Any] | None = None
) -> Iterator[list[int]]:
    """Runs of consecutive files of one kind that stay below `megabytes` (a larger file stands alone)."""
    group: list[int] = []
    size = 0
    for i, file in enumerate(files):
        length = file.stat().st_size
        other = kinds is not None and group and kinds[group[-1]] != kinds[i]
        if group and (other or size + length > megabytes * MEGABYTE):
            yield group
            group, size = [], 0
        group.append(i)
        size += length
    if group:
        yield group


def _plain(stats: Mapping[str, Stats]) -> dict[str, dict[str, Any]]:
    return {key: {name: v.tolist() for name, v in value.items()} for key, value in stats.items()}


def _staged_path(root: Path, number: int, suffix: str) -> Path:
    return root / STAGING / f"episode-{number:06d}{suffix}"


def _remove_staging(root: Path) -> None:
    shutil.rmtree(root / STAGING, ignore_errors=True)
