"""Files that are never half there, CSV text, disk estimates, locks."""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spatial_forcing.errors import EnvironmentSetupError

SPARE_BYTES = 64 * 2**20
"""Disk space that must stay free."""


def user_cache_folder() -> Path:
    """Folder of what can be made again: `spatial-forcing` in the user's cache folder (XDG)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "spatial-forcing"


def writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, or in the nearest parent that exists."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def csv_text(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file, flush it to disk and rename it to `path`: readers see no part of it.

    Others may read it as far as the umask says; safetensors (0.8) would keep it from them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.touch()
        mode = beside.stat().st_mode
        write(beside)
        beside.chmod(mode)
        with beside.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by `content` as JSON; what JSON does not know (paths) is written as text."""
    text = json.dumps(content, indent=1, default=str) + "\n"
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def free_bytes(folder: Path) -> int:
    """Free space where `folder` is or will be."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def require_disk(folder: Path, needed: int, what: str, remedy: str = "use another disk") -> None:
    """Check that `needed` bytes fit under `folder`, before any of them is written.

    Raises:
        EnvironmentSetupError: they do not, or less than `SPARE_BYTES` would stay free.
    """
    free = free_bytes(folder)
    if needed and free < needed + SPARE_BYTES:
        raise EnvironmentSetupError(
            f"{what} needs {needed / 2**20:,.0f} MiB in {folder}, but {free / 2**20:,.0f} MiB are free "
            f"({SPARE_BYTES // 2**20} MiB must stay free). Free some space, or {remedy}."
        )


@contextmanager
def disk_full_explained(folder: Path, kept: str) -> Iterator[None]:
    """Turn a full disk into an `EnvironmentSetupError` that says what is `kept`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise EnvironmentSetupError(
            f"the disk of {folder} is full; {kept}. Free some space and run the same command again."
        ) from error


@contextmanager
def exclusive(folder: Path, *, wait: bool, doing: str) -> Iterator[None]:
    """One process at a time in `folder`; the kernel frees the lock when a process dies.

    Raises:
        EnvironmentSetupError: another process is `doing` it and `wait` is False.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            handle.seek(0)
            raise EnvironmentSetupError(
                f"process {handle.read().strip() or 'unknown'} is {doing} in {folder}; "
                "wait for it, or use another folder."
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield
