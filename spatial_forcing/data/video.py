"""Video through PyAV: encode an episode, join episodes without re-encoding, decode frames at random."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from spatial_forcing.errors import DataError

CODEC = "libx264"
QUALITY = "18"
"""Constant rate factor; 18 is visually lossless for H.264."""
KEY_FRAMES = 2
"""Frames between key frames: random access decodes at most this many (LeRobot's choice as well)."""
NO_LOOKAHEAD = "mbtree=0:rc-lookahead=0"
"""With so many key frames looking ahead gains nothing, and on small frames x264 then encodes the same input
differently from time to time, which would make an unchanged episode look changed."""


LOOK_BACK = (0.0, 1.0, 4.0, 16.0, float("inf"))
"""Seconds before a frame at which a key frame is looked for, one after the other."""


class VideoEncoder:
    """Encodes frames as they come into an mp4 in memory: H.264, yuv420p (even sizes), no B-frames."""

    def __init__(self, height: int, width: int, fps: int) -> None:
        self._buffer = io.BytesIO()
        self._container = av.open(self._buffer, "w", format="mp4")
        self._stream: Any = self._container.add_stream(
            CODEC, rate=fps, options={"crf": QUALITY, "preset": "veryfast", "x264-params": NO_LOOKAHEAD}
        )
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._stream.codec_context.gop_size = KEY_FRAMES
        self._stream.codec_context.max_b_frames = 0

    def add(self, pixels: NDArray[np.uint8]) -> None:
        """Append one (H, W, 3) frame."""
        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))

    def finish(self) -> bytes:
        """The complete file; the encoder cannot be used afterwards."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._buffer.getvalue()


def join_videos(parts: Sequence[Path], lengths: Sequence[int], fps: int, target: Path) -> None:
    """Concatenate `parts` of `lengths` frames into `target` by copying packets; atomic.

    Frame i of part p starts at (sum of the lengths before p + i) / fps seconds.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".tmp")
    with av.open(str(beside), "w", format="mp4") as output:
        stream: Any = None
        before = 0
        for part, length in zip(parts, lengths, strict=True):
            with av.open(str(part)) as source:
                origin = source.streams.video[0]
                # Opaque: there need be no encoder of that name (AV1 is decoded by another library).
                stream = stream or output.add_stream_from_template(origin, opaque=True)
                shift = round(Fraction(before, fps) / origin.time_base)
                for packet in source.demux(origin):
                    if packet.dts is None:
                        continue
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = stream
                    output.mux(packet)
            before += length
    os.replace(beside, target)


def codec_parameters(path: Path) -> tuple[Any, ...]:
    """What two videos must have in common for their packets to follow each other in one file.

    Raises:
        DataError: it is missing or truncated.
    """
    with _opened(path) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        name = stream.codec.canonical_name
        return name, context.width, context.height, context.pix_fmt, bytes(context.extradata or b"")


def first_frames(path: Path, count: int, fps: int) -> bytes | None:
    """An mp4 of the first `count` frames by copying packets; None where that cannot be done.

    It can where frame i is shown at i / fps seconds, and no packet behind the last frame is needed by one of
    them.

    Raises:
        DataError: it is missing or truncated.
    """
    with _opened(path) as source:
        stream = source.streams.video[0]
        packets = [packet for packet in source.demux(stream) if packet.pts is not None]
        base = stream.time_base
        times = sorted(float(packet.pts * base) for packet in packets)
        if len(times) < count or any(abs(t * fps - i) > 0.01 for i, t in enumerate(times[:count])):
            return None
        if len(times) == count:
            return path.read_bytes()
        end = (count - 0.5) / fps
        kept = [packet for packet in packets if float(packet.pts * base) < end]
        if kept != packets[: len(kept)]:
            return None
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4") as output:
            copy = output.add_stream_from_template(stream, opaque=True)
            for packet in kept:
                packet.stream = copy
                output.mux(packet)
        return buffer.getvalue()


