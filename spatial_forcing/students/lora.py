"""LoRA for any student: low-rank adapters on its linear layers (peft), saved alone or merged.

    student = LoraStudent(load_student(base), LoraSettings(rank=32), base=base)   # train this
    student.save_pretrained(folder)        # adapters and what was trained in full; the base is named only
    policy = merge(LoraStudent.from_pretrained(folder))                           # the base's class and keys

The wrapped student keeps its modules, so taps, layouts and activation checkpointing work as without LoRA.

config.json                what the wrapped student is, its base, the settings
adapter_config.json,
adapter_model.safetensors  the adapters, in peft's layout
trained.safetensors        parameters trained in full and all buffers (normalisation statistics)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spatial_forcing.alignment import Alignment
from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.protocols import Batch, Metrics, Observation, VisionTower
from spatial_forcing.registry import did_you_mean
from spatial_forcing.storage import replace_file, write_json
from spatial_forcing.students.base import (
    CONFIG_FILE,
    STUDENTS,
    Student,
    StudentModule,
    StudentSpec,
    read_config,
)
from spatial_forcing.students.heads import Generators
from spatial_forcing.students.weights import weights_fingerprint

MODEL_TYPE = "lora"
ADAPTER = "default"
ADAPTER_CONFIG, ADAPTER_FILE, TRAINED_FILE = (
    "adapter_config.json", "adapter_model.safetensors", "trained.safetensors",
)  # fmt: skip
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraSettings:
    """Which layers get adapters, and of what kind. The defaults (except for `rank`) are OpenVLA-OFT's.

    Attributes:
        rank: of every adapter; 0: no LoRA.
        alpha: adapters are scaled by alpha / rank; None: min(rank, 16).
        dropout: in front of the adapters, in training only.
        init: "gaussian" (OpenVLA-OFT) or "kaiming" (peft's default) for the first matrix; the second
            starts at zero, so the student starts as its base.
        targets: patterns (`llm.*`) of the linear layers that get adapters; empty: all but those of `full`.
        exclude: patterns of linear layers that get none.
        full: names or prefixes of parameters trained in full; None: what the student's class names
            (`lora_full`: heads and the like).
    """

    rank: int = 0
    alpha: float | None = None
    dropout: float = 0.0
    init: Literal["gaussian", "kaiming"] = "gaussian"
    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    full: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("targets", "exclude", "full"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        if self.rank < 0 or not 0 <= self.dropout < 1 or (self.alpha is not None and self.alpha <= 0):
            raise ConfigError(
                f"lora.rank {self.rank} (0 or more), lora.dropout {self.dropout} ([0, 1)) or lora.alpha "
                f"{self.alpha} (positive, or none) is wrong."
            )
        if self.init not in ("gaussian", "kaiming"):
            raise ConfigError(f"lora.init is {self.init!r}; expected 'gaussian' or 'kaiming'.")

    @property
    def scale_numerator(self) -> float:
        """`alpha`, with its default filled in."""
        return float(min(self.rank, 16)) if self.alpha is None else self.alpha


class LoraStudent(StudentModule):
    """A student with adapters; implements `protocols.Student`. The student itself is `policy`.

    Args:
        policy: the student as its base has it; adapters are put into it, everything else is frozen.
        settings: see `LoraSettings`.
        base: folder (or hub id) that `policy` was loaded from; written into the checkpoints.
        seed: of the adapters' initial values; the global random stream is left as it was.

    Raises:
        ConfigError: rank 0, nothing to adapt, a pattern without a match, or adapters already there.
    """

    def __init__(
        self, policy: StudentModule, settings: LoraSettings, *, base: str | Path, seed: int = 0
    ) -> None:
        super().__init__()
        if isinstance(policy, LoraStudent):
            raise ConfigError(f"{base} holds adapters itself; merge them first: spatial-forcing export.")
        self.policy, self.settings = policy, settings
        self.base = str(Path(base).resolve()) if Path(base).exists() else str(base)
        full = settings.full if settings.full is not None else policy.spec.lora_full
        frozen = {k: p for k, p in policy.named_parameters() if not _under(k, full)}
        self.fingerprint = weights_fingerprint(frozen)
        self._peft = _inject(policy, settings, full, seed)
        _train_in_full(policy, full)
        self._widened = _widen(policy)

    # ---- the student

    @property
    def config(self) -> Any:
        """The wrapped student's configuration."""
        return self.policy.config

    @property
    def spec(self) -> StudentSpec:
        """The wrapped student's, except for what only the bare one does."""
        return replace(self.policy.spec, continues_chunks=False)

    def activation_bytes(self, samples: int) -> int | None:
        """The wrapped student's estimate."""
        return self.policy.activation_bytes(samples)

    @property
    def _student(self) -> Student:
        return cast(Student, self.policy)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The wrapped student's decoder blocks."""
        return self._student.blocks

    @property
    def final_norm(self) -> nn.Module | None:
        """The wrapped student's final norm."""
        return self._student.final_norm

    @property
    def vision_tower(self) -> VisionTower:
        """The wrapped student's. Raises `ConfigError` where it has none."""
        # Training only: nothing of it is in a process that serves.
        from spatial_forcing.forcing.extras.tower import vision_tower_of

        return vision_tower_of(self.policy)

    def alignment(self, batch: Batch) -> Alignment:
        """The wrapped student's."""
        return self._student.alignment(batch)

    def forward(self, batch: Batch, alignment: Alignment | None = None) -> tuple[Tensor, Metrics]:
        """The wrapped student's loss."""
        return cast(tuple[Tensor, Metrics], self.policy(batch, alignment))

    def act(self, observations: Sequence[Observation], generator: Generators = None) -> Tensor:
        """The wrapped student's actions, adapters unmerged."""
        return self._student.act(observations, generator)

    # ---- files

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapters under the wrapped student's names (`layers.0.qkv.lora_A.default.weight`)."""
        return {k: v for k, v in self.policy.state_dict().items() if _is_adapter(k)}

    def trained_state(self) -> dict[str, Tensor]:
        """Parameters trained in full, and all buffers."""
        full = {k for k, p in self.policy.named_parameters() if p.requires_grad and not _is_adapter(k)}
        parameters = {k for k, _ in self.policy.named_parameters()}
        state = self.policy.state_dict()
        return {k: v for k, v in state.items() if k in full or (k not in parameters and not _is_adapter(k))}

    @property
    def checkpoint_bytes(self) -> int:
        """Size of what `save_pretrained` writes."""
        state = {**self.adapter_state(), **self.trained_state()}
        return sum(value.numel() * value.element_size() for value in state.values())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write adapters, what was trained in full, and where the base is; see the module's docstring."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        adapters = {_PEFT_PREFIX + _stored(k): v for k, v in self.adapter_state().items()}
        _write(folder / ADAPTER_FILE, adapters)
        _write(folder / TRAINED_FILE, self.trained_state())
        self._peft.base_model_name_or_path = self.base
        self._peft.save_pretrained(str(folder))
        config = {
            "model_type": MODEL_TYPE,
            "student": {"model_type": registered_name(self.policy), **asdict(self.config)},
            "base": {"path": self.base, "fingerprint": self.fingerprint},
            "lora": asdict(self.settings),
        }
        write_json(folder / CONFIG_FILE, config)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, base: str | Path | None = None) -> Self:
        """Load the base and put the saved adapters on it, unmerged.

        Args:
            folder: what `save_pretrained` wrote.
            base: where the base is now, if it has moved.

        Raises:
            CheckpointError: the base is not there or has other weights, or files do not fit.
        """
        stored = read_config(folder, MODEL_TYPE)
        try:
            described = dict(stored["student"])
            kind, settings = described.pop("model_type"), LoraSettings(**stored["lora"])
            place, fingerprint = base or stored["base"]["path"], stored["base"]["fingerprint"]
        except (KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(f"{folder}/{CONFIG_FILE} is incomplete or wrong: {error!r}.") from error
        student = cls(open_base(kind, place, described, folder), settings, base=place)
        if student.fingerprint != fingerprint:
            raise CheckpointError(
                f"the adapters in {folder} belong to a base with fingerprint {fingerprint}, and {place} has "
                f"{student.fingerprint}: other weights or another precision. Give the base they belong to."
            )
        student.restore(folder)
        return student

    def restore(self, folder: str | Path) -> None:
        """Load what `save_pretrained` wrote into this student; the base is not read again.

        Raises:
            CheckpointError: a file is missing or damaged, or holds other keys or shapes.
        """
        folder = Path(folder)
        adapters = _read(folder / ADAPTER_FILE)
        adapters = {k.removeprefix(_PEFT_PREFIX): v for k, v in adapters.items()}
        own = {_stored(k): v for k, v in self.adapter_state().items()}
        _copy(folder / ADAPTER_FILE, adapters, own)
        _copy(folder / TRAINED_FILE, _read(folder / TRAINED_FILE), self.trained_state())

    def summary(self) -> str:
        """One line: how many parameters are trained."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        return f"LoRA rank {self.settings.rank}: {trained / 1e6:,.2f} M of {total / 1e6:,.2f} M trained"


def open_base(
    kind: str, place: str | Path, described: Mapping[str, Any], folder: str | Path
) -> StudentModule:
    """The student of class `kind` that the adapters in `folder` were put on.

    Raises:
        CheckpointError: the class is unknown, the base is gone, or it has other settings.
    """
    if kind not in STUDENTS:
        raise CheckpointError(f"{folder}: adapters of a {kind!r} student, which this package does not know.")
    try:
        return STUDENTS[kind].from_base(place, dict(described))
    except CheckpointError as error:
        raise CheckpointError(
            f"the base of the adapters in {folder} cannot be loaded: {error} Pass the folder it is in now: "
            "LoraStudent.from_pretrained(folder, base=...)."
        ) from error


def registered_name(student: nn.Module) -> str:
    """The `model_type` under which a student's class is registered."""
    classes: Mapping[str, Any] = STUDENTS
    for name, family in classes.items():
        if type(student) is family:
            return name
    raise ConfigError(f"{type(student).__name__} is not a registered student; add it to STUDENTS.")


@torch.no_grad()
def merge(student: LoraStudent) -> StudentModule:
    """Add the adapters to the weights and return the bare student, of the base's class and keys.

    Works in place, layer by layer on the CPU: the sum is taken in float32 and rounded to the weight's
    type once, so that the result does not depend on the device it is made on. `student` is used up.
    """
    for name, layer in _adapted(student.policy):
        base = layer.get_base_layer()
        weight = base.weight
        delta = layer.get_delta_weight(ADAPTER) if weight.device.type == "cpu" else _delta_on_cpu(layer)
        weight.copy_((weight.cpu().float() + delta.float()).to(weight.dtype))
        parent, _, leaf = name.rpartition(".")
        setattr(student.policy.get_submodule(parent), leaf, base)
    for part in student._widened:
        part.narrow()
    if hasattr(student.policy, "peft_config"):
        del student.policy.peft_config
    return student.policy


def adapted_layers(student: LoraStudent) -> list[str]:
    """Names of the linear layers that have adapters."""
    return [name for name, _ in _adapted(student.policy)]


def _adapted(policy: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in policy.named_modules() if isinstance(module, LoraLayer)]


def _delta_on_cpu(layer: Any) -> Tensor:
    a, b = (part[ADAPTER].weight.cpu().float() for part in (layer.lora_A, layer.lora_B))
    return b @ a * layer.scaling[ADAPTER]


def _inject(policy: StudentModule, settings: LoraSettings, full: tuple[str, ...], seed: int) -> LoraConfig:
    if settings.rank < 1:
        raise ConfigError("lora.rank is 0, which means no LoRA; give at least 1.")
    if _adapted(policy):
        raise ConfigError("the student already has adapters; merge them first.")
    names = _targets(policy, settings, full)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale_numerator,
        lora_dropout=settings.dropout,
        init_lora_weights="gaussian" if settings.init == "gaussian" else True,
        target_modules="|".join(re.escape(name) for name in names),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, policy, ADAPTER)
    for name, parameter in policy.named_parameters():
        if _is_adapter(name):  # adapters of a bfloat16 base learn in float32, as peft's own models do
            parameter.data = parameter.data.float()
    return config


