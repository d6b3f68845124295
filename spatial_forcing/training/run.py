"""The run directory: everything needed to repeat a run, and to go on with it.

config.json        the full configuration
environment.json   Python, packages, machine, command line, git state (git.diff: uncommitted changes)
metrics.jsonl      one line every `log_every` steps
tensorboard/       the same as curves
checkpoints/       step-000001000/ ..., see `checkpoint`
policy/            the exported policy, once the run is finished
result.json        `RunResult`
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spatial_forcing.errors import ConfigError
from spatial_forcing.storage import write_json
from spatial_forcing.students.base import POLICY
from spatial_forcing.students.card import write_card
from spatial_forcing.training.config import TrainConfig, changed_settings

PACKAGES = (
    "spatial-forcing", "torch", "transformers", "accelerate", "peft", "safetensors", "numpy", "pyarrow", "av",
    "gymnasium", "metaworld", "mujoco",
)  # fmt: skip
CONFIG, ENVIRONMENT, METRICS, RESULT = "config.json", "environment.json", "metrics.jsonl", "result.json"
CHECKPOINTS, DIFF = "checkpoints", "git.diff"


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves.

    Attributes:
        folder: the run directory.
        steps: optimizer steps done.
        metrics: the last line of metrics.jsonl.
        seconds: wall-clock time in the training loop, all resumptions together, callbacks left out.
        peak_memory: bytes of this process's largest resident set (GPU: of its largest allocation).
    """

    folder: Path
    steps: int
    metrics: dict[str, float]
    seconds: float
    peak_memory: int

    @property
    def policy(self) -> Path:
        """Folder of the exported policy: no teacher, no projector."""
        return self.folder / POLICY


def open_run(config: TrainConfig, writes: bool = True) -> None:
    """Check that `config.output` is new or holds this very run; the main process also records it there.

    A start that failed before its first step is no run: the corrected configuration takes its place.

    Raises:
        ConfigError: the folder holds a run with another configuration; names what differs.
    """
    path = config.output / CONFIG
    if path.exists() and _begun(config.output):
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON ({error}); choose another output.") from error
        refuse_changes(held, config, config.output)
    if writes:
        write_json(config.output / ENVIRONMENT, environment(config.output / DIFF))
        write_json(path, config.to_file())


def _begun(folder: Path) -> bool:
    """Whether a run directory holds more than its configuration."""
    checkpoints = (folder / CHECKPOINTS).glob("step-*")
    metrics = folder / METRICS
    return any(checkpoints) or (folder / RESULT).exists() or (metrics.exists() and metrics.stat().st_size > 0)


def refuse_changes(held: Mapping[str, Any], config: TrainConfig, place: Path) -> None:
    """Raise `ConfigError` when a run of configuration `held` cannot go on as `config`."""
    changed = changed_settings(held, config)
    if changed:
        listed = "; ".join(
            f"{name}: {old!r} there, {now!r} asked for" for name, (old, now) in changed.items()
        )
        raise ConfigError(
            f"{place} holds a run with another configuration ({listed}). "
            "Choose another output, or go back to these settings to resume"
            + (
                "; --extend goes on with more steps."
                if "steps" in changed
                and set(changed) <= {"steps", "optim.warmup_steps"}
                and changed["steps"][0] < changed["steps"][1]
                else "."
            )
        )


def environment(diff: Path | None = None) -> dict[str, Any]:
    """Versions, machine, command line and git state; uncommitted changes are written to `diff`."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "command": sys.argv,
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git_state(diff),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of git in the package's own checkout; None outside one, or without git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _git_state(diff: Path | None) -> dict[str, Any] | None:
    commit = _git("rev-parse", "HEAD")
    # An installed package may lie inside somebody else's repository, whose state says nothing about it.
    if commit is None or _git("ls-files", "--error-unmatch", __file__) is None:
        return None
    changes = _git("diff", "HEAD") or ""
    if diff is not None and changes:
        diff.write_text(changes, encoding="utf-8")
    return {"commit": commit.strip(), "uncommitted_changes": bool(changes)}


def peak_memory() -> int:
    """Bytes: the largest resident set of this process so far, or the largest GPU allocation."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_result(result: RunResult) -> None:
    """Write result.json, the mark of a finished run."""
    content = {name: getattr(result, name) for name in ("steps", "metrics", "seconds", "peak_memory")}
    write_json(result.folder / RESULT, content)


def read_result(folder: Path) -> RunResult | None:
    """The result of a finished run, or None."""
    path = folder / RESULT
    return RunResult(folder, **json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def export_policy(student: Any, folder: Path, card: dict[str, Any] | None) -> None:
    """Write the bare student and its model card into `folder`; what was there is replaced at once."""
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    student.save_pretrained(beside)
    if card is not None:
        write_card(beside, card)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)
