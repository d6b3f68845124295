"""Checks a whole dataset and names what is wrong, by episode, with the remedy.

What the tables and files must agree on is in `structure`, which `Dataset.open` uses too; here come all
frames, all numbers and the statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spatial_forcing.data.images import decode_colour, decode_depth
from spatial_forcing.data.info import (
    ACTION,
    BOOKKEEPING,
    INFO_FILE,
    STATE,
    STATS_FILE,
    DatasetInfo,
    Keys,
    image_size,
)
from spatial_forcing.data.problems import RERECORD, RESTORE, Problem
from spatial_forcing.data.reader import Dataset
from spatial_forcing.data.stats import MOMENTS, Stats, load_stats, vector_stats
from spatial_forcing.data.store import verify_store
from spatial_forcing.data.structure import (
    absent_vectors,
    bookkeeping,
    episode_table,
    features,
    file_paths,
    names_video,
    task_table,
    video_spans,
)
from spatial_forcing.data.tables import image_bytes, read_tasks, to_numpy
from spatial_forcing.data.video import VideoFacts, VideoReader
from spatial_forcing.data.writer import STAGING, read_episode_rows
from spatial_forcing.errors import ConfigError, DataError

__all__ = ["Problem", "check"]

DELETE_STORE = "delete its folder; it is built again when needed"
RECOMPUTE = "run `spatial-forcing data stats` to recompute them"
OFF = 0.005
"""Share of a dimension's range by which a statistic may be off: writers round and aggregate differently."""


def check(root: str | Path, *, decode: bool = True, keys: Keys | None = None) -> list[Problem]:
    """Everything found; no entry but notes means the dataset is sound. Never raises for a broken dataset.

    Args:
        root: the dataset's folder.
        decode: decode every image and video frame as well (slower); False looks at the tables only.
        keys: names of this package -> names of the dataset's features (see `Keys`).
    """
    root = Path(root)
    try:
        info = DatasetInfo.load(root, keys)
    except (DataError, ConfigError) as error:
        return [Problem(None, INFO_FILE, str(error).rstrip("."), RESTORE)]
    tasks, problems = _check_meta(root, info)
    try:
        rows = read_episode_rows(root, info)
    except (DataError, KeyError) as error:
        return [*problems, Problem(None, "meta/episodes", str(error).rstrip("."), RESTORE)]
    unusable = [*episode_table(info, rows), *file_paths(root, info, rows)]
    problems += unusable
    if any(not problem.note for problem in unusable) and not rows:
        return problems
    files: dict[str, list[dict[str, Any]]] = {}
    outside = {p.place for p in unusable}
    for row in rows:
        files.setdefault(info.data_file(row["data/chunk_index"], row["data/file_index"]), []).append(row)
    for file, episodes in files.items():
        if file not in outside:
            problems += _check_data_file(root, info, tasks, file, episodes, decode=decode)
    facts: dict[str, VideoFacts | DataError] = dict.fromkeys(outside, DataError("outside the dataset"))
    problems += [p for p in video_spans(root, info, rows, facts) if p.place not in outside]
    for key in info.videos:
        for row in rows:
            if names_video(info, key, row):
                file = info.episode_video(key, row)
                if not isinstance(facts.get(file), DataError):
                    problems += _check_video(root, info, key, file, row, decode=decode)
    if all(problem.note for problem in problems):
        problems += _check_opened(root, keys)
    return problems


