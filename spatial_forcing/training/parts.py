"""From a configuration to the parts of a run: student, teacher, batches."""

from __future__ import annotations

import math
import zlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from accelerate import PartialState
from torch import nn

from spatial_forcing.data import Dataset
from spatial_forcing.data.info import parse_keys
from spatial_forcing.data.loader import BatchLoader
from spatial_forcing.errors import ConfigError
from spatial_forcing.protocols import Batch, Teacher
from spatial_forcing.students import STUDENTS, LoraStudent
from spatial_forcing.students.base import StudentConfig, StudentModule
from spatial_forcing.teachers import load_teacher
from spatial_forcing.teachers.cache import CachedTeacher
from spatial_forcing.teachers.cache.source import dataset_source
from spatial_forcing.teachers.controls import SHUFFLED, FutureTeacher, ShuffledTeacher
from spatial_forcing.teachers.recorded import reads_depth
from spatial_forcing.training.config import TeacherSource, TrainConfig


class Batches(Protocol):
    """Micro-batches by number; the same number always gives the same batch, whoever asks and when."""

    def batch(self, step: int) -> Batch:
        """This process's part of micro-batch `step`, counted from 0 over the whole run."""
        ...

    def iterate(self, start: int, stop: int) -> Generator[Batch]:
        """Micro-batches `start` to `stop` - 1, possibly read ahead; closing it ends the reading."""
        ...


@dataclass(frozen=True)
class Parts:
    """What a run trains with. `student` is an `nn.Module` and a `protocols.Student`; several teachers have
    labels.
    """

    student: nn.Module
    teacher: Teacher | Mapping[str, Teacher] | None
    batches: Batches


def student_class(config: StudentConfig) -> type[StudentModule]:
    """The class that a student's configuration belongs to."""
    return next(family for family in STUDENTS.values() if family.config_class is type(config))


def build_parts(config: TrainConfig) -> Parts:
    """Open the dataset, make or load the student, load the teacher or open its cache.

    Two configurations that differ in nothing but `forcing`, `teacher` and `cache` get bit-identical initial
    students and batches.

    Raises:
        ConfigError, DataError, CheckpointError: as the parts do.
    """
    dataset = open_dataset(config)
    student = make_student(config, dataset)
    teacher = make_teacher(config, dataset)
    return Parts(student, teacher, make_batches(config, student, dataset))


class DatasetSettings(Protocol):
    """The settings of a run or a comparison that say what it reads."""

    @property
    def dataset(self) -> Path:
        """Folder."""
        ...

    @property
    def keys(self) -> tuple[str, ...]:
        """`NAME=FEATURE` each."""
        ...

    @property
    def store(self) -> Path | None:
        """Folder of the decoded frames."""
        ...


def open_dataset(config: DatasetSettings) -> Dataset:
    """The dataset of a configuration, under this package's names."""
    return Dataset.open(config.dataset, keys=parse_keys(config.keys), store=config.store)


def make_student(config: TrainConfig, dataset: Dataset) -> StudentModule:
    """The student at step 0: new with weights from `config.seed`, or the one in `config.init_from`.

    It normalises by the statistics of the episodes that it is trained on. With `config.lora` it is a
    `LoraStudent`, whose adapters are drawn from `config.seed`.

    Raises:
        DataError: a state or action of these episodes is not finite.
    """
    stats = dataset.statistics(select_episodes(dataset, config))
    family = student_class(config.student)
    if config.init_from is None:
        student = family.create(config.student, stats, seed=config.seed)
    else:
        loaded = family.fine_tune(config.init_from, config.student, stats, seed=config.seed)
        assert isinstance(loaded, StudentModule)
        student = loaded
    if config.lora.rank:
        assert config.base is not None
        return LoraStudent(student, config.lora, base=config.base, seed=config.seed)
    return student


def make_teacher(config: TrainConfig, dataset: Dataset) -> Teacher | Mapping[str, Teacher] | None:
    """The teacher or its cache, several of them by label, or None where alpha is 0.

    Raises:
        ConfigError: the cache is another teacher's than the configuration names, or incomplete.
        DataError: the cache is another dataset's, or episodes have changed since it was built.
    """
    made = {source.label: _make_one(config, source, dataset) for source in config.sources}
    return made[""] if set(made) == {""} else made or None


def _make_one(config: TrainConfig, source: TeacherSource, dataset: Dataset) -> Teacher:
    if source.cache is None:
        assert source.teacher is not None
        if config.future:
            raise ConfigError(
                f"future is {config.future} frames: later features come from a cache alone; build one with "
                "`spatial-forcing cache build` and name it in `cache`."
            )
        return load_teacher(source.teacher, dataset=dataset)
    cached = open_cache(config, source.cache, source.teacher, dataset)
    if config.future:
        return FutureTeacher(cached, config.future)
    return ShuffledTeacher(cached) if (source.teacher or "").startswith(SHUFFLED) else cached


