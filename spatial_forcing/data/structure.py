"""What a dataset's tables and video files must agree on, and what is wrong where they do not.

`Dataset.open` refuses what is found here and `check` lists it, so that both give the same answer. Nothing is
decoded here but one frame a camera.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.data.info import ACTION, BOOKKEEPING, INFO_FILE, STATE, DatasetInfo
from spatial_forcing.data.problems import RERECORD, RESTORE, Problem
from spatial_forcing.data.video import VideoFacts, video_facts
from spatial_forcing.errors import DataError

TOLERANCE = 1e-4
"""Seconds that a timestamp may be off (LeRobot's `tolerance_s`)."""
HALF = 0.5
"""Frames by which two times may differ and still mean the same frame."""
VIDEO_COLUMNS = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
"""Columns of `meta/episodes` that say where an episode's frames of a video feature are."""

Row = Mapping[str, Any]


def inside(root: Path, relative: str) -> Path:
    """`root / relative`, which must lie in `root` once links are followed.

    In a snapshot of the Hugging Face hub's cache files are links to `blobs` beside the snapshots; these are
    the dataset's own.

    Raises:
        DataError: it lies elsewhere.
    """
    path = root / relative
    home, target = root.resolve(), path.resolve()
    own = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not target.is_relative_to(home) and not target.is_relative_to(own):
        raise DataError(
            f"{root}: {relative} leads to {target}, outside the dataset. A dataset's files must lie in its "
            "folder: copy them there, or correct data_path and video_path in meta/info.json"
        )
    return path


def file_paths(root: Path, info: DatasetInfo, rows: Sequence[Row]) -> Iterator[Problem]:
    """Data and video files outside the dataset, and rows that name none."""
    seen: set[str] = set()
    for row in rows:
        number = int(row["episode_index"])
        for key, relative in _files(info, row).items():
            if relative is None:
                yield Problem(number, "meta/episodes", f"no video of {key} is named", RESTORE)
                continue
            if relative not in seen:
                seen.add(relative)
                try:
                    inside(root, relative)
                except DataError as error:
                    yield Problem(number, relative, str(error), "keep every file in the dataset's folder")


def names_video(info: DatasetInfo, key: str, row: Row) -> bool:
    """Whether an episode's row says where its frames of the video feature `key` are."""
    return all(row.get(f"videos/{info.source(key)}/{name}") is not None for name in VIDEO_COLUMNS)


def _files(info: DatasetInfo, row: Row) -> dict[str, str | None]:
    data = info.data_file(row["data/chunk_index"], row["data/file_index"])
    videos = {k: info.episode_video(k, row) if names_video(info, k, row) else None for k in info.videos}
    return {"data": data, **videos}


def features(info: DatasetInfo) -> Iterator[Problem]:
    """Cameras whose shape is ambiguous, missing bookkeeping, and features that training does not read."""
    if not info.cameras:
        yield Problem(None, INFO_FILE, "no camera among the features", "record with a camera")
    missing = [key for key in BOOKKEEPING if key not in info.features]
    if missing:
        yield Problem(None, INFO_FILE, f"features lack {missing}", RESTORE)
    for key in (STATE, ACTION):
        if key in info.features and not np.issubdtype(_dtype(info.features[key]["dtype"]), np.number):
            what = f"{key} is of dtype {info.features[key]['dtype']!r}, not numbers"
            yield Problem(None, INFO_FILE, what, "map the right feature with --keys")
    for name in info.cameras:
        try:
            info.frame_size(name)
        except DataError as error:
            yield Problem(None, INFO_FILE, str(error).rstrip("."), "correct shape and names of the feature")


def _dtype(name: str) -> Any:
    try:
        return np.dtype(name)
    except TypeError:
        return np.dtype(object)


def absent_vectors(info: DatasetInfo) -> Iterator[Problem]:
    """`action` or `observation.state` are missing; the remedy names the features that could be them."""
    for key in (STATE, ACTION):
        if key not in info.features:
            guess = info.guess(key)
            remedy = (
                f"if it is {guess!r} here, give --keys {key}={guess}"
                if guess
                else f"name the feature with --keys {key}=NAME (its vectors: {', '.join(info.vectors)})"
            )
            yield Problem(None, INFO_FILE, f"there is no {key!r}", remedy)


def episode_table(info: DatasetInfo, rows: Sequence[Row]) -> Iterator[Problem]:
    """Numbers with gaps, frame ranges that do not follow each other, totals that disagree."""
    place = "meta/episodes"
    numbers = [int(row["episode_index"]) for row in rows]
    lacking = sorted(set(range(max(numbers, default=-1) + 1)) - set(numbers))
    if lacking:
        listed = ", ".join(map(str, lacking[:5])) + (", ..." if len(lacking) > 5 else "")
        remedy = "restore the episode, or renumber the others (lerobot-edit-dataset does both)"
        yield Problem(None, place, f"episode numbers have a gap ({listed})", remedy)
        return
    if twice := sorted({n for n in numbers if numbers.count(n) > 1} if len(set(numbers)) < len(rows) else ()):
        yield Problem(None, place, f"episodes {twice[:5]} are listed twice", RESTORE)
        return
    if len(rows) != info.total_episodes:
        what = f"{len(rows)} episodes, info.json says {info.total_episodes}"
        yield Problem(None, place, what, RESTORE)
    start = 0
    for row in rows:
        first, last, length = (row[k] for k in ("dataset_from_index", "dataset_to_index", "length"))
        if first != start or last - first != length or length < 1:
            what = f"frames {first} to {last} with length {length}; expected to begin at {start}"
            yield Problem(int(row["episode_index"]), place, what, RESTORE)
        start = last
    if start != info.total_frames:
        what = f"episodes end at frame {start}, info.json says {info.total_frames}"
        yield Problem(None, place, what, RESTORE)


def task_table(info: DatasetInfo, tasks: Mapping[int, str]) -> Iterator[Problem]:
    """Fewer tasks than info.json says; an interrupted recording may have left more."""
    if len(tasks) < info.total_tasks:
        what = f"{len(tasks)} tasks, info.json says {info.total_tasks}"
        yield Problem(None, "meta/tasks.parquet", what, RESTORE)


def bookkeeping(
    info: DatasetInfo,
    tasks: Mapping[int, str],
    row: Row,
    start: int,
    columns: Mapping[str, NDArray[Any]],
    *,
    file: str,
) -> Iterator[Problem]:
    """Consecutive rows of one episode: indices, timestamps, tasks.

    Args:
        info: of the dataset.
        tasks: instructions by `task_index`.
        row: the episode's row of `meta/episodes`.
        start: absolute index of the first of the rows.
        columns: (n,) numbers of the columns in `BOOKKEEPING` (those that are there).
        file: where they are from, for messages.
    """
    number, origin = int(row["episode_index"]), int(row["dataset_from_index"])
    count = len(next(iter(columns.values()), ()))
    frames = np.arange(count) + start - origin
    expected = {
        "index": frames + origin,
        "frame_index": frames,
        "episode_index": np.full(count, number),
    }
    for key, wanted in expected.items():
        if key in columns and not np.array_equal(columns[key], wanted):
            at = int(np.flatnonzero(columns[key] != wanted)[0])
            what = f"frame {frames[at]} holds {columns[key][at]}, expected {wanted[at]} (a gap)"
            yield Problem(number, f"{file} {key}", what, RESTORE)
    if "task_index" in columns:
        unknown = ~np.isin(columns["task_index"], list(tasks))
        if unknown.any():
            at = int(np.flatnonzero(unknown)[0])
            what = f"frame {frames[at]}: task index {columns['task_index'][at]} has no task"
            yield Problem(number, f"{file} task_index", what, RESTORE)
    if "timestamp" in columns:
        yield from _timestamps(info, number, frames, columns["timestamp"], f"{file} timestamp")


def _timestamps(
    info: DatasetInfo, number: int, frames: NDArray[Any], time: NDArray[Any], place: str
) -> Iterator[Problem]:
    steps = np.diff(time.astype(np.float64))
    if not np.isfinite(time).all() or not (steps > 0).all():
        bad = np.flatnonzero(~np.isfinite(time))
        at = int(bad[0]) if len(bad) else int(np.flatnonzero(~(steps > 0))[0]) + 1
        yield Problem(number, place, f"not increasing at frame {frames[at]}", RERECORD)
        return
    off = np.abs(time.astype(np.float64) - frames / info.fps)
    # A float32 cannot say the time of a long episode more exactly than this.
    allowed = np.maximum(TOLERANCE, 2 * np.spacing(np.abs(time).astype(np.float32)))
    if (off > allowed).any():
        at = int(np.flatnonzero(off > allowed)[0])
        what = (
            f"frame {frames[at]} is at {time[at]:.6g} s, {frames[at]} frames at {info.fps} fps take "
            f"{frames[at] / info.fps:.6g} s ({int((off > allowed).sum())} frames are off)"
        )
        if info.videos:
            # LeRobot seeks the timestamp, this package the frame number: they would read two pictures.
            yield Problem(number, place, what, "a video frame cannot be told from it: record it again")
        else:
            yield Problem(number, place, what, "images are read by row, whatever the time says", note=True)


def video_spans(
    root: Path, info: DatasetInfo, rows: Sequence[Row], facts: dict[str, VideoFacts | DataError]
) -> Iterator[Problem]:
    """Spans of the episodes in their video files: each as long as its rows, one after the other, in the file.

    Args:
        root, info, rows: of the dataset.
        facts: what is known of files already; completed here.
    """
    for key in info.videos:
        files: dict[str, list[Row]] = {}
        for row in rows:
            if names_video(info, key, row):
                files.setdefault(info.episode_video(key, row), []).append(row)
        for file, inside_file in files.items():
            if file not in facts:
                try:
                    facts[file] = video_facts(root / file)
                except DataError as error:
                    facts[file] = error
            found = facts[file]
            if isinstance(found, DataError):
                for row in inside_file:
                    yield Problem(int(row["episode_index"]), file, str(found).rstrip("."), RESTORE)
            else:
                yield from _spans(info, f"videos/{info.source(key)}/", file, inside_file, found)


def _spans(
    info: DatasetInfo, prefix: str, file: str, rows: Sequence[Row], found: VideoFacts
) -> Iterator[Problem]:
    """Times are compared in frames."""
    remedy = "correct the span in meta/episodes, or restore the video"
    end = 0.0
    for row in sorted(rows, key=lambda row: float(row[prefix + "from_timestamp"])):
        number, length = int(row["episode_index"]), int(row["length"])
        start, stop = (float(row[f"{prefix}{side}_timestamp"]) * info.fps for side in ("from", "to"))
        if stop - start < length - HALF:
            what = f"{stop - start:.4g} frames of video for {length} rows at {info.fps} fps"
            yield Problem(number, file, what, remedy)
        elif stop - start > length + HALF:
            what = f"{stop - start:.4g} frames of video for {length} rows at {info.fps} fps"
            yield Problem(number, file, what, "the frames after the last row are not read", note=True)
        if abs(start - end) > HALF:
            kind = "overlap" if start < end else "leave a gap of"
            what = f"its span begins at frame {start:.4g}, the one before it ends at {end:.4g}: they {kind}"
            what += (
                "" if start < end else f" {start - end:.4g} frames, so pictures may be those of other rows"
            )
            yield Problem(number, file, what, remedy)
        if start + length > found.seconds * info.fps + HALF:
            what = f"its rows end at frame {start + length:.4g}, the file at {found.seconds * info.fps:.4g}"
            yield Problem(number, file, what, RESTORE)
        end = stop
    total = sum(int(row["length"]) for row in rows)
    if total > found.frames:
        numbers = sorted(int(row["episode_index"]) for row in rows)
        what = f"{found.frames} frames for {total} rows of episodes {numbers[0]} to {numbers[-1]}"
        yield Problem(numbers[-1], file, what, RESTORE)
    elif end < found.seconds * info.fps - HALF:
        what = f"{found.seconds * info.fps - end:.4g} frames of video after the last episode's span"
        yield Problem(None, file, what, "they are not read", note=True)
