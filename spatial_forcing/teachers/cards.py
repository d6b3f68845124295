"""Teachers by name: the registry and its cards, with the licence of every set of weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from spatial_forcing.errors import ConfigError
from spatial_forcing.protocols import Teacher
from spatial_forcing.registry import Registry, unknown

logger = logging.getLogger(__name__)


class TeacherLoader(Protocol):
    """Builds a teacher from a registry name (with its card), or from a path or hub id (card None)."""

    def __call__(
        self,
        source: str,
        card: TeacherCard | None,
        *,
        resolution: int | None,
        dtype: torch.dtype,
        device: torch.device | str,
        heads: bool,
        random_weights: bool,
        variant: Mapping[str, str],
        **options: Any,
    ) -> Teacher:
        """Load frozen weights onto `device`, or draw them; `options` go to `frozen.FrozenTeacher`.

        `variant` is what the name says after `?`, see `check_variant`.
        """
        ...


@dataclass(frozen=True)
class TeacherFacts:
    """What a reader compares teachers by.

    Attributes:
        parameters: millions, of the part that runs.
        channels: of one feature.
        pixels: of the longer side, by default.
        together: it encodes the views of a sample together.
        cost: processor time of two views over VGGT-1B's (`benchmarks.teacher_cost`); None: not measured.
    """

    parameters: float
    channels: int
    pixels: int
    together: bool = False
    cost: float | None = None


CommercialUse = Literal["yes", "no", "ask"]
FREE_LICENCES = frozenset({"Apache-2.0", "BSD-3-Clause", "CC-BY-4.0", "MIT"})
RESEARCH_ONLY = frozenset({"LicenseRef-Apple-AMLR"})


def commercial_use(licence: str) -> CommercialUse:
    """Whether a licence allows commercial use; "ask": it has conditions of its own, or is not known."""
    if licence in FREE_LICENCES:
        return "yes"
    return "no" if "-NC" in licence or licence in RESEARCH_ONLY else "ask"


@dataclass(frozen=True)
class TeacherCard:
    """One entry of the registry.

    Attributes:
        name: registry name; for weights on the hub, their id.
        loader: builds it.
        licence: SPDX identifier of the weights' licence.
        note: one line on what it is and what its licence asks.
        commercial_alternative: name of an equivalent whose licence allows commercial use, if there is one.
        folder: where weights that ship with the package are; None for others.
        facts: numbers for `teacher list`; None where nobody has counted them.
    """

    name: str
    loader: TeacherLoader
    licence: str
    note: str
    commercial_alternative: str | None = None
    folder: Path | None = None
    facts: TeacherFacts | None = None

    @property
    def commercial(self) -> CommercialUse:
        """Whether the licence allows commercial use; "ask": it has conditions of its own, read them."""
        return commercial_use(self.licence)


TEACHERS: Registry[TeacherCard] = Registry("teacher")

RANDOM = "random:"
"""Before a teacher's name: its architecture with random weights."""
RANDOM_LICENCE = "Apache-2.0"
"""Of random weights, which are this package's own."""
UNKNOWN_LICENCE = "LicenseRef-unknown"
VARIANT = "?"
"""After a teacher's name: its settings, `name?half=global&reference=middle`."""
Framing = Literal["fit", "pad"]

_announced: set[str] = set()


def check_variant(
    source: str, variant: Mapping[str, str], known: Mapping[str, tuple[str, ...]]
) -> dict[str, str]:
    """Every setting of a teacher, with its default (the first value) where the name says nothing.

    Raises:
        ConfigError: a setting that this kind of teacher does not have, or a value that it cannot take.
    """
    for key, value in variant.items():
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "this kind of teacher has none"
            raise ConfigError(f"{source!r} has no setting {key!r}; {has}.")
        if value not in known[key]:
            raise unknown(f"{key} of {source}", value, known[key])
    return {key: values[0] for key, values in known.items()} | dict(variant)


def announce_licence(name: str, licence: str) -> None:
    """Say once (in the first process of a run) under which licence a teacher's weights are used.

    Cached features fall under the licence of the weights that made them. Random weights have none.
    """
    if name in _announced or name.startswith(RANDOM) or os.environ.get("RANK", "0") != "0":
        return
    _announced.add(name)
    registered = name.partition(VARIANT)[0]
    card = TEACHERS.get(registered) if registered in TEACHERS else None
    parts = [f"teacher {name!r}: weights under {licence}."]
    if card is not None:
        parts.append(card.note)
        if card.commercial_alternative is not None:
            parts.append(f"For commercial use: {card.commercial_alternative!r}.")
    logger.warning(" ".join(parts))
