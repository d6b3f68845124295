"""Looks a dataset over from end to end and names what is wrong, by episode, with the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spatial_forcing.data.images import decode_colour, decode_depth
from spatial_forcing.data.info import BOOKKEEPING, STATS_FILE, DatasetInfo
from spatial_forcing.data.reader import Dataset
from spatial_forcing.data.stats import NAMES, load_stats
from spatial_forcing.data.store import FOLDER, verify_store
from spatial_forcing.data.tables import image_bytes, read_tasks, to_numpy
from spatial_forcing.data.video import VideoReader
from spatial_forcing.data.writer import STAGING, read_episode_rows
from spatial_forcing.errors import DataError

RESTORE = "restore the file from where you got it, or record the episode again"
RERECORD = "leave the episode out (episodes=...), or record it again"
DELETE_STORE = "delete the .decoded folder; it is built again when needed"


@dataclass(frozen=True)
class Problem:
    """One defect. `episode` is None when it concerns the whole dataset."""

    episode: int | None
    place: str
    what: str
    remedy: str

    def __str__(self) -> str:
        where = "dataset" if self.episode is None else f"episode {self.episode}"
        return f"{where}: {self.place}: {self.what}; {self.remedy}."


def check(root: str | Path, *, decode: bool = True) -> list[Problem]:
    """Every defect found; an empty list means the dataset is sound. Never raises for a broken dataset.

    Args:
        root: the dataset's folder.
        decode: decode every image and video frame as well (slower); False looks at the tables only.
    """
    root = Path(root)
    try:
        info = DatasetInfo.load(root)
    except DataError as error:
        return [Problem(None, "meta/info.json", str(error).rstrip("."), RESTORE)]
    problems = list(_check_meta(root, info))
    try:
        rows = read_episode_rows(root, info)
    except (DataError, KeyError) as error:
        return [*problems, Problem(None, "meta/episodes", str(error).rstrip("."), RESTORE)]
    problems += _check_episode_table(info, rows)
    files: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        files.setdefault(info.data_file(row["data/chunk_index"], row["data/file_index"]), []).append(row)
    for file, episodes in files.items():
        problems += _check_data_file(root, info, file, episodes, decode)
    for key in (k for k in info.features if info.is_video(k)):
        for row in rows:
            problems += _check_video(root, info, key, row, decode)
    if not problems:
        problems += [
            Problem(number, f"{FOLDER}/{name}", "rows do not match their checksum", DELETE_STORE)
            for number, name in verify_store(Dataset.open(root))
        ]
    return problems


def _check_meta(root: Path, info: DatasetInfo) -> Iterator[Problem]:
    if not info.cameras:
        yield Problem(None, "meta/info.json", "no camera among the features", "record with a camera")
    missing = [key for key in BOOKKEEPING if key not in info.features]
    if missing:
        yield Problem(None, "meta/info.json", f"features lack {missing}", RESTORE)
    staged = len(list((root / STAGING).glob("*.json")))
    if staged:
        what = f"{staged} recorded episodes are not finalised"
        yield Problem(None, STAGING, what, "run the recording again (it resumes)")
    try:
        tasks = read_tasks(root)
        if len(tasks) != info.total_tasks:
            what = f"{len(tasks)} tasks, info.json promises {info.total_tasks}"
            yield Problem(None, "meta/tasks.parquet", what, RESTORE)
    except (DataError, KeyError) as error:
        yield Problem(None, "meta/tasks.parquet", str(error).rstrip("."), RESTORE)
    try:
        stats = load_stats(root)
    except DataError as error:
        yield Problem(None, STATS_FILE, str(error).rstrip("."), RESTORE)
        return
    for key in (*info.vectors, *info.cameras.values()):
        lacking = [name for name in NAMES[:4] if name not in stats.get(key, {})]
        if lacking:
            yield Problem(None, STATS_FILE, f"{key} lacks {lacking}", RESTORE)
        elif not all(np.isfinite(stats[key][name]).all() for name in NAMES[:4]):
            yield Problem(None, STATS_FILE, f"{key} has statistics that are not finite", RESTORE)


def _check_episode_table(info: DatasetInfo, rows: list[dict[str, Any]]) -> Iterator[Problem]:
    if len(rows) != info.total_episodes:
        what = f"{len(rows)} episodes, info.json promises {info.total_episodes}"
        yield Problem(None, "meta/episodes", what, RESTORE)
    start = 0
    for position, row in enumerate(rows):
        number = int(row["episode_index"])
        first, last, length = (row[k] for k in ("dataset_from_index", "dataset_to_index", "length"))
        if number != position:
            yield Problem(number, "meta/episodes", f"found where episode {position} should be", RESTORE)
        if first != start or last - first != length or length < 1:
            what = f"frames {first} to {last} with length {length}; expected to begin at {start}"
            yield Problem(number, "meta/episodes", what, RESTORE)
        start = last
    if start != info.total_frames:
        what = f"episodes end at frame {start}, info.json promises {info.total_frames}"
        yield Problem(None, "meta/episodes", what, RESTORE)


def _check_data_file(
    root: Path, info: DatasetInfo, file: str, episodes: list[dict[str, Any]], decode: bool
) -> Iterator[Problem]:
    numbers = [int(row["episode_index"]) for row in episodes]
    try:
        parquet = pq.ParquetFile(root / file)
        names = set(parquet.schema_arrow.names)
    except (OSError, pa.ArrowException) as error:
        for number in numbers:
            yield Problem(number, file, f"missing or truncated ({error})", RESTORE)
        return
    wanted = [key for key in info.features if not info.is_video(key)]
    for key in (k for k in wanted if k not in names):
        for number in numbers:
            yield Problem(number, file, f"column {key} is missing", RESTORE)
    first = int(episodes[0]["dataset_from_index"])
    promised = int(episodes[-1]["dataset_to_index"]) - first
    if parquet.metadata.num_rows != promised:
        what = f"{parquet.metadata.num_rows} rows, the episode table promises {promised}"
        yield Problem(numbers[-1], file, what, RESTORE)
    begin = first
    for group in range(parquet.num_row_groups):
        stop = begin + parquet.metadata.row_group(group).num_rows
        inside = [r for r in episodes if r["dataset_from_index"] < stop and r["dataset_to_index"] > begin]
        try:
            table = parquet.read_row_group(group, columns=[key for key in wanted if key in names])
        except (OSError, pa.ArrowException) as error:
            for row in inside:
                yield Problem(int(row["episode_index"]), file, f"unreadable rows ({error})", RESTORE)
        else:
            for row in inside:
                low, high = max(begin, row["dataset_from_index"]), min(stop, row["dataset_to_index"])
                part = table.slice(low - begin, high - low)
                yield from _Rows(info, file, row, low, part).check(decode)
        begin = stop


@dataclass(frozen=True)
class _Rows:
    """Consecutive rows of one episode in one data file; `start` is the absolute index of the first."""

    info: DatasetInfo
    file: str
    row: dict[str, Any]
    start: int
    table: pa.Table

    @property
    def number(self) -> int:
        return int(self.row["episode_index"])

    @property
    def frames(self) -> NDArray[np.int64]:
        """Frame numbers within the episode."""
        return np.arange(self.table.num_rows) + self.start - int(self.row["dataset_from_index"])

    def problem(self, key: str, what: str, remedy: str) -> Problem:
        return Problem(self.number, f"{self.file} {key}", what.rstrip("."), remedy)

    def check(self, decode: bool) -> Iterator[Problem]:
        for key in self.table.column_names:
            feature = self.info.features[key]
            if feature["dtype"] == "image":
                yield from self._images(key, decode)
            elif feature["dtype"] not in ("string", "language"):
                try:
                    values = to_numpy(self.table[key], feature["shape"])
                except (DataError, ValueError, pa.ArrowException) as error:
                    yield self.problem(key, f"wrong shape ({error})", RERECORD)
                else:
                    yield from self._numbers(key, values)

    def _numbers(self, key: str, values: NDArray[Any]) -> Iterator[Problem]:
        expected = {
            "index": self.frames + int(self.row["dataset_from_index"]),
            "frame_index": self.frames,
            "episode_index": np.full(self.table.num_rows, self.number),
        }
        if key in expected:
            if not np.array_equal(values, expected[key]):
                at = int(np.flatnonzero(values != expected[key])[0])
                what = f"frame {self.frames[at]} holds {values[at]}, expected {expected[key][at]} (a gap)"
                yield self.problem(key, what, RESTORE)
        elif key == "timestamp":
            yield from self._timestamps(values)
        elif key == "task_index":
            if ((values < 0) | (values >= self.info.total_tasks)).any():
                yield self.problem(key, f"task index {values.max()} has no task", RESTORE)
        elif values.dtype.kind == "f" and not np.isfinite(values).all():
            bad = self.frames[~np.isfinite(values.reshape(len(values), -1)).all(1)]
            what = f"NaN or infinite in {len(bad)} frames, first frame {bad[0]}"
            yield self.problem(key, what, RERECORD)

    def _timestamps(self, time: NDArray[Any]) -> Iterator[Problem]:
        steps = np.diff(time.astype(np.float64))
        period = 1 / self.info.fps
        if not (steps > 0).all() or not np.isfinite(time).all():
            at = int(np.flatnonzero(~(steps > 0))[0]) + 1 if len(steps) else 0
            yield self.problem("timestamp", f"not increasing at frame {self.frames[at]}", RERECORD)
        elif (np.abs(steps - period) > 0.5 * period).any():
            at = int(np.abs(steps - period).argmax())
            what = f"{steps[at]:.4g} s before frame {self.frames[at + 1]} at {self.info.fps} fps"
            yield self.problem("timestamp", what, RERECORD)

    def _images(self, key: str, decode: bool) -> Iterator[Problem]:
        shape = tuple(self.info.features[key]["shape"])
        depth = key in self.info.depths.values()
        bad: list[str] = []
        for i, frame in enumerate(self.frames):
            try:
                data = image_bytes(self.table[key], i)
                if decode:
                    found = (*decode_depth(data).shape, 1) if depth else decode_colour(data).shape
                    if found != shape and (found[-1], *found[:2]) != shape:
                        bad.append(f"frame {frame}: shape {found}, info.json says {shape}")
            except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three on damaged files
                bad.append(f"frame {frame}: unreadable ({error})")
        if bad:
            yield self.problem(key, f"{len(bad)} bad images, first {bad[0]}", RERECORD)


def _check_video(
    root: Path, info: DatasetInfo, key: str, row: dict[str, Any], decode: bool
) -> Iterator[Problem]:
    number, prefix = int(row["episode_index"]), f"videos/{key}/"
    if row.get(prefix + "file_index") is None:
        yield Problem(number, "meta/episodes", f"no video of {key} is named", RESTORE)
        return
    file = info.video_file(key, row[prefix + "chunk_index"], row[prefix + "file_index"])
    start, stop = row[prefix + "from_timestamp"], row[prefix + "to_timestamp"]
    if abs((stop - start) * info.fps - row["length"]) > 0.5:
        what = f"{stop - start:.4g} s of video for {row['length']} frames at {info.fps} fps"
        yield Problem(number, file, what, RESTORE)
    try:
        reader = VideoReader(root / file, info.fps)
        try:
            for frame in range(row["length"]) if decode else (0, row["length"] - 1):
                found = reader.frame(start + frame / info.fps).shape
                if sorted(found) != sorted(info.features[key]["shape"]):
                    what = f"frame {frame} is {found}, info.json says {info.features[key]['shape']}"
                    yield Problem(number, file, what, RERECORD)
                    return
        finally:
            reader.close()
    except (DataError, OSError) as error:
        yield Problem(number, file, str(error).rstrip("."), RESTORE)