def _check_meta(root: Path, info: DatasetInfo) -> tuple[Mapping[int, str], list[Problem]]:
    """The task table, and what is wrong with `meta/` except for the episodes."""
    problems = [*features(info), *absent_vectors(info)]
    used = {*info.numbers, *info.visual.values()}
    if unread := [f"{key} ({f['dtype']})" for key, f in info.features.items() if key not in used]:
        what = f"features that training does not read: {', '.join(unread)}"
        remedy = "join a vector to the state or action with --keys if it belongs there"
        problems.append(Problem(None, INFO_FILE, what, remedy, note=True))
    staged = len(list((root / STAGING).glob("*.json")))
    if staged:
        what = f"{staged} recorded episodes are not finalised"
        problems.append(Problem(None, STAGING, what, "run the recording again (it resumes)"))
    tasks: Mapping[int, str] = {}
    try:
        tasks = read_tasks(root)
        problems += task_table(info, tasks)
    except (DataError, KeyError) as error:
        problems.append(Problem(None, "meta/tasks.parquet", str(error).rstrip("."), RESTORE))
    try:
        problems += _check_stats_file(info, load_stats(root))
    except DataError as error:
        problems.append(Problem(None, STATS_FILE, str(error).rstrip("."), RECOMPUTE))
    return tasks, problems


def _check_stats_file(info: DatasetInfo, stats: Mapping[str, Stats]) -> Iterator[Problem]:
    keys = [key for key in (STATE, ACTION) if key in info.features and len(info.columns(key)) == 1]
    for key in (*(info.columns(key)[0] for key in keys), *map(info.source, info.cameras.values())):
        lacking = [name for name in MOMENTS if name not in stats.get(key, {})]
        if lacking:
            yield Problem(None, STATS_FILE, f"{key} lacks {lacking}", RECOMPUTE)
        elif not all(np.isfinite(stats[key][name]).all() for name in MOMENTS):
            yield Problem(None, STATS_FILE, f"{key} has statistics that are not finite", RECOMPUTE)


def _check_opened(root: Path, keys: Keys | None) -> Iterator[Problem]:
    """The statistics against the rows, and the decoded store, of a dataset that is sound otherwise."""
    try:
        dataset = Dataset.open(root, keys=keys)
        yield from _check_statistics(dataset)
        for number, place in verify_store(dataset):
            yield Problem(number, place, "rows do not match their checksum", DELETE_STORE)
    except DataError as error:
        yield Problem(None, "dataset", str(error).rstrip("."), RESTORE)


def _check_statistics(dataset: Dataset) -> Iterator[Problem]:
    stored = load_stats(dataset.root)
    for key, values in ((STATE, dataset.state), (ACTION, dataset.action)):
        names = dataset.info.columns(key)
        if key not in dataset.info.features or len(names) != 1:
            continue
        true = vector_stats(values)
        spread = true["max"] - true["min"]
        slack = OFF * spread + 1e-5 * np.maximum(1, np.abs(true["max"]))
        for name in MOMENTS:
            there = np.asarray(stored[names[0]][name], np.float64).reshape(-1)
            if there.shape != true[name].shape:
                what = f"{name} of {names[0]} has {there.size} numbers, the rows have {true[name].size}"
                yield Problem(None, STATS_FILE, what, RECOMPUTE)
                break
            off = np.abs(there - true[name]) > slack
            if off.any():
                at = int(np.flatnonzero(off)[0])
                what = (
                    f"{name} of {names[0]} does not belong to the rows in {int(off.sum())} dimensions: "
                    f"dimension {at} has {there[at]:.6g}, the rows have {true[name][at]:.6g}"
                )
                yield Problem(None, STATS_FILE, what, RECOMPUTE)


def _check_data_file(
    root: Path,
    info: DatasetInfo,
    tasks: Mapping[int, str],
    file: str,
    episodes: list[dict[str, Any]],
    *,
    decode: bool,
) -> Iterator[Problem]:
    numbers = [int(row["episode_index"]) for row in episodes]
    try:
        parquet = pq.ParquetFile(root / file)
        names = set(parquet.schema_arrow.names)
    except (OSError, pa.ArrowException) as error:
        for number in numbers:
            yield Problem(number, file, f"missing or truncated ({error})", RESTORE)
        return
    wanted = _Rows.columns(info)
    for key in (k for k in wanted if k not in names):
        for number in numbers:
            yield Problem(number, file, f"column {key} is missing", RESTORE)
    first = int(episodes[0]["dataset_from_index"])
    promised = int(episodes[-1]["dataset_to_index"]) - first
    if parquet.metadata.num_rows != promised:
        what = f"{parquet.metadata.num_rows} rows, the episode table says {promised}"
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
                yield from _Rows(info, tasks, file, row, low, part).check(decode)
        begin = stop


