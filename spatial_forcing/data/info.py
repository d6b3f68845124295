"""What a LeRobot v3.0 dataset says about itself: `meta/info.json`, feature names and file paths.

Layout: https://huggingface.co/docs/lerobot/lerobot-dataset-v3. Cameras are named by what follows
`observation.images.`; a depth map is the feature `observation.images.<camera>_depth`, 16-bit PNG in
millimetres, marked `is_depth_map`; extrinsics are `observation.camera.<camera>.extrinsic`, (4, 4) float32
world from camera with OpenCV axes; intrinsics (3, 3), in pixels, lie in the image feature's `info`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.alignment import IMAGE_PREFIX
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.storage import write_json

VERSION = "v3.0"
STATE = "observation.state"
ACTION = "action"
DEPTH_SUFFIX = "_depth"
DEPTH_UNITS_PER_METRE = 1000.0

INFO_FILE = "meta/info.json"
STATS_FILE = "meta/stats.json"
TASKS_FILE = "meta/tasks.parquet"
CHUNK_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
EPISODES_FILE = "meta/episodes/" + CHUNK_FILE + ".parquet"
DATA_FILE = "data/" + CHUNK_FILE + ".parquet"
VIDEO_FILE = "videos/{video_key}/" + CHUNK_FILE + ".mp4"

BOOKKEEPING: dict[str, str] = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
"""Columns that every dataset has besides its own features, with their dtypes."""

Feature = dict[str, Any]

Keys = Mapping[str, str]
"""Names of this package -> names of a dataset: {"action": "actions"}; vectors are joined in the order given:
{"observation.state": "state.arm+state.gripper"}."""
JOIN = "+"
KEYS_FORM = "NAME=FEATURE, or NAME=FEATURE+FEATURE to join vectors, e.g. action=actions"
CHANNELS = (1, 3, 4)
"""Grey, RGB, RGBA; every camera is read as RGB."""


@dataclass(frozen=True)
class DatasetInfo:
    """The content of `meta/info.json`; unknown keys of other writers are ignored, as LeRobot does.

    Attributes:
        fps: frames per second.
        features: LeRobot's feature dictionary: name -> {"dtype", "shape", "names", "info"}.
        total_episodes, total_frames, total_tasks: what is committed; an unfinished recording has fewer.
    """

    fps: int
    features: dict[str, Feature]
    codebase_version: str = VERSION
    total_episodes: int = 0
    total_frames: int = 0
    total_tasks: int = 0
    chunks_size: int = 1000
    data_files_size_in_mb: int = 100
    video_files_size_in_mb: int = 200
    data_path: str = DATA_FILE
    video_path: str | None = None
    robot_type: str | None = None
    splits: dict[str, str] = field(default_factory=dict)
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Features that go by another name in the files (see `Keys`); not part of `meta/info.json`."""

    @property
    def visual(self) -> dict[str, str]:
        """Every image, video and depth feature: short name -> key."""
        return {_short(k): k for k, f in self.features.items() if f["dtype"] in ("image", "video")}

    @property
    def cameras(self) -> dict[str, str]:
        """Colour cameras: name -> feature key, in the order of `info.json`."""
        return {name: key for name, key in self.visual.items() if not is_depth(self.features[key])}

    @property
    def depths(self) -> dict[str, str]:
        """Cameras with a depth map: name -> feature key."""
        maps = {name: key for name, key in self.visual.items() if is_depth(self.features[key])}
        return {name.removesuffix(DEPTH_SUFFIX): key for name, key in maps.items()}

    @property
    def videos(self) -> tuple[str, ...]:
        """Features that lie in mp4 files."""
        return tuple(key for key in self.features if self.is_video(key))

    @property
    def vectors(self) -> dict[str, tuple[int, ...]]:
        """Numeric features that are neither images nor bookkeeping: key -> shape."""
        skip = {"image", "video", "string", "language"}
        return {
            k: tuple(f["shape"])
            for k, f in self.features.items()
            if f["dtype"] not in skip and k not in BOOKKEEPING
        }

    def camera_key(self, camera: str) -> str:
        """The feature key of `camera`. Raises `DataError` naming the cameras there are."""
        if camera not in self.cameras:
            close = difflib.get_close_matches(camera, self.cameras, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise DataError(
                f"camera {camera!r} is not in this dataset; it has {sorted(self.cameras)}.{hint} "
                "Ask for one of these or record the missing camera."
            )
        return self.cameras[camera]

    def is_video(self, key: str) -> bool:
        """Whether `key` lives in mp4 files instead of the parquet table."""
        return bool(self.features[key]["dtype"] == "video")

    def frame_size(self, camera: str) -> tuple[int, int]:
        """(height, width) of `camera`'s stored frames in pixels.

        Raises:
            DataError: an unknown camera, or a shape whose channel axis cannot be told.
        """
        key = self.camera_key(camera)
        return image_size(key, self.features[key])

    def data_file(self, chunk: int, file: int) -> str:
        """Path of a data file relative to the dataset's root."""
        return self.data_path.format(chunk_index=chunk, file_index=file)

    def video_file(self, key: str, chunk: int, file: int) -> str:
        """Path of a video file relative to the dataset's root."""
        template = self.video_path or VIDEO_FILE
        return template.format(video_key=key, chunk_index=chunk, file_index=file)

    def episode_video(self, key: str, row: Mapping[str, Any]) -> str:
        """Path, relative to the root, of the file that holds an episode's frames of `key`."""
        name = self.source(key)
        return self.video_file(name, row[f"videos/{name}/chunk_index"], row[f"videos/{name}/file_index"])

    def split(self, name: str) -> range:
        """Numbers of the episodes of a part. Raises `ConfigError` naming the parts there are."""
        splits = self.splits or {"train": f"0:{self.total_episodes}"}
        try:
            start, stop = splits[name].split(":")
            return range(int(start), int(stop))
        except (KeyError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"split {name!r} is not a range of episodes of this dataset; meta/info.json has {splits}."
            ) from error

    def source(self, key: str) -> str:
        """The name of the image feature `key` in the files."""
        return self.sources.get(key, (key,))[0]

    def columns(self, key: str) -> tuple[str, ...]:
        """The names, in the files, of the columns that `key` consists of."""
        return self.sources.get(key, (key,))

    @property
    def numbers(self) -> tuple[str, ...]:
        """The numeric features that this package reads, as far as they are there; others are left alone."""
        wanted = (STATE, ACTION, *map(extrinsic_key, self.cameras), *BOOKKEEPING)
        return tuple(key for key in wanted if key in self.features)

    def guess(self, key: str) -> str | None:
        """The vector feature that probably is `key`: the one whose name begins or ends like it."""
        word = key.rpartition(".")[2]
        found = [
            name
            for name, shape in self.vectors.items()
            if any(part.startswith(word) for part in re.split(r"[./]", name)) and int(np.prod(shape)) > 1
        ]
        return min(found, key=len) if found else None

    def renamed(self, keys: Keys, place: object) -> DatasetInfo:
        """The same dataset under this package's names.

        Args:
            keys: see `Keys`.
            place: for messages.

        Raises:
            ConfigError: a source that the dataset lacks (did you mean), or images that are joined.
        """
        sources: dict[str, tuple[str, ...]] = {}
        mapped: dict[str, Feature] = {}
        for key, text in keys.items():
            names = tuple(part.strip() for part in text.split(JOIN))
            for name in names:
                if name not in self.features:
                    close = difflib.get_close_matches(name, self.features, n=1)
                    hint = f" Did you mean {close[0]!r}?" if close else ""
                    there = ", ".join(sorted(set(self.features) - set(BOOKKEEPING)))
                    raise ConfigError(f"keys: {place} has no feature {name!r}.{hint} It has {there}.")
            parts = [self.features[name] for name in names]
            if len(parts) > 1 and any(part["dtype"] in ("image", "video") for part in parts):
                raise ConfigError(f"keys: {key}={text}: images cannot be joined; map one feature to it.")
            sources[key] = names
            mapped[key] = parts[0] if len(parts) == 1 else _joined(names, parts)
        used = {name for names in sources.values() for name in names}
        # In the order of info.json, which is the cameras' order.
        at = {names[0]: key for key, names in reversed(sources.items())}
        features: dict[str, Feature] = {}
        for name, feature in self.features.items():
            if name in at:
                features[at[name]] = mapped[at[name]]
            if name not in used and name not in mapped:
                features[name] = feature
        return replace(self, features={**features, **mapped}, sources=sources)

    def save(self, root: Path) -> None:
        """Write `meta/info.json` atomically."""
        content = asdict(self)
        del content["sources"]
        splits = self.splits if len(self.splits) > 1 else {"train": f"0:{self.total_episodes}"}
        write_json(root / INFO_FILE, {**content, "splits": splits})

    @classmethod
    def load(cls, root: str | Path, keys: Keys | None = None) -> DatasetInfo:
        """Read `meta/info.json`, under this package's names where `keys` says so.

        Raises:
            DataError: no dataset there, unreadable JSON, a version other than v3.0, a missing field, a
                feature without dtype or shape, a path template that cannot be used.
            ConfigError: see `renamed`.
        """
        path = Path(root) / INFO_FILE
        if not path.is_file():
            raise DataError(
                f"{root} is not a LeRobot dataset: {path} does not exist. "
                "Give the folder that holds `meta/` and `data/`, or record one with "
                "`spatial-forcing data record`."
            )
        try:
            raw = json.loads(path.read_text())
        except ValueError as error:
            raise DataError(
                f"{path} is not valid JSON ({error}); restore it from where you got it."
            ) from error
        check_version(str(raw.get("codebase_version")), path)
        missing = [name for name in ("fps", "features") if name not in raw]
        if missing:
            raise DataError(f"{path} lacks {missing}; restore the file or record the dataset again.")
        known = set(cls.__dataclass_fields__) - {"sources"}
        info = cls(**{key: value for key, value in raw.items() if key in known})
        info._check(path)
        return info.renamed(keys, root) if keys else info

    def _check(self, path: Path) -> None:
        for name, feature in self.features.items():
            if "/" in name or "\\" in name:
                raise DataError(f"{path}: feature {name!r} has a slash in its name, which files cannot have.")
            if not isinstance(feature, dict) or not {"dtype", "shape"} <= set(feature):
                raise DataError(f"{path}: feature {name!r} is {feature!r}; expected its dtype and shape.")
        visual = [key for key, feature in self.features.items() if feature["dtype"] in ("image", "video")]
        if len(self.visual) != len(visual):
            twice = sorted(key for key in visual if self.visual[_short(key)] != key)
            raise DataError(
                f"{path}: two image features have one camera's name: {twice}; rename one of them."
            )
        for name, template in (("data_path", self.data_path), ("video_path", self.video_path or VIDEO_FILE)):
            try:
                template.format(video_key="key", chunk_index=0, file_index=0)
            except (KeyError, IndexError, ValueError, AttributeError) as error:
                raise DataError(
                    f"{path}: {name} is {template!r}, which cannot be filled in ({error!r}); v3.0 has "
                    "{chunk_index} and {file_index} (and {video_key}) there."
                ) from error


def parse_keys(words: Sequence[str]) -> dict[str, str]:
    """`Keys` from the words of a command line or a configuration, `NAME=FEATURE` each.

    Raises:
        ConfigError: a word of another form, or a name twice.
    """
    keys: dict[str, str] = {}
    for word in words:
        name, equals, source = word.partition("=")
        if not (name and equals and source) or name in keys:
            raise ConfigError(f"keys: {word!r} is wrong or a name twice; expected {KEYS_FORM}.")
        keys[name] = source
    return keys


def check_version(version: str, place: object) -> None:
    """Raise `DataError` unless `version` is v3.0; the message says how to convert."""
    if version == VERSION:
        return
    remedy = (
        "Convert it: `spatial-forcing data convert lerobot-v2 --source FOLDER --output FOLDER`."
        if version.startswith("v2")
        else "Update this package, or export the dataset as v3.0."
    )
    raise DataError(f"{place}: codebase_version is {version!r}; this package reads {VERSION!r}. {remedy}")


def make_features(
    cameras: Mapping[str, tuple[int, int]],
    state_dim: int,
    action_dim: int,
    *,
    state_names: Sequence[str] | None = None,
    action_names: Sequence[str] | None = None,
    video: bool = False,
    depth: bool = False,
    extrinsics: bool = False,
    intrinsics: Mapping[str, NDArray[np.floating[Any]]] | None = None,
) -> dict[str, Feature]:
    """LeRobot's feature dictionary for colour (and depth) cameras, a state and an action.

    Args:
        cameras: camera -> (height, width) in pixels.
        state_dim, action_dim: lengths of `observation.state` and `action`.
        state_names, action_names: a name for each entry; default `state_0`, ...
        video: colour in mp4 instead of PNG inside the parquet files; depth is always PNG.
        depth: add a 16-bit depth map for each camera.
        extrinsics: add a (4, 4) world-from-camera pose a frame for each camera.
        intrinsics: camera -> (3, 3) matrix in pixels.

    Raises:
        ConfigError: no camera, odd sizes for video, a camera name that collides with a depth map, a wrong
            number of names.
    """
    if not cameras:
        raise ConfigError("a dataset needs at least one camera; give `cameras={name: (height, width)}`.")
    for name in cameras:
        if name.endswith(DEPTH_SUFFIX) or "/" in name or not name:
            raise ConfigError(
                f"camera name {name!r} is not usable; it must not be empty, hold '/' or end in '_depth'."
            )
    odd = {name: size for name, size in cameras.items() if size[0] % 2 or size[1] % 2}
    if video and odd:
        raise ConfigError(f"video needs even heights and widths, not {odd}; resize or store images.")
    unknown = sorted(set(intrinsics or {}) - set(cameras))
    if unknown:
        raise ConfigError(f"intrinsics for unknown cameras {unknown}; cameras are {sorted(cameras)}.")
    features: dict[str, Feature] = {}
    for name, size in cameras.items():
        features[IMAGE_PREFIX + name] = _image_feature(size, "video" if video else "image", 3)
        if intrinsics is not None and name in intrinsics:
            features[IMAGE_PREFIX + name]["info"]["intrinsics"] = _matrix(intrinsics[name], (3, 3), name)
        if depth:
            features[IMAGE_PREFIX + name + DEPTH_SUFFIX] = _image_feature(size, "image", 1)
        if extrinsics:
            features[extrinsic_key(name)] = {"dtype": "float32", "shape": [4, 4], "names": ["row", "column"]}
    features[STATE] = _vector_feature(state_dim, state_names, "state")
    features[ACTION] = _vector_feature(action_dim, action_names, "action")
    for key, dtype in BOOKKEEPING.items():
        features[key] = {"dtype": dtype, "shape": [1], "names": None}
    return features


def extrinsic_key(camera: str) -> str:
    """The feature key of a camera's pose."""
    return f"observation.camera.{camera}.extrinsic"


def is_depth(feature: Feature) -> bool:
    """Whether an image feature is a depth map (both of LeRobot's spellings)."""
    info = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
    return bool(info.get("is_depth_map") or info.get("video.is_depth_map"))


def _short(key: str) -> str:
    return key.removeprefix(IMAGE_PREFIX).removeprefix("observation.")


def image_size(key: str, feature: Feature) -> tuple[int, int]:
    """(height, width) in pixels of an image feature, whichever axis its channels are on.

    `names` decide where they say it; else the axis with 1, 3 or 4 entries does.

    Raises:
        DataError: no two-dimensional image, or both ends of the shape could be the channels.
    """
    shape = [int(n) for n in feature["shape"]]
    if len(shape) == 2:
        return shape[0], shape[1]
    names = feature.get("names")
    words = [str(n).lower() for n in names] if isinstance(names, (list, tuple)) else []
    if len(shape) == 3 and len(words) == 3 and {"height", "width"} <= set(words):
        axis = next(i for i, word in enumerate(words) if word not in ("height", "width"))
        if shape[axis] in CHANNELS:
            return shape[words.index("height")], shape[words.index("width")]
        candidates = []
    else:
        candidates = [axis for axis in (0, 2) if len(shape) == 3 and shape[axis] in CHANNELS]
    if len(candidates) == 1:
        height, width = shape[1:] if candidates[0] == 0 else shape[:2]
        return height, width
    raise DataError(
        f"camera feature {key!r} has shape {shape} and names {names}: its colour axis cannot be told. "
        'Write names as ["height", "width", "channels"], or in their order, into meta/info.json.'
    )


def _joined(names: Sequence[str], parts: Sequence[Feature]) -> Feature:
    labels = [f"{name}.{i}" for name, part in zip(names, parts, strict=True) for i in range(_size(part))]
    return {"dtype": "float32", "shape": [len(labels)], "names": labels}


def _size(feature: Feature) -> int:
    return int(np.prod(feature["shape"]))


def _image_feature(size: tuple[int, int], dtype: str, channels: int) -> Feature:
    info: dict[str, Any] = {"is_depth_map": channels == 1}
    if channels == 1:
        info["depth_unit"] = "mm"
    return {
        "dtype": dtype,
        "shape": [*map(int, size), channels],
        "names": ["height", "width", "channels"],
        "info": info,
    }


def _vector_feature(dim: int, names: Sequence[str] | None, kind: str) -> Feature:
    labels = list(names) if names is not None else [f"{kind}_{i}" for i in range(dim)]
    if len(labels) != dim:
        raise ConfigError(f"{len(labels)} {kind} names for {dim} dimensions; give one a dimension.")
    return {"dtype": "float32", "shape": [int(dim)], "names": labels}


def _matrix(value: Any, shape: tuple[int, int], name: str) -> list[list[float]]:
    matrix = np.asarray(value, dtype=np.float64)
    if matrix.shape != shape or not np.isfinite(matrix).all():
        raise ConfigError(f"the matrix of camera {name!r} has shape {matrix.shape}; expected finite {shape}.")
    return [[float(v) for v in row] for row in matrix]
