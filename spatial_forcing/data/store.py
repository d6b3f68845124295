"""The decoded store: every frame as raw uint8 in memory-mapped files, beside the dataset where it may.

Reading a frame is then a copy of memory instead of a PNG or video decode. Rows are addressed by the
dataset's absolute frame index. An episode counts only once the header lists it, with the hash of its source
and a checksum of its rows; so an interrupted build resumes, a grown dataset adds what is new and a changed
episode is decoded again.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from spatial_forcing.data.reader import Dataset
from spatial_forcing.errors import DataError
from spatial_forcing.progress import progress_bar
from spatial_forcing.storage import (
    exclusive,
    require_disk,
    user_cache_folder,
    writable,
    write_json,
)

FOLDER = ".decoded"
FORMAT = 1


def store_folder(dataset: Dataset) -> Path:
    """Where the dataset's store lies: `.decoded` in it, unless it was opened with another folder.

    In another folder, or in the user's cache folder where the dataset's cannot be written, it gets a folder
    of its own, by the dataset's name and path.
    """
    beside = dataset.root / FOLDER
    if dataset.store_folder is None and writable(beside):
        return beside
    root = dataset.root.resolve()
    name = f"{root.name}-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"
    return (dataset.store_folder or user_cache_folder() / "decoded") / name


def stored_size(frame: tuple[int, int], size: int | None) -> tuple[int, int]:
    """(height, width) in the store: as recorded, or reduced so that the longer side is `size`."""
    longest = max(frame)
    if size is None or longest <= size:
        return frame
    return max(1, round(frame[0] * size / longest)), max(1, round(frame[1] * size / longest))


def store_bytes(dataset: Dataset, cameras: Sequence[str], size: int | None = None) -> int:
    """Bytes that a complete store takes."""
    heights_widths = [stored_size(dataset.info.frame_size(camera), size) for camera in cameras]
    return len(dataset) * 3 * sum(height * width for height, width in heights_widths)


@dataclass
class _CameraFile:
    """One camera's rows and its header: {"frame", "sources", "episodes": {number: ...}}."""

    data: Path
    header: Path
    shape: tuple[int, int, int, int]

    def read_header(self) -> dict[str, Any]:
        content: dict[str, Any] = {}
        if self.header.is_file():
            try:
                content = json.loads(self.header.read_text())
            except ValueError:
                content = {}
        frame = list(self.shape[1:])
        if content.get("format") != FORMAT or content.get("frame") != frame or not self.data.is_file():
            content = {"format": FORMAT, "frame": frame, "sources": None, "episodes": {}}
        return content

    def rows_on_disk(self) -> int:
        """Complete rows in the file, which may be shorter than the dataset or damaged."""
        return self.data.stat().st_size // int(np.prod(self.shape[1:])) if self.data.is_file() else 0

    def rows(self, mode: str) -> np.memmap[Any, np.dtype[np.uint8]]:
        self.data.parent.mkdir(parents=True, exist_ok=True)
        length = int(np.prod(self.shape))
        if mode != "r":
            with open(self.data, "ab") as handle:
                handle.truncate(length)  # a grown dataset keeps what is there
        return np.memmap(self.data, dtype=np.uint8, mode=mode, shape=self.shape)  # type: ignore[call-overload]


class DecodedStore:
    """Decoded frames of some cameras of one dataset; see `build`.

    Attributes:
        cameras: names, as asked for.
    """

    def __init__(
        self, cameras: tuple[str, ...], rows: dict[str, NDArray[np.uint8]], decoded: NDArray[np.bool_]
    ) -> None:
        self.cameras = cameras
        self._rows = rows
        self._decoded = decoded

    @classmethod
    def build(
        cls,
        dataset: Dataset,
        cameras: Sequence[str] | None = None,
        *,
        episodes: Sequence[int] | None = None,
        size: int | None = None,
        progress: bool = True,
    ) -> Self:
        """Open the store (see `store_folder`), decoding first what is missing.

        Several processes may call this at once.

        Args:
            dataset: the source.
            cameras: names; default all.
            episodes: decode these only; a damaged frame of another one does no harm. Default: all.
            size: reduce frames so that the longer side has this many pixels (aspect kept); None keeps them.
            progress: show a progress bar on stderr.

        Raises:
            DataError: an unknown camera, or a frame that cannot be decoded (its episode is named).
            EnvironmentSetupError: not enough free disk; nothing was written.
        """
        cameras = cameras or dataset.cameras
        folder = store_folder(dataset)
        files = {}
        for camera in cameras:
            shape = (len(dataset), *stored_size(dataset.info.frame_size(camera), size), 3)
            name = f"{camera}-{shape[1]}x{shape[2]}"
            files[camera] = _CameraFile(folder / f"{name}.u8", folder / f"{name}.json", shape)
        with exclusive(folder, wait=True, doing="decoding"):
            wanted = {e.index for e in dataset.episodes} if episodes is None else set(episodes)
            plans = {camera: _missing(dataset, camera, file, wanted) for camera, file in files.items()}
            frames = {c: sum(dataset.episodes[e].length for e in plan) for c, plan in plans.items()}
            needed = sum(frames[c] * int(np.prod(file.shape[1:])) for c, file in files.items())
            if needed:
                require_disk(folder, needed, "the decoded store")
            with progress_bar(progress and needed > 0) as bar:
                task = bar.add_task("decoding frames", total=sum(frames.values()))
                for camera, file in files.items():
                    _fill(dataset, camera, file, plans[camera], lambda n: bar.advance(task, n))
        decoded = np.isin(dataset.episode_index, sorted(wanted))
        return cls(tuple(cameras), {camera: file.rows("r") for camera, file in files.items()}, decoded)

    def images(self, indices: Sequence[int] | NDArray[np.integer[Any]], camera: str) -> NDArray[np.uint8]:
        """Copies of frames, (n, H, W, 3) uint8, by absolute index.

        Raises:
            DataError: a camera or an episode that is not in this store.
        """
        index = np.asarray(indices, dtype=np.int64)
        if not self._decoded[index].all():
            absent = index[~self._decoded[index]].tolist()
            raise DataError(f"frames {absent[:5]} are of episodes that this store was built without.")
        return np.ascontiguousarray(self._of(camera)[index])

    def frame_size(self, camera: str) -> tuple[int, int]:
        """(height, width) of the stored frames."""
        height, width = self._of(camera).shape[1:3]
        return height, width

    def _of(self, camera: str) -> NDArray[np.uint8]:
        if camera not in self._rows:
            raise DataError(
                f"camera {camera!r} is not in this store; it has {sorted(self._rows)}. "
                "Name it when building the store."
            )
        return self._rows[camera]


