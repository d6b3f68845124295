"""What every student shares: the registry, `load_student`, and the files of a checkpoint.

A new student is one module that implements `protocols.Student` and one `STUDENTS.add(model_type, cls)`
line; `students/__init__.py` imports it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from spatial_forcing.errors import CheckpointError
from spatial_forcing.protocols import Student
from spatial_forcing.registry import Registry
from spatial_forcing.storage import replace_file, write_json

__all__ = [
    "STUDENTS",
    "Student",
    "evaluating",
    "load_student",
    "load_weights",
    "read_config",
    "restore_student",
    "save_checkpoint",
]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
POLICY = "policy"
"""Folder of the policy in that of a finished training run, and in a checkpoint."""

OTHERS = "spatial_forcing.students"
"""Group of entry points by which other distributions load their own checkpoints: the name is a key that the
`config.json` of such a checkpoint has, the object a function from its folder to a student."""

STUDENTS: Registry[type[Student]] = Registry("student")
"""Student classes by the `model_type` of their `config.json`."""


def load_student(folder: str | Path) -> Student:
    """The student saved in `folder`, whichever registered class it is, or whose plugin knows it.

    The folder of a finished training run stands for its policy.

    Raises:
        CheckpointError: no readable `config.json`, its model type is not a registered student, or it is a
            LeRobot policy and the plugin is not installed.
    """
    stored = read_json(folder)
    if "model_type" not in stored:
        if (Path(folder) / POLICY / CONFIG_FILE).exists():
            return load_student(Path(folder) / POLICY)
        for point in entry_points(group=OTHERS):
            if point.name in stored:
                student: Student = point.load()(Path(folder))
                return student
        if "type" in stored:
            raise CheckpointError(
                f"{folder} holds LeRobot's policy {stored['type']!r}; install the plugin "
                "`lerobot_policy_spatial_forcing` (docs/lerobot.md) to read it."
            )
    kind = read_config(folder)["model_type"]
    if kind not in STUDENTS:
        raise CheckpointError(
            f"{Path(folder) / CONFIG_FILE} describes a {kind!r} model, which is not a student of this "
            f"package; it knows {', '.join(sorted(STUDENTS))}."
        )
    return STUDENTS[kind].from_pretrained(folder)


def restore_student(student: Any, folder: str | Path) -> None:
    """Load what `student.save_pretrained(folder)` wrote into `student`, in place.

    A student whose checkpoint does not hold all of its weights (adapters) does it by its own `restore`.
    """
    if hasattr(student, "restore"):
        student.restore(folder)
    else:
        student.load_state_dict(type(student).from_pretrained(folder).state_dict())


def read_config(folder: str | Path, expected: str | None = None) -> dict[str, Any]:
    """The content of `config.json`, with `model_type` checked against `expected` when that is given.

    Raises:
        CheckpointError: the file is missing or malformed, or describes another architecture.
    """
    path = Path(folder) / CONFIG_FILE
    config = read_json(folder)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path} names no model_type; it is not the configuration of a student.")
    if expected is not None and config["model_type"] != expected:
        raise CheckpointError(
            f"{path} describes a {config['model_type']!r} model, not {expected!r}; "
            "use `load_student`, which picks the class, or give another folder."
        )
    return config


def read_json(folder: str | Path) -> dict[str, Any]:
    """The content of `config.json`, whatever it configures.

    Raises:
        CheckpointError: the file is missing or holds no JSON object.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist; give the folder that `save_pretrained` wrote."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); save the student again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} names no model_type; it is not the configuration of a student.")
    return config


def save_checkpoint(module: nn.Module, config: Mapping[str, Any], folder: str | Path) -> None:
    """Write `model.safetensors`, then `config.json`; each is written beside and renamed.

    `config` must hold `model_type`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().contiguous().cpu() for name, value in module.state_dict().items()}
    replace_file(folder / WEIGHTS_FILE, lambda path: save_file(weights, path, metadata={"format": "pt"}))
    write_json(folder / CONFIG_FILE, dict(config))


def load_weights(module: nn.Module, folder: str | Path) -> None:
    """Load `model.safetensors` of `folder` into `module`; keys and shapes must agree exactly.

    Raises:
        CheckpointError: the file is missing or damaged, or keys are missing, surplus or of another shape.
    """
    path = Path(folder) / WEIGHTS_FILE
    try:
        stored = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; the checkpoint is incomplete.") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}); copy it again.") from error
    own = module.state_dict()
    reshaped = [
        f"{key}: {tuple(stored[key].shape)} stored, {tuple(own[key].shape)} expected"
        for key in sorted(own.keys() & stored.keys())
        if stored[key].shape != own[key].shape
    ]
    faults = {
        "missing": sorted(own.keys() - stored.keys()),
        "surplus": sorted(stored.keys() - own.keys()),
        "of another shape": reshaped,
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(keys)} {kind}: {', '.join(keys)}" for kind, keys in faults.items() if keys)
        raise CheckpointError(f"{path} does not fit {type(module).__name__} ({listed}).")
    module.load_state_dict(stored)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every part is as it was."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
