"""A reference to the teacher that `nn.Module` does not see."""

from __future__ import annotations

from typing import Any, Self

import torch

from spatial_forcing.errors import ConfigError
from spatial_forcing.protocols import Teacher


class TeacherRef:
    """Holds the teacher where `nn.Module` does not look: not saved, not trained, not copied, not pickled."""

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

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[type[TeacherRef], tuple[()]]:
        return type(self), ()
