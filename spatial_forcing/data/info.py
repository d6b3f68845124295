"""What a LeRobot v3.0 dataset says about itself: `meta/info.json`, feature names and file paths.

Layout: https://huggingface.co/docs/lerobot/lerobot-dataset-v3. Cameras are named by what follows
`observation.images.`; a depth map is the feature `observation.images.<camera>_depth`, 16-bit PNG in
millimetres, marked `is_depth_map`; extrinsics are `observation.camera.<camera>.extrinsic`, (4, 4) float32
world from camera with OpenCV axes; intrinsics (3, 3), in pixels, lie in the image feature's `info`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.storage import write_json
from spatial_forcing.views import IMAGE_PREFIX

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
        """(height, width) of `camera`'s stored frames in pixels."""
        return _height_width(self.features[self.camera_key(camera)])

    def data_file(self, chunk: int, file: int) -> str:
        """Path of a data file relative to the dataset's root."""
        return self.data_path.format(chunk_index=chunk, file_index=file)

    def video_file(self, key: str, chunk: int, file: int) -> str:
        """Path of a video file relative to the dataset's root."""
        template = self.video_path or VIDEO_FILE
        return template.format(video_key=key, chunk_index=chunk, file_index=file)

    def save(self, root: Path) -> None:
        """Write `meta/info.json` atomically."""
        write_json(root / INFO_FILE, {**asdict(self), "splits": {"train": f"0:{self.total_episodes}"}})

    @classmethod
    def load(cls, root: str | Path) -> DatasetInfo:
        """Read `meta/info.json`.

        Raises:
            DataError: no dataset there, unreadable JSON, a version other than v3.0, a missing field.
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
        known = set(cls.__dataclass_fields__)
        return cls(**{key: value for key, value in raw.items() if key in known})


def check_version(version: str, place: object) -> None:
    """Raise `DataError` unless `version` is v3.0; the message says how to convert."""
    if version == VERSION:
        return
    remedy = (
        "Convert it with LeRobot: "
        "`python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=<owner/name>`."
        if version.startswith(("v2", "v1"))
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


def _height_width(feature: Feature) -> tuple[int, int]:
    shape = list(feature["shape"])
    names = list(feature.get("names") or [])
    channels_first = names[:1] in (["channel"], ["channels"])
    height, width = shape[1:] if channels_first else shape[:2]
    return int(height), int(width)


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