def _targets(policy: StudentModule, settings: LoraSettings, full: tuple[str, ...]) -> list[str]:
    # Exactly nn.Linear: the subclass inside MultiheadAttention is never called, only its weight is read.
    linear = [name for name, module in policy.named_modules() if type(module) is nn.Linear]
    names = [name for name in linear if not _under(name, full)]
    for patterns, what in ((settings.targets, "targets"), (settings.exclude, "exclude")):
        for pattern in patterns:
            if not any(fnmatch(name, pattern) for name in linear):
                raise ConfigError(
                    f"lora.{what}: {pattern!r} matches no linear layer.{did_you_mean(pattern, linear)} "
                    f"The first of {len(linear)}: {', '.join(linear[:5])}."
                )
    if settings.targets:
        names = [name for name in names if any(fnmatch(name, p) for p in settings.targets)]
    excluded = (*settings.exclude, *policy.spec.lora_exclude)
    names = [name for name in names if not any(fnmatch(name, p) for p in excluded)]
    if not names:
        raise ConfigError("no linear layer is left to put LoRA on; check lora.targets, exclude and full.")
    return names


def _train_in_full(policy: nn.Module, full: tuple[str, ...]) -> None:
    names = [name for name, _ in policy.named_parameters()]
    for prefix in full:
        if not any(_under(name, (prefix,)) for name in names):
            tops = sorted({name.split(".")[0] for name in names})
            raise ConfigError(
                f"lora.full: the student has no parameter {prefix!r}.{did_you_mean(prefix, tops)} "
                f"Its parts: {', '.join(tops)}."
            )
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(_is_adapter(name) or _under(name, full))


