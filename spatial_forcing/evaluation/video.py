"""Small videos of rollouts that every browser plays: H.264 in MP4, or VP9 in WebM without libx264."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from spatial_forcing.errors import DataError, EnvironmentSetupError

# (codec, suffix, options): constant quality, small enough to embed dozens of clips in one page.
_CODECS = (
    ("libx264", ".mp4", {"crf": "27", "preset": "veryfast", "movflags": "+faststart"}),
    ("libvpx-vp9", ".webm", {"crf": "38", "b:v": "0", "deadline": "realtime", "cpu-used": "6"}),
)


def write_video(
    frames: Sequence[NDArray[np.uint8]], path: Path, *, fps: float, codec: str | None = None
) -> Path:
    """Encode `frames` (each (H, W, 3) uint8 RGB, one size); returns the path written.

    The suffix of `path` is replaced by the one of the codec in use (`.mp4`, or `.webm`). The file
    appears under its name only when complete. `codec` forces one instead of the first available.

    Raises:
        DataError: no frames, or frames of different shapes.
        EnvironmentSetupError: PyAV has none of the codecs.
    """
    shapes = {f.shape for f in frames}
    if len(shapes) != 1 or (shape := next(iter(shapes)))[-1:] != (3,) or len(shape) != 3:
        raise DataError(f"{path}: a video needs frames of one shape (H, W, 3); got {sorted(shapes)}.")
    usable = [c for c in _CODECS if c[0] in av.codecs_available and codec in (None, c[0])]
    if not usable:
        raise EnvironmentSetupError(
            f"cannot write {path}: this PyAV has neither libx264 nor libvpx-vp9; reinstall it from PyPI "
            "(pip install --force-reinstall av) or record without videos."
        )
    name, suffix, options = usable[0]
    target = path.with_suffix(suffix)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.stem + ".partial" + suffix)
    # yuv420p halves the colour resolution, so both sides must be even.
    height, width = shape[0] - shape[0] % 2, shape[1] - shape[1] % 2
    with av.open(str(partial), "w") as container:
        stream = container.add_stream(name, rate=Fraction(fps).limit_denominator(1000), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    partial.replace(target)
    return target


def side_by_side(images: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """All cameras of one moment in one (H, sum of W, 3) picture; lower ones are padded with black."""
    pictures = list(images.values())
    height = max(p.shape[0] for p in pictures)
    padded = [np.pad(p, ((0, height - p.shape[0]), (0, 0), (0, 0))) for p in pictures]
    return np.concatenate(padded, axis=1)


def last_frame(path: Path) -> NDArray[np.uint8]:
    """The last picture of a video, (H, W, 3) uint8: of a rollout, how it ended.

    Raises:
        DataError: the file is no video, or an empty one.
    """
    try:
        with av.open(str(path)) as container:
            frames = deque(container.decode(video=0), maxlen=1)
        picture: NDArray[np.uint8] = frames[0].to_ndarray(format="rgb24")
    except (av.error.FFmpegError, IndexError) as error:
        raise DataError(f"{path} cannot be read as a video ({error}); evaluate that run again.") from error
    return picture
