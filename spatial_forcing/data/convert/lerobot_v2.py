"""LeRobot v2.0 and v2.1 datasets: one parquet file and one video a camera for each episode.

Rows and videos are taken over as they are: packets are copied where the codec allows it, else frames are read
and encoded again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from spatial_forcing.data.convert import Schema, SourceEpisode
from spatial_forcing.data.episode import EncodedEpisode
from spatial_forcing.data.images import decode_colour, decode_depth
from spatial_forcing.data.info import (
    BOOKKEEPING,
    DEPTH_UNITS_PER_METRE,
    INFO_FILE,
    Feature,
    image_size,
    is_depth,
)
from spatial_forcing.data.stats import Stats, image_stats, sampled_indices, thumbnail, vector_stats
from spatial_forcing.data.structure import TOLERANCE, inside
from spatial_forcing.data.tables import image_bytes, read_table, to_numpy
from spatial_forcing.data.video import VideoEncoder, VideoReader, first_frames
from spatial_forcing.errors import DataError

VERSIONS = ("v2.0", "v2.1")
TASKS, EPISODES = "meta/tasks.jsonl", "meta/episodes.jsonl"
NUMBERS = {"float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"}
"""Dtypes that a column of this package can have."""


@dataclass(frozen=True)
class LeRobotV2Converter:
    """What is converted.

    Attributes:
        source: folder of the dataset, with `meta/`, `data/` and `videos/`.
        output: folder of the new dataset.
    """

    source: Path
    output: Path

    @property
    def video(self) -> bool:
        """Each camera stays as it is."""
        return any(feature["dtype"] == "video" for feature in self._features.values())

    def schema(self) -> Schema:
        """The features of the source but those that have no fixed number of numbers."""
        info = self._info
        kept = {key: feature for key, feature in self._features.items() if _kept(feature)}
        bookkeeping = {key: {"dtype": d, "shape": [1], "names": None} for key, d in BOOKKEEPING.items()}
        sizes = {key: image_size(key, f) for key, f in kept.items() if f["dtype"] in ("image", "video")}
        return Schema(
            int(info["fps"]),
            sizes,
            (),
            (),
            str(info.get("robot_type") or "unknown"),
            features={**{k: f for k, f in kept.items() if k not in BOOKKEEPING}, **bookkeeping},
            unused={f"{k} ({f['dtype']})": "" for k, f in self._features.items() if k not in kept},
        )

    def episodes(self) -> Sequence[SourceEpisode]:
        """The episodes of `meta/episodes.jsonl`, in order."""
        rows = sorted(_json_lines(self.source / EPISODES, ("episode_index", "length")), key=_number)
        if not rows:
            raise DataError(f"{self.source / EPISODES} lists no episode.")
        return [
            SourceEpisode(
                f"episode {row['episode_index']}",
                int(row["length"]),
                encoded=partial(self._encoded, int(row["episode_index"]), int(row["length"])),
            )
            for row in rows
        ]

    @cached_property
    def _info(self) -> dict[str, Any]:
        path = self.source / INFO_FILE
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
            version = info["codebase_version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read ({error!r}); give a LeRobot dataset's folder.") from error
        if version not in VERSIONS:
            raise DataError(f"{path}: codebase_version is {version!r}; this converter reads {VERSIONS}.")
        lacking = [key for key in ("fps", "features", "data_path") if key not in info]
        if lacking or not isinstance(info["features"], dict):
            raise DataError(f"{path} lacks {lacking or 'features'}; restore it from where you got it.")
        found: dict[str, Any] = info
        return found

    @property
    def _features(self) -> dict[str, Feature]:
        features: dict[str, Feature] = self._info["features"]
        for key, feature in features.items():
            if not isinstance(feature, dict) or not {"dtype", "shape"} <= set(feature):
                raise DataError(f"{self.source / INFO_FILE}: feature {key!r} is {feature!r}.")
        return features

    @cached_property
    def _tasks(self) -> dict[int, str]:
        rows = _json_lines(self.source / TASKS, ("task_index", "task"))
        return {int(row["task_index"]): str(row["task"]) for row in rows}

    def _file(self, template: str, number: int, key: str = "") -> Path:
        info = self._info
        values = {
            "episode_chunk": number // int(info.get("chunks_size", 1000)),
            "episode_index": number,
            "video_key": key,
        }
        try:
            return inside(self.source, str(info[template]).format(**values))
        except (KeyError, IndexError, ValueError) as error:
            raise DataError(f"{template} of {INFO_FILE} cannot be filled in ({error!r})") from error

    def _encoded(self, number: int, length: int) -> EncodedEpisode:
        """Raises `DataError` where rows, tasks, timestamps or videos do not fit together."""
        path = self._file("data_path", number)
        table = read_table(path)
        if table.num_rows != length:
            raise DataError(f"{path.name} has {table.num_rows} rows, {EPISODES} says {length}")
        kept = {key: feature for key, feature in self._features.items() if _kept(feature)}
        columns: dict[str, Any] = {}
        stats: dict[str, Stats] = {}
        videos: dict[str, bytes] = {}
        for key, feature in kept.items():
            if key in BOOKKEEPING:
                continue
            if feature["dtype"] == "video":
                videos[key], stats[key] = self._video(key, feature, number, length)
                continue
            if key not in table.column_names:
                raise DataError(f"{path.name} has no column {key!r}")
            if feature["dtype"] == "image":
                columns[key] = [image_bytes(table[key], row) for row in range(length)]
                stats[key] = _image_statistics(columns[key], feature)
            else:
                columns[key] = _numbers(table[key], feature, f"{path.name}, {key}")
                stats[key] = vector_stats(columns[key])
        columns["timestamp"] = self._timestamps(table, path.name, bool(videos))
        return EncodedEpisode(self._instructions(table, path.name), columns, videos, stats)

    def _timestamps(self, table: pa.Table, name: str, video: bool) -> Any:
        if "timestamp" not in table.column_names:
            raise DataError(f"{name} has no column 'timestamp'")
        time = _numbers(table["timestamp"], {"dtype": "float32", "shape": [1]}, f"{name}, timestamp")
        off = np.abs(time.astype(np.float64) - np.arange(len(time)) / int(self._info["fps"]))
        if video and (off > TOLERANCE).any():
            at = int(np.flatnonzero(off > TOLERANCE)[0])
            raise DataError(
                f"{name}: row {at} is at {time[at]:.6g} s, not at {at / int(self._info['fps']):.6g} s, so "
                "its video frame cannot be told"
            )
        return time

    def _instructions(self, table: pa.Table, name: str) -> list[str]:
        if "task_index" not in table.column_names:
            raise DataError(f"{name} has no column 'task_index'")
        numbers = to_numpy(table["task_index"], (1,)).tolist()
        if unknown := sorted(set(numbers) - set(self._tasks)):
            raise DataError(f"{name}: task index {unknown[0]} is not in {TASKS}")
        return [self._tasks[number] for number in numbers]

    def _video(self, key: str, feature: Feature, number: int, length: int) -> tuple[bytes, Stats]:
        path, fps = self._file("video_path", number, key), int(self._info["fps"])
        size = image_size(key, feature)
        sampled = sampled_indices(length)
        images = []
        copied = first_frames(path, length, fps)
        if copied is None and (size[0] % 2 or size[1] % 2):
            raise DataError(f"{path.name} must be encoded again, which needs even sides, not {size}")
        encoder = VideoEncoder(*size, fps) if copied is None else None
        reader = VideoReader(path, fps)
        try:
            for i in sampled if encoder is None else range(length):
                pixels = reader.frame(i / fps)
                if pixels.shape[:2] != size:
                    raise DataError(f"{path.name}: frame {i} is {pixels.shape[:2]}, {INFO_FILE} says {size}")
                if encoder is not None:
                    encoder.add(pixels)
                if i in sampled:
                    images.append(thumbnail(pixels).copy())
        finally:
            reader.close()
        content = copied if encoder is None else encoder.finish()
        assert content is not None
        return content, image_stats(images)


def _kept(feature: Feature) -> bool:
    """Whether this package's writer can hold the feature: images, videos, and numbers of one shape."""
    if feature["dtype"] in ("image", "video"):
        return True
    shape = feature["shape"]
    fixed = isinstance(shape, (list, tuple)) and shape and all(isinstance(n, int) and n > 0 for n in shape)
    return feature["dtype"] in NUMBERS and bool(fixed)


def _numbers(column: pa.ChunkedArray, feature: Feature, place: str) -> Any:
    try:
        return to_numpy(column, feature["shape"]).astype(feature["dtype"])
    except (DataError, ValueError, TypeError, pa.ArrowException) as error:
        raise DataError(f"{place}: {error}") from error


def _image_statistics(encoded: Sequence[bytes], feature: Feature) -> Stats:
    depth = is_depth(feature)
    images = []
    for i in sampled_indices(len(encoded)):
        try:
            if depth:
                pixels: Any = np.rint(decode_depth(encoded[i]) * DEPTH_UNITS_PER_METRE)[..., None]
            else:
                pixels = decode_colour(encoded[i])
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"frame {i} is not an image ({error})") from error
        images.append(thumbnail(pixels).copy())
    return image_stats(images, depth=depth)


def _json_lines(path: Path, keys: Sequence[str]) -> list[Mapping[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); restore it from where you got it.") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not set(keys) <= set(row):
            raise DataError(f"{path}, line {number}: expected {', '.join(keys)}, found {row!r}.")
    return rows


def _number(row: Mapping[str, Any]) -> int:
    return int(row["episode_index"])
