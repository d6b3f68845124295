"""What converters of HDF5 recordings share: opening, ordering, and camera frames however they were stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from spatial_forcing.data.convert.sources import natural, recordings
from spatial_forcing.data.images import decode_colour
from spatial_forcing.errors import DataError, EnvironmentSetupError

SUFFIXES = (".hdf5", ".h5")


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """The file, open for reading.

    Raises:
        DataError: it is damaged, truncated or no HDF5 file.
        EnvironmentSetupError: h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise EnvironmentSetupError(
            f"{path.name} needs h5py ({error}). Run: pip install 'spatial-forcing[hdf5]'"
        ) from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path} cannot be read as HDF5 ({error}); copy it again or leave it out.") from error
    with file:
        yield file


def episode_files(source: Path) -> tuple[list[Path], dict[Path, str]]:
    """Every .hdf5 / .h5 file below `source`, folder by folder, episode_2 before episode_10.

    Second come those that are left out, with the reason.

    Raises:
        DataError: there is none.
    """
    files, skipped = recordings(source, "*.h*5")
    found = [path for path in files if path.suffix in SUFFIXES]
    if not found:
        raise DataError(f"{source} holds no .hdf5 file, in no sub-folder either.")
    return found, {path: why for path, why in skipped.items() if path.suffix in SUFFIXES}


def arrays_of(group: Any, length: int) -> dict[str, Any]:
    """Arrays of numbers below `group` with `length` rows, by path."""
    import h5py

    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim and len(item) == length and item.dtype.kind in "fiub":
            found[name] = item

    group.visititems(visit)
    return found


def dataset(file: Any, name: str) -> Any:
    """The array `name` of an open file. Raises `DataError` naming what there is instead."""
    import h5py

    found = file.get(name)
    if isinstance(found, h5py.Dataset):
        if not found.ndim:
            raise DataError(
                f"{Path(file.filename).name}: {name!r} is a single value; expected one for each frame"
            )
        return found
    there: list[str] = []
    file.visit(there.append)
    raise DataError(
        f"{Path(file.filename).name} has no array {name!r}; it holds {', '.join(there) or 'nothing'}"
    )


class Frames:
    """The frames of one camera: raw (N, H, W, 3) uint8, or N encoded images (padded bytes, strings, vlen).

    Args:
        array: the h5py array.
        swap: exchange red and blue: for images that were stored as BGR, or encoded by OpenCV from RGB.
        size: (height, width) to resize to; None keeps what is there.
    """

    def __init__(self, array: Any, *, swap: bool = False, size: tuple[int, int] | None = None) -> None:
        self._array, self._swap, self._size = array, swap, size
        self.raw = array.ndim == 4
        if self.raw and (array.shape[-1] != 3 or array.dtype != np.uint8):
            raise DataError(f"{array.name} is {array.shape} of {array.dtype}; expected (N, H, W, 3) uint8.")
        if not self.raw and array.ndim not in (1, 2):
            raise DataError(f"{array.name} has shape {array.shape}; expected frames or encoded images.")

    def __len__(self) -> int:
        return len(self._array)

    def stored(self, index: int) -> bytes:
        """The frame's bytes as they lie in the file; equal bytes mean the very same picture."""
        return np.asarray(self._array[index]).tobytes()

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB. Raises `DataError` when it cannot be decoded."""
        if self.raw:
            try:
                image = np.asarray(self._array[index])
            except OSError as error:
                raise DataError(f"frame {index} of {self._array.name} cannot be read ({error})") from error
        else:
            try:
                image = decode_colour(self.stored(index))
            except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
                raise DataError(f"frame {index} of {self._array.name} is not an image ({error})") from error
        if self._swap:
            image = image[..., ::-1]
        if self._size is not None and image.shape[:2] != self._size:
            height, width = self._size
            resized = Image.fromarray(np.ascontiguousarray(image)).resize(
                (width, height), Image.Resampling.BILINEAR
            )
            image = np.asarray(resized)
        return np.ascontiguousarray(image)


def demonstrations(file: Any, path: Path) -> list[str]:
    """Names of the demonstrations in the group `data`, whatever they are called, in natural order.

    Raises:
        DataError: the file has no such group, or nothing in it.
    """
    import h5py

    group = file.get("data")
    if not isinstance(group, h5py.Group):
        raise DataError(f"{path} has no group 'data'; it holds {sorted(file)}.")
    names = [name for name, item in group.items() if isinstance(item, h5py.Group)]
    if not names:
        raise DataError(f"{path} has no demonstration in its group 'data'; download it again.")
    return sorted(names, key=natural)


def numbers(array: Any, dtype: type[Any] = np.float32) -> NDArray[Any]:
    """The content of an array of numbers. Raises `DataError` where it holds something else."""
    if array.dtype.kind not in "fiub":
        raise DataError(f"{array.name} holds {array.dtype}, no numbers")
    try:
        return np.asarray(array, dtype)
    except OSError as error:
        raise DataError(f"{array.name} cannot be read ({error})") from error


def rows_of(group: Any, name: str) -> int:
    """Number of rows of the array `name`; 0 for a missing array, which is refused when it is read."""
    array = group.get(name)
    return len(array) if getattr(array, "ndim", 0) else 0


def width_of(array: Any) -> int:
    """Numbers in one row of an array."""
    return int(np.prod(array.shape[1:]))


def first_size(frames: Frames) -> tuple[int, int]:
    """(height, width) of the first frame. Raises `DataError` where there is none."""
    if not len(frames):
        raise DataError("the first episode has no frames; leave its file out")
    height, width = frames[0].shape[:2]
    return height, width


def text_of(value: Any) -> str | None:
    """`value` (an attribute, or a scalar array of text) as text; None when it is none."""
    if value is None:
        return None
    if hasattr(value, "asstr") or hasattr(value, "shape"):
        array = np.asarray(value[()] if hasattr(value, "asstr") else value)
        value = array.flat[0] if array.size else ""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return value.strip() or None if isinstance(value, str) else None
