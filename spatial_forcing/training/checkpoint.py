"""Checkpoints: directories that are written under a temporary name, then renamed.

step-000001000/
policy/                the student as `save_pretrained` writes it
projector.safetensors  the alignment's own state, where there is an alignment
optimizer.pt           optimizer and scheduler
rng-0.pt ...           random streams, one file a process
state.json             step, configuration, metrics since the last line
manifest.json          size and SHA-256 of every file above, written last
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spatial_forcing.errors import CheckpointError
from spatial_forcing.students.base import POLICY

FORMAT = 1
MANIFEST, STATE, OPTIMIZER, PROJECTOR = "manifest.json", "state.json", "optimizer.pt", "projector.safetensors"
_NAME = re.compile(r"step-\d{9}")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk: optimizer steps done, and its directory."""

    step: int
    folder: Path

    @property
    def policy(self) -> Path:
        """Folder of the student, for `load_student`."""
        return self.folder / POLICY


@dataclass(frozen=True)
class TrainState:
    """What the loop needs besides tensors.

    Attributes:
        step: optimizer steps done; also the data position, as batches depend on seed and step alone.
        processes: number of processes; a resumed run must have as many.
        seconds: wall-clock time so far.
        config: the run's plain configuration.
        rows: metrics of the steps since the last line of metrics.jsonl.
    """

    step: int
    processes: int
    seconds: float
    config: dict[str, Any]
    rows: list[dict[str, float]]


def checkpoint_name(step: int) -> str:
    """`step-000000100` for 100 steps done; names sort as steps do."""
    return f"step-{step:09d}"


def partial_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before `commit` renames it."""
    return root / f".{checkpoint_name(step)}.partial"


def begin(root: Path, step: int) -> Path:
    """An empty partial folder; leftovers of killed runs are removed."""
    for leftover in root.glob(".step-*.partial"):
        shutil.rmtree(leftover)
    folder = partial_folder(root, step)
    folder.mkdir(parents=True)
    return folder


def commit(root: Path, step: int) -> Checkpoint:
    """Seal the partial folder with its manifest and rename it."""
    folder, final = partial_folder(root, step), root / checkpoint_name(step)
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in _files(folder)
    }
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1), encoding="utf-8")
    for path in [*_files(folder), folder]:
        _flush(path)
    if final.exists():  # the same step of the same run, left damaged by something else than this code
        shutil.rmtree(final)
    os.replace(folder, final)
    _flush(root)
    return Checkpoint(step, final)


def latest_checkpoint(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint below `root`, and what is wrong with every newer, damaged one.

    A damaged one (files missing, of another size or content) is never used; the one before it is.
    """
    faults: list[str] = []
    for folder in reversed(checkpoint_folders(root)):
        fault = damage(folder)
        if fault is None:
            return Checkpoint(int(folder.name.removeprefix("step-")), folder), faults
        faults.append(f"checkpoint {folder} is damaged and cannot be used: {fault}.")
    return None, faults


def set_aside_newer(root: Path, step: int) -> None:
    """Rename the checkpoints after `step` (all damaged), so that they neither count nor are lost."""
    for folder in checkpoint_folders(root):
        if int(folder.name.removeprefix("step-")) > step:
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)


def checkpoint_folders(root: Path) -> list[Path]:
    """Folders below `root` that are named like checkpoints, oldest first."""
    return sorted(folder for folder in root.glob("step-*") if _NAME.fullmatch(folder.name))


def damage(folder: Path, *, contents: bool = True) -> str | None:
    """A sentence on what is wrong with the checkpoint in `folder`, or None.

    Args:
        folder: of the checkpoint.
        contents: read every byte and compare checksums; False compares the files' sizes alone.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        kind, files = manifest["format"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or unreadable"
    if kind != FORMAT:
        return f"its format is {kind}, this version reads {FORMAT}"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
        if contents and _sha256(path) != entry["sha256"]:
            return f"{name} does not have the content that was written"
    return None


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; only names are looked at."""
    for folder in checkpoint_folders(root)[:-keep]:
        # Renamed first, so that a kill in between leaves a leftover and no half checkpoint.
        doomed = folder.with_name(f".{folder.name}.partial")
        os.replace(folder, doomed)
        shutil.rmtree(doomed)


def write_state(folder: Path, state: TrainState) -> None:
    """Write state.json."""
    (folder / STATE).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")


def read_state(folder: Path) -> TrainState:
    """Read state.json. Raises `CheckpointError` when it is not one."""
    try:
        return TrainState(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder / STATE} cannot be read ({error}); remove that checkpoint."
        ) from error


def save_tensors(path: Path, content: Any) -> None:
    """Write plain containers of tensors and numbers. Raises `OSError` when the disk is full."""
    try:
        torch.save(content, path)
    except RuntimeError as error:  # torch's own stream writer
        raise OSError(str(error)) from error


def load_tensors(path: Path) -> Any:
    """Read what `save_tensors` wrote, on the CPU and without running code from the file.

    Raises:
        CheckpointError: the file is missing or unreadable.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove that checkpoint.") from error


def rng_state() -> dict[str, Any]:
    """The states of this process's random streams: Python, NumPy, torch, GPUs."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put this process's random streams where `rng_state` found them."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have the system write a file or directory entry to the disk: a power cut must not undo the rename."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