def open_cache(config: TrainConfig, folder: Path, named: str | None, dataset: Dataset) -> CachedTeacher:
    """The cached teacher, checked against its name, configuration and dataset; see `make_teacher`."""
    cached = CachedTeacher(folder)
    if named is not None and named.removeprefix(SHUFFLED) != cached.name:
        raise ConfigError(
            f"cache {folder} holds features of {cached.name!r}, and teacher is {named!r}; "
            "build that teacher's cache, or name the cached one."
        )
    index = np.concatenate(
        [np.arange(e.start, e.stop) for e in (dataset.episodes[n] for n in select_episodes(dataset, config))]
    )
    if not (held := cached.holds(index)).all():
        raise ConfigError(
            f"cache {folder} holds {int(held.sum())} of the {len(index)} frames of {config.dataset} that the "
            "run is trained on; run `spatial-forcing cache build` again, it adds what is missing."
        )
    if not PartialState(cpu=config.cpu).is_main_process:
        return cached
    # Rows are found by frame number alone; only the hashes of its images tell one dataset from another.
    # Hashing is a pass over the dataset's files, so one process does it for all.
    return CachedTeacher(folder, source=dataset_source(dataset, cached.cameras))


def make_batches(config: TrainConfig, student: StudentModule, dataset: Dataset) -> BatchLoader:
    """The batches of this process.

    Raises:
        ConfigError: the batch size cannot be divided among micro-batches and processes.
    """
    process = PartialState(cpu=config.cpu)
    parts = config.gradient_accumulation * process.num_processes
    if config.batch_size % parts:
        raise ConfigError(
            f"batch_size {config.batch_size} is not divisible by gradient_accumulation "
            f"({config.gradient_accumulation}) x processes ({process.num_processes}); "
            f"choose a multiple of {parts}."
        )
    shape = student.spec
    sizes = {dataset.info.frame_size(camera) for camera in shape.cameras}
    # Square frames of one size need no letterbox: the student resizes them itself, just as when it acts.
    framed_alike = len(sizes) == 1 and all(height == width for height, width in sizes)
    untouched = framed_alike and config.augment is None
    # Cached features and recorded depth belong to the stored frames; other teachers see the student's.
    stored = any(each.cache is not None or reads_depth(each.teacher or "") for each in config.sources)
    return BatchLoader(
        dataset,
        cameras=shape.cameras,
        chunk=shape.chunk,
        batch_size=config.batch_size // config.gradient_accumulation,
        seed=config.seed,
        image_size=None if untouched or shape.letterboxes else shape.image_size,
        episodes=select_episodes(dataset, config),
        augment=config.augment,
        keep_frames=stored and not untouched,
        rank=process.process_index,
        world_size=process.num_processes,
    )


def select_episodes(dataset: Dataset, config: TrainConfig) -> list[int]:
    """Episodes to train on: of each task the same `fraction` (rounded up), and smaller sets are nested.

    The choice depends on neither the seed nor the order of tasks, so that arms and seeds share it.

    Raises:
        ConfigError: an episode or a split that the dataset does not have.
    """
    wanted: Sequence[int] = range(len(dataset.episodes)) if config.episodes is None else config.episodes
    if config.split is not None:
        part = dataset.info.split(config.split)
        wanted = [number for number in wanted if number in part]
    missing = [number for number in wanted if not 0 <= number < len(dataset.episodes)]
    if missing:
        raise ConfigError(
            f"episodes {missing} are not in {config.dataset}, which has {len(dataset.episodes)}; "
            "drop them from `episodes`."
        )
    orders = _shuffled_by_task(dataset, wanted)
    return sorted(n for numbers in orders for n in numbers[: share_of(config.fraction, len(numbers))])


def hold_out(dataset: Dataset, share: float) -> tuple[list[int], list[int]]:
    """Episodes to train on and episodes that are kept from it: of each task the same `share`, rounded up.

    As in `select_episodes` the choice depends on the dataset alone.

    Raises:
        ConfigError: a task with one episode, or one that would have none left to train on.
    """
    kept: list[int] = []
    held: list[int] = []
    for numbers in _shuffled_by_task(dataset, range(len(dataset.episodes))):
        count = share_of(share, len(numbers))
        if count >= len(numbers):
            raise ConfigError(
                f"{share:g} of the {len(numbers)} episodes of {dataset.episodes[numbers[0]].task!r} are to "
                f"be held out, which leaves none to train on; record more of them, or hold out less."
            )
        held += numbers[len(numbers) - count :]
        kept += numbers[: len(numbers) - count]
    return sorted(kept), sorted(held)


def share_of(fraction: float, count: int) -> int:
    """How many of `count` a part in (0, 1] is: rounded up, at least one, and 0.28 of 50 is 14.

    Floating point has 14.000000000000002 there, which plainly rounded up would be 15.
    """
    return max(1, math.ceil(round(fraction * count, 6)))


def _shuffled_by_task(dataset: Dataset, wanted: Iterable[int]) -> list[list[int]]:
    """The episodes `wanted`, task by task, in an order that only their number and the task decide."""
    by_task: dict[str, list[int]] = {}
    for number in wanted:
        by_task.setdefault(dataset.episodes[number].task, []).append(number)
    return [
        [numbers[i] for i in np.random.default_rng(zlib.crc32(task.encode())).permutation(len(numbers))]
        for task, numbers in by_task.items()
    ]