def verify_store(dataset: Dataset) -> list[tuple[int, str]]:
    """(episode, camera's file) of every stored episode whose rows do not match their checksum.

    Episodes that are not in the store yet are no defect; the next build adds them.
    """
    broken = []
    for header in sorted(store_folder(dataset).glob("*.json")):
        content = json.loads(header.read_text())
        file = _CameraFile(header.with_suffix(".u8"), header, (len(dataset), *content["frame"]))
        there = file.rows_on_disk()
        rows = replace(file, shape=(there, *file.shape[1:])).rows("r") if there else np.zeros(0, np.uint8)
        for number, entry in content["episodes"].items():
            start, stop = entry["start"], entry["start"] + entry["length"]
            if stop > there or zlib.crc32(rows[start:stop].tobytes()) != entry["crc"]:
                broken.append((int(number), f"{file.data.parent.name}/{file.data.name}"))
    return broken


def _missing(dataset: Dataset, camera: str, file: _CameraFile, wanted: set[int]) -> dict[int, str]:
    """Episodes of `wanted` to decode -> hash of their source; forgets entries that no longer hold."""
    header = file.read_header()
    sources = _sources(dataset, camera)
    entries: dict[str, Any] = header["episodes"]
    numbers = {str(number) for number in wanted}
    there = file.rows_on_disk()
    if header["sources"] == sources and numbers <= set(entries) and there == len(dataset):
        return {}
    hashes = {}
    for number in sorted(wanted | {int(n) for n in entries if int(n) < len(dataset.episodes)}):
        # An episode that is not requested may be damaged; it is only forgotten.
        with nullcontext() if number in wanted else suppress(DataError):
            hashes[str(number)] = dataset.content_hash(number, [camera])
    starts = {str(e.index): e.start for e in dataset.episodes if e.stop <= there}
    kept = {
        number: entry
        for number, entry in entries.items()
        if entry["hash"] == hashes.get(number) and entry["start"] == starts.get(number)
    }
    write_json(file.header, {**header, "sources": None, "episodes": kept})
    if numbers <= set(kept):
        write_json(file.header, {**header, "sources": sources, "episodes": kept})
    return {int(number): hashes[number] for number in sorted(numbers - set(kept), key=int)}


def _fill(dataset: Dataset, camera: str, file: _CameraFile, plan: dict[int, str], advance: Any) -> None:
    if not plan:
        return
    rows = file.rows("r+")
    header = file.read_header()
    height, width = file.shape[1:3]
    for number, source_hash in plan.items():
        episode = dataset.episodes[number]
        for index in range(episode.start, episode.stop):
            pixels = dataset.image(index, camera)
            if pixels.shape[:2] != (height, width):
                resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
                pixels = np.asarray(resized)
            rows[index] = pixels
            advance(1)
        checksum = zlib.crc32(rows[episode.start : episode.stop].tobytes())
        header["episodes"][str(number)] = {
            "hash": source_hash,
            "crc": checksum,
            "start": episode.start,
            "length": episode.length,
        }
        rows.flush()
        write_json(file.header, header)
    write_json(file.header, {**header, "sources": _sources(dataset, camera)})


def _sources(dataset: Dataset, camera: str) -> list[list[Any]]:
    """Name, size and modification time of the camera's source files; unchanged files are not hashed again."""
    files = dataset.source_files([camera])
    stats = [(path.relative_to(dataset.root).as_posix(), path.stat()) for path in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
