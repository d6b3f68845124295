"""LIBERO episodes from RLDS TFRecords, without TensorFlow (the `tfrecord` package reads the container).

A record is one episode: `steps/action` and `steps/observation/state` as flat numbers,
`steps/observation/image` and `.../wrist_image` as encoded images, one a step,
`steps/language_instruction` as text.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from spatial_forcing.data.convert.sources import recordings
from spatial_forcing.errors import DataError, EnvironmentSetupError

IMAGES = {"agentview": "steps/observation/image", "robot0_eye_in_hand": "steps/observation/wrist_image"}
NO_OBSERVATION = {"steps/reward", "steps/discount"}
ACTION, STATE, TASK = "steps/action", "steps/observation/state", "steps/language_instruction"


@dataclass(frozen=True)
class RLDSEpisode:
    """One episode: `actions` (N, 7), `states` (N, 8), encoded images by camera, the instruction.

    Actions are the simulator's (gripper -1 open, +1 closed), images as OpenVLA orients them. `more` holds
    what else has numbers for every step, (N, n) each.
    """

    actions: NDArray[np.float32]
    states: NDArray[np.float32]
    encoded: dict[str, Sequence[bytes]]
    task: str
    more: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def image(self, camera: str, step: int) -> NDArray[np.uint8]:
        """(H, W, 3) uint8. Raises `DataError` when it cannot be decoded."""
        try:
            return np.asarray(Image.open(io.BytesIO(self.encoded[camera][step])).convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"step {step}: the image of {camera} cannot be decoded ({error}).") from error


def tfrecord_files(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """Shards below `folder`, in order, and those that are left out, with the reason.

    TFDS keeps them in a folder named after the version, and builds it as `VERSION.incomplete...`.
    """
    return recordings(folder, "*.tfrecord*")


def read_episodes(path: Path) -> Iterator[RLDSEpisode]:
    """The episodes of one shard.

    Raises:
        DataError: a truncated file, or an episode without the expected features; names file and record.
        EnvironmentSetupError: the `tfrecord` package is not installed.
    """
    try:
        from tfrecord.example_pb2 import Example
        from tfrecord.reader import tfrecord_iterator
    except ImportError as error:
        raise EnvironmentSetupError(
            "RLDS files need the tfrecord package. Run: pip install tfrecord h5py"
        ) from error
    records = enumerate(tfrecord_iterator(str(path)))
    while True:
        try:
            number, record = next(records)
            features = Example.FromString(bytes(record)).features.feature
        except StopIteration:
            return
        except Exception as error:  # the package raises RuntimeError, protobuf its own
            raise DataError(
                f"{path} is truncated or not a TFRecord file ({error}); download it again."
            ) from error
        yield _episode(f"{path}, record {number}", features)


def _episode(place: str, features: Any) -> RLDSEpisode:
    absent = sorted({ACTION, STATE, TASK, *IMAGES.values()} - set(features))
    if absent:
        raise DataError(f"{place}: {', '.join(absent)} missing; it has {', '.join(sorted(features)[:8])}.")
    encoded = {camera: features[key].bytes_list.value for camera, key in IMAGES.items()}
    steps = len(encoded["agentview"])
    numbers = {}
    for key, width in ((ACTION, 7), (STATE, 8)):
        flat = np.array(features[key].float_list.value, np.float32)
        if flat.size != steps * width:
            raise DataError(f"{place}: {key} holds {flat.size} numbers for {steps} steps of {width}.")
        numbers[key] = flat.reshape(steps, width)
    if len(encoded["robot0_eye_in_hand"]) != steps or not steps:
        raise DataError(f"{place}: the cameras have {[len(v) for v in encoded.values()]} images.")
    texts = features[TASK].bytes_list.value
    if not texts:
        raise DataError(f"{place}: {TASK} is empty.")
    more = {}
    for key in features:
        values = np.array(features[key].float_list.value, np.float32)
        if (
            key.startswith("steps/")
            and key not in {*numbers, *NO_OBSERVATION}
            and values.size
            and not values.size % steps
        ):
            more[key] = values.reshape(steps, -1)
    return RLDSEpisode(numbers[ACTION], numbers[STATE], encoded, texts[0].decode("utf-8", "replace"), more)