@dataclass(frozen=True)
class _Rows:
    """Consecutive rows of one episode in one data file; `start` is the absolute index of the first."""

    info: DatasetInfo
    tasks: Mapping[int, str]
    file: str
    row: dict[str, Any]
    start: int
    table: pa.Table

    @staticmethod
    def columns(info: DatasetInfo) -> dict[str, str]:
        """Columns, by their names in the files, that this package reads -> its own names for them."""
        images = [key for key in info.visual.values() if not info.is_video(key)]
        return {name: key for key in (*info.numbers, *images) for name in info.columns(key)}

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
        keys, counted = self.columns(self.info), {}
        for name in self.table.column_names:
            key = keys[name]
            if self.info.features[key]["dtype"] == "image":
                yield from self._images(key, name, decode)
                continue
            alone = len(self.info.columns(key)) == 1
            try:
                values = to_numpy(self.table[name], self.info.features[key]["shape"] if alone else None)
            except (DataError, ValueError, pa.ArrowException) as error:
                yield self.problem(name, f"wrong shape ({error})", RERECORD)
                continue
            if key in BOOKKEEPING:
                counted[key] = values
            elif values.dtype.kind == "f" and not np.isfinite(values).all():
                bad = self.frames[~np.isfinite(values.reshape(len(values), -1)).all(1)]
                what = f"NaN or infinite in {len(bad)} frames, first frame {bad[0]}"
                yield self.problem(name, what, RERECORD)
        yield from bookkeeping(self.info, self.tasks, self.row, self.start, counted, file=self.file)

    def _images(self, key: str, name: str, decode: bool) -> Iterator[Problem]:
        depth = key in self.info.depths.values()
        shape = tuple(self.info.features[key]["shape"])
        size = _size(self.info, key)
        bad: list[str] = []
        for i, frame in enumerate(self.frames):
            try:
                data = image_bytes(self.table[name], i)
                if decode:
                    found = decode_depth(data).shape if depth else decode_colour(data).shape
                    if size is not None and found[:2] != size:
                        bad.append(f"frame {frame}: shape {found}, info.json says {shape}")
            except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three on damaged files
                bad.append(f"frame {frame}: unreadable ({error})")
        if bad:
            yield self.problem(name, f"{len(bad)} bad images, first {bad[0]}", RERECORD)


def _size(info: DatasetInfo, key: str) -> tuple[int, int] | None:
    """(height, width) of a camera's frames; None where the feature does not say, which is reported above."""
    try:
        return image_size(key, info.features[key])
    except DataError:
        return None


def _check_video(
    root: Path, info: DatasetInfo, key: str, file: str, row: dict[str, Any], *, decode: bool
) -> Iterator[Problem]:
    """Decode the frames of one episode, or the first and the last one."""
    number, start = int(row["episode_index"]), row[f"videos/{info.source(key)}/from_timestamp"]
    if key in info.depths.values():
        return  # `Dataset.depth` refuses it
    size = _size(info, key)
    try:
        reader = VideoReader(root / file, info.fps)
        try:
            for frame in range(row["length"]) if decode else (0, row["length"] - 1):
                found = reader.frame(start + frame / info.fps).shape
                if size is not None and found[:2] != size:
                    what = f"frame {frame} is {found}, info.json says {info.features[key]['shape']}"
                    yield Problem(number, file, what, RERECORD)
                    return
        finally:
            reader.close()
    except (DataError, OSError) as error:
        yield Problem(number, file, str(error).rstrip("."), RESTORE)
