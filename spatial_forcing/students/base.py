"""What every student shares: the registry, `load_student`, and the files of a checkpoint.

A new student is one module that holds a `StudentModule` and one `STUDENTS.add(model_type, cls)`
line; `students/__init__.py` imports it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from spatial_forcing.errors import CheckpointError
from spatial_forcing.protocols import Student
from spatial_forcing.registry import Registry
from spatial_forcing.storage import replace_file, write_json
from spatial_forcing.students.normalize import Stats

__all__ = [
    "STUDENTS",
    "ManyStatistics",
    "Student",
    "StudentConfig",
    "StudentModule",
    "StudentSpec",
    "evaluating",
    "load_student",
    "load_weights",
    "read_config",
    "save_checkpoint",
    "statistics_names",
]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
POLICY = "policy"
"""Folder of the policy in that of a finished training run, and in a checkpoint."""

OTHERS = "spatial_forcing.students"
"""Group of entry points by which other distributions load their own checkpoints: the name is a key that the
`config.json` of such a checkpoint has, the object a function from its folder to a student."""

STUDENTS: Registry[type[StudentModule]] = Registry("student")
"""Student classes by the `model_type` of their `config.json`."""


class StudentConfig:
    """Base of the students' configurations, which are frozen dataclasses.

    `TrainConfig.student` takes any of them. A saved one is recognised by the names of its settings, which no
    two students may share in full.
    """

    cameras: tuple[str, ...]
    chunk: int
    # Fields, or computed from others. A property that exists would be the default of a field of its name.
    if TYPE_CHECKING:

        @property
        def image_size(self) -> int:
            """Pixels on a side of a view as the model sees it."""
            ...

        @property
        def depth(self) -> int:
            """Number of decoder blocks that can be aligned."""
            ...

    pretrained: str | None = None
    """Published weights (a folder or hub id) that a new student starts from."""


@dataclass(frozen=True)
class StudentSpec:
    """What a student of this package takes and gives, and how it is adapted; declared in one place.

    Attributes:
        cameras: ordered names.
        image_size: pixels on a side of a view as the model sees it.
        state_dim, action_dim, chunk: numbers of a state and an action, and actions a prediction.
        letterboxes: it takes images as recorded, of any size and shape, and knows which of its tokens are
            padding; else the loader fits them.
        continues_chunks: `act` takes `overlaps` (real-time chunking).
        lora_full: parameters that LoRA training learns in full (see `lora.LoraSettings`).
        lora_exclude: patterns of linear layers that get no adapters.
    """

    cameras: tuple[str, ...]
    image_size: int
    state_dim: int
    action_dim: int
    chunk: int
    letterboxes: bool = False
    continues_chunks: bool = False
    lora_full: tuple[str, ...] = ()
    lora_exclude: tuple[str, ...] = ()


class StudentModule(nn.Module, Student):
    """Base of the students of this package: `protocols.Student`, and what training and serving ask of one.

    `config_class` is the configuration that makes a new one (`create`); None where another class's does.
    """

    config_class: ClassVar[type | None] = None
    config: Any

    @property
    @abstractmethod
    def spec(self) -> StudentSpec:
        """What it takes and gives."""
        ...

    @property
    def cameras(self) -> tuple[str, ...] | None:
        """Names of the cameras, in order."""
        return self.spec.cameras

    @classmethod
    def create(cls, config: Any, stats: Stats, *, seed: int = 0) -> Self:
        """A new student with weights from `seed` that normalises with `stats`.

        Raises:
            DataError: `observation.state` or `action` statistics are missing or of another size.
        """
        raise NotImplementedError

    @classmethod
    def fine_tune(cls, place: str | Path, config: Any, stats: Stats, *, seed: int = 0) -> Student:
        """The student to fine-tune in `place`; the default takes it as it was saved."""
        return load_student(place)

    @classmethod
    def from_base(cls, place: str | Path, settings: Mapping[str, Any]) -> Self:
        """The student that adapters were trained on, of these settings, in `place`.

        Raises:
            CheckpointError: it is not there, or has other settings.
        """
        student = cls.from_pretrained(place)
        there, asked = (json.loads(json.dumps(dict(each))) for each in (asdict(student.config), settings))
        if there != asked:
            raise CheckpointError(f"the base {place} has settings {there}; it was trained with {asked}.")
        return student

    def restore(self, folder: str | Path) -> None:
        """Load what `save_pretrained(folder)` wrote into this student, in place."""
        self.load_state_dict(type(self).from_pretrained(folder).state_dict())

    @property
    def checkpoint_bytes(self) -> int:
        """Size of what `save_pretrained` writes."""
        return sum(value.numel() * value.element_size() for value in self.state_dict().values())

    def activation_bytes(self, samples: int) -> int | None:
        """What a training forward of `samples` samples keeps for backward, estimated; None: not known."""
        return None


class ManyStatistics(ABC):
    """A student class whose checkpoints may hold the normalisation statistics of several datasets."""

    @classmethod
    @abstractmethod
    def statistics_names(cls, folder: str | Path) -> tuple[str, ...]:
        """The datasets whose statistics the checkpoint in `folder` holds."""
        ...

    @classmethod
    @abstractmethod
    def with_statistics(cls, folder: str | Path, statistics: str) -> Student:
        """`from_pretrained` with the statistics of that dataset.

        Raises:
            CheckpointError: the checkpoint has none of that name; lists those that it has.
        """
        ...


def statistics_names(folder: str | Path) -> tuple[str, ...]:
    """The datasets whose statistics a checkpoint offers to choose from; empty where there is no choice."""
    stored = read_json(folder)
    if "model_type" not in stored and (Path(folder) / POLICY / CONFIG_FILE).exists():
        return statistics_names(Path(folder) / POLICY)
    if stored.get("model_type") not in STUDENTS:
        return ()
    family = STUDENTS[stored["model_type"]]
    return family.statistics_names(folder) if issubclass(family, ManyStatistics) else ()


def load_student(folder: str | Path, *, statistics: str | None = None) -> Student:
    """The student saved in `folder`, whichever registered class it is, or whose plugin knows it.

    Args:
        folder: what `save_pretrained` wrote; the folder of a finished training run stands for its policy.
        statistics: the dataset whose statistics are used, where the checkpoint holds those of several.

    Raises:
        CheckpointError: no readable `config.json`, its model type is not a registered student, it is a
            LeRobot policy and the plugin is not installed, or it has no statistics to choose from.
    """
    stored = read_json(folder)
    if "model_type" not in stored:
        if (Path(folder) / POLICY / CONFIG_FILE).exists():
            return load_student(Path(folder) / POLICY, statistics=statistics)
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
    family = STUDENTS[kind]
    if statistics is None:
        return family.from_pretrained(folder)
    if not issubclass(family, ManyStatistics):
        raise CheckpointError(
            f"statistics {statistics!r}: the {kind!r} policy in {folder} holds its own only; leave it out."
        )
    return family.with_statistics(folder, statistics)


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
        CheckpointError: the file is missing or does not hold a JSON object.
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
        CheckpointError: the file is missing or damaged, or keys are missing, unexpected or of another shape.
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
        "unexpected": sorted(stored.keys() - own.keys()),
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
