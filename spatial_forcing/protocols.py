"""The contracts between the parts. Nothing here computes; everything else implements or uses it.

Shapes: B batch, V view, h x w token grid of one view, C teacher channels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypedDict, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spatial_forcing.alignment import Alignment, Views

Batch = Mapping[str, Any]
"""A collated training batch with LeRobot's key names: `observation.images.<camera>` (B, 3, H, W) uint8 or
float in [0, 1], `observation.state` (B, D) raw units, `action` (B, chunk, A) raw units, `action_is_pad`
(B, chunk) bool, `task` list of B strings, `index` (B,) long, and the keys that `views_from_batch` names."""

Metrics = dict[str, Tensor]
"""Scalar tensors, detached, averaged over ranks by the training loop."""


class Observation(TypedDict):
    """What an environment returns and `Student.act` takes."""

    images: Mapping[str, NDArray[np.uint8]]
    """(H, W, 3) uint8 RGB, upright, by camera; rendered only when read."""
    state: NDArray[np.float32]
    """(D,) proprioception in the dataset's raw units."""
    task: str
    """The instruction in words."""


@runtime_checkable
class Student(Protocol):
    """A vision-language-action policy, an `nn.Module`.

    Normalisation and its statistics belong to the student and travel with its checkpoint. A class that
    derives from this one and lacks a member cannot be instantiated.
    """

    @property
    @abstractmethod
    def cameras(self) -> tuple[str, ...] | None:
        """Names of the cameras it sees, in order; None where it takes any."""
        ...

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The decoder blocks whose residual stream can be tapped, in order."""
        ...

    @property
    @abstractmethod
    def final_norm(self) -> nn.Module | None:
        """The norm after the last block (tapped for "after all blocks"), or None."""
        ...

    @abstractmethod
    def alignment(self, batch: Batch) -> Alignment:
        """Where this batch's visual tokens are, and what the teacher should see. Needs no forward pass."""
        ...

    def __call__(self, batch: Batch, alignment: Alignment | None = None) -> tuple[Tensor, Metrics]:
        """The action loss (scalar, differentiable) and its metrics.

        `alignment` is what this student made of the batch, where it was asked before.
        """
        ...

    @abstractmethod
    def act(
        self,
        observations: Sequence[Observation],
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Action chunks in environment units, (B, chunk, action_dim) float32 on the CPU.

        Deterministic given `generator`; row i depends on observation i (and its noise) alone. A sequence
        gives one generator a row: row i draws from `generator[i]` only, so that batching changes no action.
        """
        ...

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` in the Hugging Face layout."""
        ...

    @classmethod
    @abstractmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what `save_pretrained` wrote. Raises `CheckpointError` on another architecture."""
        ...


@runtime_checkable
class Teacher(Protocol):
    """A frozen vision model whose patch features supervise the student.

    Always in eval mode and without gradients; it is never part of a student's module tree.
    """

    @property
    def name(self) -> str:
        """Registry name or checkpoint id."""
        ...

    @property
    def dim(self) -> int:
        """C, channels of one feature."""
        ...

    @property
    def depth(self) -> int:
        """Number of layers that can be asked for."""
        ...

    @property
    def patch(self) -> int:
        """Pixels on a side of one patch."""
        ...

    @property
    def resolution(self) -> int:
        """Pixels on a side at which views are encoded."""
        ...

    @property
    def licence(self) -> str:
        """SPDX identifier of the weights' licence."""
        ...

    @property
    def projected(self) -> bool:
        """Whether the delivered channels are coordinates in a basis instead of the model's own."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest that changes when weights, config or preprocessing change; caches are bound to it."""
        ...

    def features(self, views: Views, layers: Sequence[int] = (-1,)) -> tuple[Tensor, ...]:
        """Patch features, one (B, V, h, w, C) tensor a layer of `layers`, in that order.

        `layers` counts blocks: layer k is the output of block k, 0-based; negative from the end.
        Absent views get zero rows and never influence present ones.
        """
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move the weights."""
        ...


@runtime_checkable
class PartialTeacher(Protocol):
    """A `Teacher` that may have nothing to say of some cells."""

    @property
    def partial(self) -> bool:
        """Whether a row of zeros means that: a token that reads such cells has no target."""
        ...


def is_partial(teacher: Teacher) -> bool:
    """Whether a row of zeros means that the teacher has nothing to say of a cell."""
    return isinstance(teacher, PartialTeacher) and teacher.partial


@dataclass(frozen=True)
class VisionTower:
    """Where a student's vision tower ends.

    Attributes:
        module: its output (B V, h w, D) are the patches of every view, row-major; views of a sample are
            neighbours.
        dim: D.
    """

    module: nn.Module
    dim: int


@runtime_checkable
class PartlySeen(Protocol):
    """A student of whose cameras only some have tokens in the sequence of its blocks (X-VLA: the first)."""

    @property
    def aligned_cameras(self) -> tuple[str, ...]:
        """Their names, in order."""
        ...


@runtime_checkable
class TowerStudent(Protocol):
    """A student that can be aligned at its vision tower's output (`forcing.tap` "vision")."""

    @property
    def vision_tower(self) -> VisionTower:
        """Where the tower ends."""
        ...


@runtime_checkable
class Env(Protocol):
    """A `gymnasium.Env` with our observation. `info["success"]` is a bool after every step."""

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras in `Observation.images`."""
        ...

    @property
    def task(self) -> str:
        """The task's registry name, e.g. `reach-v3`."""
        ...

    @property
    def horizon(self) -> int:
        """Steps after which an episode is truncated."""
        ...

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; the same seed (or `options={"init_state": i}`) gives the same episode."""
        ...

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """(observation, reward, terminated, truncated, info)."""
        ...

    def close(self) -> None:
        """Free the renderer."""
        ...


class Expert(Protocol):
    """A script that solves a task with knowledge of the simulator's state."""

    def action(self, env: Any) -> NDArray[np.float32]:
        """The next action in `env`, (action_dim,)."""
        ...


@runtime_checkable
class FilmedEnv(Protocol):
    """An `Env` that shows itself more sharply than its observations do, for videos."""

    def film(self) -> Mapping[str, NDArray[np.uint8]]:
        """Every camera now, (H, W, 3) uint8 by its name."""
        ...


@runtime_checkable
class DeferredEnv(Protocol):
    """An `Env` whose images can be drawn later, so that an episode that is thrown away is never drawn."""

    def moment(self) -> Any:
        """What drawing this moment takes; small."""
        ...

    def draw(self, moment: Any) -> Mapping[str, tuple[NDArray[np.uint8], NDArray[np.float32]]]:
        """By camera, the image (H, W, 3) and the depth (H, W) in metres, as they were at that moment."""
        ...


@runtime_checkable
class ExpertEnv(Protocol):
    """An `Env` that has a scripted expert, so that demonstrations can be recorded in it."""

    def expert(self) -> Expert:
        """A fresh expert for one episode."""
        ...