@dataclass(frozen=True)
class _Widened:
    """A module of a 16-bit base whose parameters learn in float32; its inputs and outputs are cast."""

    module: nn.Module
    dtype: torch.dtype
    hooks: tuple[Any, ...]

    def narrow(self) -> None:
        """Back to the base's type."""
        for hook in self.hooks:
            hook.remove()
        for parameter in self.module.parameters(recurse=False):
            parameter.data = parameter.data.to(self.dtype)


def _widen(policy: nn.Module) -> list[_Widened]:
    """Train in float32 what is trained in full: bfloat16 rounds a usual step of the optimizer away."""
    widened = []
    for module in policy.modules():
        own = list(module.parameters(recurse=False))
        if not any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in own):
            continue
        dtype = own[0].dtype
        for parameter in own:
            parameter.data = parameter.data.float()
        before = module.register_forward_pre_hook(_to_float32)
        after = module.register_forward_hook(partial(_to_dtype, dtype))
        widened.append(_Widened(module, dtype, (before, after)))
    return widened


def _to_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for v in inputs)


def _to_dtype(dtype: torch.dtype, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    return output.to(dtype) if isinstance(output, Tensor) and output.is_floating_point() else output


def _under(name: str, prefixes: Sequence[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _stored(name: str) -> str:
    return name.replace(f".{ADAPTER}.", ".")


def _write(path: Path, state: Mapping[str, Tensor]) -> None:
    content = {name: value.detach().contiguous().cpu() for name, value in state.items()}
    replace_file(path, lambda beside: save_file(content, beside, metadata={"format": "pt"}))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; the checkpoint is incomplete.") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}); copy it again.") from error


@torch.no_grad()
def _copy(path: Path, stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    missing, unexpected = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
    misshapen = sorted(k for k in own.keys() & stored.keys() if own[k].shape != stored[k].shape)
    if missing or unexpected or misshapen:
        raise CheckpointError(
            f"{path} does not fit the student: missing {missing[:5]}, unexpected {unexpected[:5]}, of "
            f"another shape {misshapen[:5]} ({len(missing)}, {len(unexpected)}, {len(misshapen)} in all)."
        )
    for name, value in own.items():
        value.copy_(stored[name])  # state_dict shares its storage with the module


STUDENTS.add(MODEL_TYPE, LoraStudent)