def packets_digest(path: Path, start: float, stop: float, fps: int) -> str:
    """SHA-256 of the encoded packets shown in [start, stop) seconds; joining does not change it."""
    digest = hashlib.sha256()
    half = 0.5 / fps
    with _opened(path) as container:
        stream = container.streams.video[0]
        container.seek(max(0, int((start - half) / stream.time_base)), stream=stream, backward=True)
        for packet in container.demux(stream):
            if packet.pts is None:
                continue
            time = float(packet.pts * stream.time_base)
            if time >= stop - half:
                break
            if time >= start - half:
                digest.update(bytes(packet))
    return digest.hexdigest()


@dataclass(frozen=True)
class VideoFacts:
    """What a video file says about itself.

    Attributes:
        frames: pictures in it.
        seconds: time of its end.
    """

    frames: int
    seconds: float


def video_facts(path: Path) -> VideoFacts:
    """Read from the file's header; packets are counted only where it does not say.

    Raises:
        DataError: it is missing or truncated, or holds no video.
    """
    with _opened(path) as container:
        stream = container.streams.video[0]
        if stream.frames and stream.duration:
            return VideoFacts(stream.frames, float(stream.duration * stream.time_base))
        try:
            times = [p.pts * stream.time_base for p in container.demux(stream) if p.pts is not None]
        except av.FFmpegError as error:
            raise DataError(f"{path} cannot be read to its end ({error}).") from error
        rate = stream.average_rate
        return VideoFacts(len(times), float(max(times, default=0) + (1 / rate if rate and times else 0)))


class VideoReader:
    """Frames of one mp4 by time; walking forward decodes on, anything else seeks to a key frame."""

    def __init__(self, path: Path, fps: int) -> None:
        self._path = path
        self._half = 0.5 / fps
        self._container = _opened(path)
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self._frames: Iterator[Any] = iter(())
        self._time = float("-inf")

    def frame(self, time: float) -> NDArray[np.uint8]:
        """The (H, W, 3) uint8 frame nearest `time` seconds, within half a frame.

        Raises:
            DataError: there is none (a truncated file).
        """
        ahead = (time - self._time) / (2 * self._half)
        frame: Any = None
        try:
            if 0.5 < ahead < 2 * KEY_FRAMES:
                frame = self._next(time)
            else:
                # Key frames are found by when they are decoded, and one that is shown later may lie behind
                # the frame. What is shown before it cannot be decoded from there: look further back.
                for back in LOOK_BACK:
                    self._seek(time - back)
                    frame = self._next(time)
                    if self._time <= time + self._half or time - back <= 0:
                        break
        except av.FFmpegError as error:
            raise DataError(f"{self._path} cannot be decoded at {time:.3f} s ({error}).") from error
        if frame is None or not abs(self._time - time) <= self._half * 1.01:
            raise DataError(
                f"{self._path} has no frame at {time:.3f} s; the file is truncated. "
                "Run `spatial-forcing data check` and restore or re-record the episode."
            )
        pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
        return pixels

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def _next(self, time: float) -> Any:
        """The first frame from here on that is not before `time`, else the last one there is."""
        frame = None
        for frame in self._frames:
            self._time = float(frame.pts * self._stream.time_base)
            if self._time >= time - self._half:
                break
        return frame

    def _seek(self, time: float) -> None:
        offset = int(max(0.0, time - self._half) / self._stream.time_base)
        self._container.seek(offset, stream=self._stream, backward=True)
        self._frames = self._container.decode(self._stream)
        self._time = float("-inf")


def _opened(path: Path) -> Any:
    try:
        container = av.open(str(path))
        if not container.streams.video:
            raise OSError("it holds no video stream")
        return container
    except (OSError, av.FFmpegError) as error:
        raise DataError(
            f"{path} cannot be opened as a video ({error}); it is missing or truncated. "
            "Restore it from where you got it or re-record its episodes."
        ) from error
