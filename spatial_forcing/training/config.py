"""The configuration of one training run. Cheap checks when it is made, the rest before anything heavy."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from spatial_forcing.data.augment import Augment
from spatial_forcing.data.info import parse_keys
from spatial_forcing.errors import ConfigError
from spatial_forcing.forcing import ForcingConfig
from spatial_forcing.forcing.config import pair_labels
from spatial_forcing.registry import did_you_mean
from spatial_forcing.students import LoraSettings, StudentConfig
from spatial_forcing.students.openvla_oft.files import is_hub_id
from spatial_forcing.training.fields import (
    HUB,
    differences,
    from_file,
    from_plain,
    located,
    to_file,
    to_plain,
)
from spatial_forcing.training.optim import OptimConfig

logger = logging.getLogger(__name__)

TRACKERS = ("tensorboard", "wandb", "trackio")

NEUTRAL = frozenset(
    {
        "output",
        "store",
        "extend",
        "save_every",
        "keep",
        "callback_every",
        "log_every",
        "audit_every",
        "trackers",
        "progress",
        "prefetch",
    }
)
"""Settings that do not change what is learned, so a resumed run may change them."""


@dataclass(frozen=True)
class TeacherSource:
    """One teacher of a run.

    Attributes:
        label: among several; empty for one alone.
        teacher: its name, or None: whichever the cache is of.
        cache: folder of its features, or None: it runs live.
    """

    label: str
    teacher: str | None
    cache: Path | None


@dataclass(frozen=True)
class TrainConfig:
    """One training run, complete enough to repeat it.

    Attributes:
        dataset: folder of a LeRobot v3.0 dataset.
        keys: `NAME=FEATURE` where the dataset calls a feature otherwise than this package, e.g.
            `action=actions`; `observation.state=arm+gripper` joins vectors.
        store: folder of the decoded frames; None: beside the dataset, or in the user's cache folder where the
            dataset's cannot be written.
        output: run directory; it is resumed when it holds a checkpoint of the same configuration.
        student: configuration of a new student (architecture, cameras, chunk, image size).
        init_from: folder (or, for OpenVLA-OFT, hub id) of a saved student to fine-tune instead of a new one.
            The nano student and pi0 keep their own configuration; OpenVLA-OFT gets `student`'s heads and
            conventions, and the sizes must agree.
        lora: adapters on the student of `init_from` (or on `student.pretrained`), which is then frozen but
            for them; rank 0: none.
        forcing: the alignment loss; alpha 0 is the matched control.
        teacher: name of the teacher to run live, or whose cache must be used; `shuffled:` before the latter
            trains the control in which every frame has another's features.
        cache: folder of its cached features; then no teacher runs in training.
        teachers: several teachers at once, by a label of your choice: `--teachers geometry
            depth-anything/DA3-BASE semantics facebook/dinov2-base`. Each has its own projector;
            `forcing.teachers` and `forcing.weights` say which pair is whose, and what it weighs.
        caches: folders of their cached features, by the same labels.
        future: frames by which the target is later than the images, from a cache (see
            `teachers.controls.FutureTeacher`); 0: the target is of the same frame.
        steps: optimizer steps.
        extend: go on with a run of fewer `steps`; the schedule is restated for the new number.
        batch_size: samples an optimizer step, over all processes and micro-batches, so that a configuration
            means the same on any number of processes.
        gradient_accumulation: micro-batches that a step's samples are divided into.
        optim: AdamW, schedule, clipping.
        seed: of the new student's weights, the batches, the augmentation and the noise.
        fraction: part of each task's demonstrations that is used, in (0, 1]; smaller sets are nested.
        episodes: these episodes only (before `fraction`); None: all.
        split: the episodes of this part of the dataset only (`splits` in its meta/info.json).
        augment: random crops and colours; None: none.
        mixed_precision: "bf16" autocasts the forward pass.
        shard: split parameters, gradients and moments over all processes (FSDP2) instead of holding all of
            them in each; for students that are too large to be trained in full on one GPU.
        save_every: steps between checkpoints (the last step always saves); None: about ten in a run.
        keep: complete checkpoints that stay, newest first.
        callback_every: steps between calls of `on_checkpoint`, a multiple of `save_every`; the last
            checkpoint always calls. None: every checkpoint.
        log_every: steps over which a line of metrics.jsonl averages.
        audit_every: steps between gradient audits (`forcing.audit`), a multiple of `log_every`: cosine and
            norm ratio of the two losses' gradients, by block, as `audit/...` in metrics.jsonl. None: never.
        trackers: of tensorboard, wandb, trackio; None: tensorboard where it is installed.
        progress: show a progress bar.
        prefetch: read batches ahead in a thread.
        cpu: stay on the CPU even where a GPU is present.
    """

    dataset: Path
    output: Path
    # The preset chooses the class; its settings are options like all others.
    student: StudentConfig
    init_from: Path | None = field(default=None, metadata={HUB: True})
    lora: LoraSettings = field(default_factory=LoraSettings)
    forcing: ForcingConfig = field(default_factory=ForcingConfig)
    teacher: str | None = None
    cache: Path | None = None
    teachers: Mapping[str, str] = field(default_factory=dict)
    caches: Mapping[str, Path] = field(default_factory=dict)
    future: int = 0
    keys: tuple[str, ...] = ()
    store: Path | None = None
    steps: int = 1000
    extend: bool = False
    batch_size: int = 32
    gradient_accumulation: int = 1
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 0
    fraction: float = 1.0
    episodes: tuple[int, ...] | None = None
    split: str | None = None
    augment: Augment | None = None
    mixed_precision: Literal["no", "bf16"] = "no"
    shard: bool = False
    save_every: int | None = None
    keep: int = 2
    callback_every: int | None = None
    log_every: int = 10
    audit_every: int | None = None
    trackers: tuple[str, ...] | None = None
    progress: bool = True
    prefetch: bool = True
    cpu: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "keep", "log_every"):
            self._check(getattr(self, name) >= 1, name, "at least 1")
        self._check(self.seed >= 0, "seed", "0 or more")
        self._check(0 < self.fraction <= 1, "fraction", "a number in (0, 1]")
        self._check(self.save_every is None or self.save_every >= 1, "save_every", "at least 1, or none")
        self._check(self.mixed_precision in ("no", "bf16"), "mixed_precision", "'no' or 'bf16'")
        self._check(self.episodes is None or len(self.episodes) > 0, "episodes", "at least one, or none")
        every = self.callback_every
        good = every is None or (every >= 1 and every % self.checkpoint_interval == 0)
        self._check(good, "callback_every", f"a multiple of save_every ({self.checkpoint_interval})")
        audit = self.audit_every
        good = audit is None or (audit >= 1 and audit % self.log_every == 0)
        self._check(good, "audit_every", f"a multiple of log_every ({self.log_every}), or none")
        self._check(
            not (self.shard and audit), "audit_every", "none with shard: an audit needs whole gradients"
        )
        self._check_trackers()
        if self.batch_size % self.gradient_accumulation:
            raise ConfigError(
                f"batch_size is {self.batch_size} and gradient_accumulation {self.gradient_accumulation}; "
                "a step's samples must divide evenly among its micro-batches."
            )
        parse_keys(self.keys)
        if self.optim.warmup_steps >= self.steps:
            shorter = self.steps // 4
            logger.warning(
                "optim.warmup_steps is %d and steps is %d: the warm-up is shortened to %d steps.",
                self.optim.warmup_steps,
                self.steps,
                shorter,
            )
            object.__setattr__(self, "optim", replace(self.optim, warmup_steps=shorter))
        if self.lora.rank and self.base is None:
            raise ConfigError(
                f"lora.rank is {self.lora.rank} and init_from is none: adapters on frozen random weights "
                "learn nothing useful. Name the student to fine-tune, or set lora.rank to 0."
            )
        self._check(self.future >= 0, "future", "0 or more frames")
        if self.forces:
            self._check_sources()

    def _check_sources(self) -> None:
        named = [source.teacher or "" for source in self.sources]
        if self.future and any(name.startswith("shuffled:") for name in named):
            raise ConfigError("future and a shuffled teacher exclude each other; leave one out.")
        if not named:
            raise ConfigError(
                f"forcing.alpha is {self.forcing.alpha} and there is neither a teacher nor a cache; "
                "name one, or set forcing.alpha to 0 to train without spatial forcing."
            )
        if (self.teachers or self.caches) and (self.teacher or self.cache):
            raise ConfigError(
                f"teacher is {self.teacher}, cache is {self.cache}, and teachers or caches name "
                f"{', '.join(source.label for source in self.sources)}; put all of them into teachers and "
                "caches, and set teacher and cache to none (on the command line --teacher None)."
            )

        pair_labels(self.forcing, tuple(source.label for source in self.sources))

    def _check(self, good: bool, name: str, wanted: str) -> None:
        if not good:
            raise ConfigError(f"{name} is {getattr(self, name)!r}; expected {wanted}.")

    def _check_trackers(self) -> None:
        for name in self.trackers or ():
            if name not in TRACKERS:
                raise ConfigError(
                    f"unknown tracker {name!r}.{did_you_mean(name, TRACKERS)} Known: {', '.join(TRACKERS)}."
                )
            if not installed(name):
                raise ConfigError(f"tracker {name!r} is not installed; run `pip install {name}`, or drop it.")

    @property
    def base(self) -> Path | str | None:
        """What is fine-tuned: `init_from`, or the published weights that the new student starts from."""
        return self.init_from or self.student.pretrained

    @property
    def forces(self) -> bool:
        """Whether the alignment loss is ever on."""
        return self.forcing.alpha > 0

    @property
    def sources(self) -> tuple[TeacherSource, ...]:
        """The teachers and their caches; the label of one alone is empty. None where alpha is 0."""
        if not self.forces:
            return ()
        if self.teachers or self.caches:
            labels = dict.fromkeys([*self.teachers, *self.caches])
            return tuple(TeacherSource(n, self.teachers.get(n), self.caches.get(n)) for n in labels)
        alone = TeacherSource("", self.teacher, self.cache)
        return (alone,) if alone.teacher or alone.cache else ()

    @property
    def checkpoint_interval(self) -> int:
        """Steps between checkpoints."""
        return self.save_every or math.ceil(self.steps / 10)

    @property
    def active_trackers(self) -> tuple[str, ...]:
        """The trackers that this run writes to."""
        if self.trackers is not None:
            return self.trackers
        return ("tensorboard",) if installed("tensorboard") else ()

    def to_plain(self) -> dict[str, Any]:
        """The settings as JSON can hold them; paths as they were given."""
        return to_plain(self)

    def to_file(self) -> dict[str, Any]:
        """What config.json in `output` holds: paths relative to it."""
        return to_file(self, self.output)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_plain`. Raises `ConfigError` naming the setting that is wrong."""
        return from_plain(cls, plain)

    @classmethod
    def from_file(cls, plain: Mapping[str, Any], folder: Path) -> TrainConfig:
        """The configuration of a file in `folder`. Raises `ConfigError` naming the setting that is wrong."""
        return from_file(cls, plain, folder)

    def check_paths(self, data: bool = True) -> None:
        """Check what the configuration points at, before anything heavy starts.

        `data` is False where student, teacher and batches do not come from the configuration.

        Raises:
            ConfigError: a dataset, cache or student folder that is not there, or an unwritable output.
        """
        folders = [
            ("dataset", self.dataset, "meta/info.json"),
            ("cache", self.cache, ""),
            ("init_from", self.init_from, "config.json"),
            *((f"caches.{label}", folder, "") for label, folder in self.caches.items()),
        ]
        for name, folder, mark in folders:
            if name == "init_from" and folder is not None and is_hub_id(folder):
                continue  # found or refused when it is fetched
            if data and folder is not None and not (folder / mark).exists():
                raise ConfigError(f"{name}: {folder / mark} does not exist; give the folder that holds it.")
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"output {self.output} cannot be created ({error}); choose another folder."
            ) from error


def installed(package: str) -> bool:
    """Whether `package` can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def changed_settings(held: Mapping[str, Any], config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """What changes learning between the run in `config.output` and `config`: settings, with both values.

    More steps are no change where `config` extends the run, nor is the warm-up, which may depend on them.
    A setting that `held` lacks, because the version that wrote it had none, has its default.
    """
    with suppress(ConfigError):  # a setting that this version does not know is named below
        held = located(TrainConfig.from_file(held, config.output)).to_plain()
    found = differences(held, located(config).to_plain())
    if config.extend and int(held.get("steps", 0)) < config.steps:
        found.pop("steps", None)
        found.pop("optim.warmup_steps", None)
    return {name: values for name, values in found.items() if name.split(".")[0] not in NEUTRAL}
