"""The arms of a comparison: named overrides of one preset."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from spatial_forcing.errors import ConfigError
from spatial_forcing.registry import Registry

Target = Literal["none", "teacher", "image", "shuffled", "random"]
"""What an arm is aligned with: nothing, the teacher, the 2D teacher, the teacher's features of other frames,
or those of its architecture with random weights."""


@dataclass(frozen=True)
class ArmSpec:
    """One arm.

    Attributes:
        name: short; part of folder names and of the tags of episodes.
        title: what results, tables and figures call it.
        description: one line for the report.
        target: what its visual tokens are aligned with.
        overrides: settings that differ from the preset, by dotted name.
        layers: fractions of the student's depth that are tapped; empty: the preset's pairs.
        fused: the teacher's features are the policy's input (and cost time when it acts).
    """

    name: str
    title: str
    description: str
    target: Target = "none"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[float, ...] = ()
    fused: bool = False

    @property
    def blind(self) -> bool:
        """Whether its images are blanked."""
        return bool(self.overrides.get("student.blank_images"))

    @property
    def forces(self) -> bool:
        """Whether the arm has an alignment loss."""
        return self.target != "none"

    def settings(self, student_depth: int) -> dict[str, Any]:
        """Overrides of the preset for a student of that many blocks."""
        made: dict[str, Any] = {} if self.forces else {"forcing.alpha": 0.0}
        if self.layers:
            taps = dict.fromkeys(max(1, round(share * student_depth)) for share in self.layers)
            made["forcing.pairs"] = [[k, -1] for k in taps]
        return made | dict(self.overrides)


ARMS: Registry[ArmSpec] = Registry("arm")
"""Arms by name; more are made of them with overrides, see `parse_arm`."""

SEVERAL = (0.25, 0.5, 0.75)
BLIND = "blanked images"
"""Title of the arm that sees nothing: what it loses is what sight is worth."""

for _arm in (
    ArmSpec("alpha0", "no alignment", "no alignment loss, otherwise the same"),
    ArmSpec("sf", "spatial forcing", "aligned with the teacher's features of the same frame", "teacher"),
    ArmSpec(
        "standardised",
        "standardised features",
        "every teacher channel standardised",
        "teacher",
        {"forcing.standardise": True},
    ),
    ArmSpec(
        "centred",
        "centred features",
        "the teacher's features without the mean of each cell",
        "teacher",
        {"forcing.subtract_cell_mean": True},
    ),
    ArmSpec(
        "multi", "layers sharing a projector", "several layers, one projector", "teacher", layers=SEVERAL
    ),
    ArmSpec(
        "independent",
        "layers with own projectors",
        "several layers, a projector each",
        "teacher",
        {"forcing.projectors": "independent"},
        layers=SEVERAL,
    ),
    ArmSpec(
        "gated",
        "gated layers",
        "several layers mixed by a learned gate",
        "teacher",
        {"forcing.gate": True},
        layers=SEVERAL,
    ),
    ArmSpec("2d", "2D teacher", "aligned with a 2D teacher instead of the 3D one", "image"),
    ArmSpec(
        "shuffled",
        "other frames' features",
        "aligned with the teacher's features of other frames",
        "shuffled",
    ),
    ArmSpec("random", "random teacher", "the teacher's architecture with random weights", "random"),
    ArmSpec("blind", BLIND, "images blanked, no alignment loss", overrides={"student.blank_images": True}),
    ArmSpec("fusion", "teacher as input", "the teacher's features as the policy's input", fused=True),
):
    ARMS.add(_arm.name, _arm)


def parse_arm(text: str) -> ArmSpec:
    """An arm as written on the command line: `[label=]name [setting=value ...]`.

    >>> parse_arm("strong=sf forcing.alpha=2").overrides
    {'forcing.alpha': 2}

    Values are read as JSON where they are, else as text. A label is both name and title. An arm with
    overrides and no label is named after them.

    Raises:
        ConfigError: an unknown arm (did you mean), or something else than `setting=value` after it.
    """
    words = shlex.split(text)
    if not words:
        raise ConfigError(f"an arm is empty; name one of {', '.join(ARMS)}.")
    label, given, base = words[0].rpartition("=")
    arm = ARMS[base]
    overrides = parse_overrides(words[1:], f"arm {text!r}")
    if not overrides:
        return replace(arm, name=label, title=label) if given else arm
    made = ",".join(f"{name.rpartition('.')[2]}={value}" for name, value in overrides.items())
    return replace(
        arm,
        name=label or f"{base}({made})",
        title=label or f"{arm.title} ({made})",
        description=f"{arm.description}; {', '.join(words[1:])}",
        overrides={**arm.overrides, **overrides},
    )


def parse_overrides(words: list[str] | tuple[str, ...], place: str) -> dict[str, Any]:
    """`setting=value` words as a mapping. Raises `ConfigError` for another word."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals):
            raise ConfigError(f"{place}: {word!r} is not of the form setting=value.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
