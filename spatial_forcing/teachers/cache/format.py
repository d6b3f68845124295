"""The files of a feature cache.

    header.json           what is cached, and how faithfully
    basis.safetensors     the directions of a cache with fewer channels than its teacher
    shard-00000.bin       fixed-size rows of whole episodes, one row a frame
    shard-00000.json      which episodes, where, with a checksum each; a shard counts once this exists

A row holds, for every layer, (V, h, w, C) numbers as `codec` stores them, then the presence bits of its
views. Every shard has its own record, so builders of different shards share no file. A
record may name a later data file (`shard-00000.r1.bin`), which holds what pruning left of the first.

Shapes: n rows, V view, h x w teacher grid, C channels.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from spatial_forcing.errors import DataError
from spatial_forcing.storage import write_json
from spatial_forcing.teachers.cache.codec import DTYPES, CacheDtype, columns, encode

VERSION = 1
HEADER = "header.json"


@dataclass(frozen=True)
class TeacherFacts:
    """The teacher whose features are cached; see `protocols.Teacher` and, for `partial`, `PartialTeacher`."""

    name: str
    fingerprint: str
    licence: str
    dim: int
    depth: int
    patch: int
    resolution: int
    partial: bool = False


@dataclass(frozen=True)
class CacheHeader:
    """Content of `header.json`.

    Attributes:
        teacher: whose features.
        cameras: ordered; all views of a frame were encoded together in this order.
        layers: of the teacher, 0-based.
        grid: (h, w).
        channels: numbers stored a token.
        dtype: of them; see `codec`.
        basis: None for the teacher's own channels, else what `basis.save_bases` says: "sha256" of the
            vectors' file and, for each layer, the "mean" that was subtracted; and "frames" in the sample.
        standardised: the teacher's channels were standardised before the basis was fitted.
        frame_size: (H, W) of the frames before the teacher's own resizing.
        dataset: the source's name, for messages.
        fidelity: layer -> "cosine" and "cosine_mean_removed" between stored and fresh features, means over
            the tokens of `fidelity_frames` frames; empty until a build is complete.
        fidelity_frames: how many.
        version: of this layout.
    """

    teacher: TeacherFacts
    cameras: tuple[str, ...]
    layers: tuple[int, ...]
    grid: tuple[int, int]
    channels: int
    dtype: CacheDtype
    frame_size: tuple[int, int]
    dataset: str
    basis: Mapping[str, Any] | None = None
    standardised: bool = False
    fidelity: Mapping[str, Mapping[str, float]] | None = None
    fidelity_frames: int = 0
    version: int = VERSION

    @property
    def row(self) -> np.dtype[Any]:
        """The layout of one row."""
        tokens = (len(self.cameras), *self.grid)
        fields = [
            (f"{name}{layer}", kind, (*tokens, *shape))
            for name, (kind, shape) in columns(self.dtype, self.channels).items()
            for layer in self.layers
        ]
        return np.dtype([*fields, ("present", "u1", ((len(self.cameras) + 7) // 8,))], align=True)

    def save(self, folder: Path) -> None:
        """Write it, atomically."""
        write_json(folder / HEADER, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> CacheHeader:
        """Read it. Raises `DataError` when it is missing, malformed or of another version."""
        content = read_json(folder / HEADER)
        version = content.get("version")
        if version != VERSION:
            raise DataError(
                f"{folder / HEADER} is a cache of version {version!r}; this package reads version {VERSION}. "
                "Update the package or build it again."
            )
        if content.get("dtype") not in DTYPES:
            raise DataError(
                f"{folder / HEADER} stores its numbers as {content.get('dtype')!r}; this package reads "
                f"{', '.join(DTYPES)}. Update the package or build the cache again."
            )
        try:
            return cls(
                **{
                    **content,
                    "teacher": TeacherFacts(**content["teacher"]),
                    **{key: tuple(content[key]) for key in ("cameras", "layers", "grid", "frame_size")},
                }
            )
        except (TypeError, KeyError) as error:
            raise DataError(f"{folder / HEADER} is malformed ({error}); build the cache again.") from error


@dataclass(frozen=True)
class CachedEpisode:
    """Where one episode lies.

    Attributes:
        episode, first, length, hash: as in `source.SourceEpisode`.
        row: its first row in the shard.
        crc: CRC-32 of its rows.
    """

    episode: int
    first: int
    length: int
    hash: str
    row: int
    crc: int


@dataclass(frozen=True)
class Shard:
    """A completed shard: its data file, its record, and the episodes in it that are still current."""

    data: Path
    rows: int
    episodes: tuple[CachedEpisode, ...]

    @property
    def record(self) -> Path:
        """The JSON file beside the data."""
        return self.data.with_name(f"shard-{self.number:05d}.json")

    @property
    def number(self) -> int:
        """The number of the shard in its cache."""
        return int(self.data.name.split(".")[0].removeprefix("shard-"))

    def save(self) -> None:
        """Write the record, atomically: from now on the shard counts."""
        episodes = [asdict(e) for e in self.episodes]
        write_json(self.record, {"data": self.data.name, "rows": self.rows, "episodes": episodes})

    def open(self, row: np.dtype[Any]) -> NDArray[Any]:
        """The rows, memory-mapped, (n,). Raises `DataError` when the file is missing or not whole."""
        self.check_size(row)
        return np.memmap(self.data, dtype=row, mode="r", shape=(self.rows,))

    def check_size(self, row: np.dtype[Any]) -> None:
        """Raise `DataError` when the file is missing or truncated."""
        size = self.data.stat().st_size if self.data.is_file() else 0
        if size != self.rows * row.itemsize:
            raise DataError(
                f"{self.data} has {size} bytes, {self.rows * row.itemsize} expected: it is damaged. "
                f"`spatial-forcing cache prune {self.data.parent}` drops the lost rows of its "
                f"{len(self.episodes)} episodes; the next build redoes those alone."
            )


def read_shards(folder: Path) -> list[Shard]:
    """The completed shards of a cache, in order. Raises `DataError` on a malformed record."""
    shards = []
    for record in sorted(folder.glob("shard-*.json")):
        content = read_json(record)
        try:
            episodes = tuple(CachedEpisode(**entry) for entry in content["episodes"])
            data = record.with_name(content.get("data", record.with_suffix(".bin").name))
            shards.append(Shard(data, int(content["rows"]), episodes))
        except (TypeError, KeyError, ValueError) as error:
            raise DataError(f"{record} is malformed ({error}); delete it and build again.") from error
    return shards


def leftovers(folder: Path, shards: Sequence[Shard]) -> list[Path]:
    """What interrupted builds left: data that no record counts."""
    counted = {shard.data for shard in shards}
    patterns = ("*.partial", ".*.tmp", "shard-*.bin")
    return [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path not in counted]


def encode_rows(header: CacheHeader, features: Sequence[Tensor], present: NDArray[np.bool_]) -> NDArray[Any]:
    """Rows (n,) from one (n, V, h, w, C) tensor a layer of the header and the (n, V) present views."""
    rows = np.zeros(len(present), dtype=header.row)
    rows["present"] = np.packbits(present, axis=1)
    for layer, values in zip(header.layers, features, strict=True):
        for name, part in encode(header.dtype, values).items():
            rows[f"{name}{layer}"] = part
    return rows


def decode_present(header: CacheHeader, bits: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(n, V) bool from the presence bytes of rows."""
    return np.unpackbits(bits, axis=1, count=len(header.cameras)).astype(bool)


def checksum(rows: NDArray[Any], before: int = 0) -> int:
    """CRC-32 of rows as they lie in the file, continuing from `before`."""
    return zlib.crc32(np.ascontiguousarray(rows).view(np.uint8).data, before)


def read_json(path: Path) -> dict[str, Any]:
    """Raises `DataError` when the file is missing or is not JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; build the cache first, or give its folder.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete it and build again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not JSON object; delete it and build again.")
    return content
