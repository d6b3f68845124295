"""A teacher as the alignment uses it, and what belongs to one of several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import nn

from spatial_forcing.errors import ConfigError
from spatial_forcing.protocols import Teacher, is_partial

M = TypeVar("M", bound=nn.Module)


class TeacherRef:
    """Holds a teacher where `nn.Module` does not look: not saved, not trained, not copied, not pickled."""

    def __init__(self, teacher: Teacher | None = None) -> None:
        self._teacher = teacher
        self._device: torch.device | None = None

    def on(self, device: torch.device) -> Teacher:
        """The teacher on `device`. Raises `ConfigError` after unpickling: it is never pickled."""
        if self._teacher is None:
            raise ConfigError("the teacher is not there (it is never pickled); build SpatialForcing again.")
        if self._device != device:
            self._teacher.to(device)
            self._device = device
        return self._teacher

    @property
    def name(self) -> str | None:
        """The teacher's; a teacher may load its weights to tell."""
        return None if self._teacher is None else self._teacher.name

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[type[TeacherRef], tuple[()]]:
        return type(self), ()


@dataclass(frozen=True)
class Source:
    """One teacher and what is asked of it.

    Attributes:
        label: among several; empty for one alone.
        teacher: reached by reference.
        layers: indices >= 0, each once.
        dim: channels of its features.
        partial: a row of zeros says nothing (`protocols.PartialTeacher`).
        projected: its channels are coordinates in a basis.
    """

    label: str
    teacher: TeacherRef
    layers: tuple[int, ...]
    dim: int
    partial: bool
    projected: bool

    @classmethod
    def of(cls, label: str, teacher: Teacher, layers: Iterable[int]) -> Source:
        """The source of `teacher`, of which `layers` are wanted. Raises `ConfigError` for a label that is no
        name.
        """
        if label and (not label.isidentifier() or hasattr(nn.ModuleDict, label)):
            raise ConfigError(
                f"{label!r} cannot be the label of a teacher; take a word of letters, such as geometry."
            )
        return cls(
            label,
            TeacherRef(teacher),
            tuple(dict.fromkeys(layers)),
            teacher.dim,
            is_partial(teacher),
            teacher.projected,
        )

    def check(self, *, means: bool, standardise: bool) -> None:
        """Raise `ConfigError` where means (or scales) of its channels would say something wrong."""
        if self.partial and (means or standardise):
            raise ConfigError(
                f"{self.teacher.name!r} says nothing of some cells, which would enter the means of "
                "forcing.subtract_cell_mean and forcing.standardise; set both to false."
            )
        if self.projected and standardise:
            raise ConfigError(
                f"forcing.standardise would rescale the cached coordinates of {self.teacher.name!r}, not its "
                "channels; set it to false and build the cache with standardise instead."
            )


def by_label(modules: Mapping[str, M]) -> M | nn.ModuleDict:
    """One module for each teacher, or the module of the only one: its parameters keep their short names."""
    return modules[""] if set(modules) == {""} else nn.ModuleDict(modules)


def of_label(held: nn.Module | None, label: str) -> nn.Module | None:
    """The module of a teacher in what `by_label` made."""
    return held[label] if isinstance(held, nn.ModuleDict) else held
