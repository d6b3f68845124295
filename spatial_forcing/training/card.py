"""What a run's model card says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spatial_forcing.protocols import Teacher
from spatial_forcing.students.card import SECTION
from spatial_forcing.training.config import TrainConfig


def card_of(config: TrainConfig, teacher: Teacher | Mapping[str, Teacher] | None) -> dict[str, Any]:
    """The header of the card: base model, teacher and how it was used.

    Args:
        config: of the run.
        teacher: or its cache, or several by label; None where nothing was aligned.
    """
    header: dict[str, Any] = {"tags": ["robotics", "vision-language-action"]}
    if config.base is not None:
        header["base_model"] = str(config.base)
    used: dict[str, Any] = {"alpha": config.forcing.alpha, "steps": config.steps, "teacher": None}
    if teacher is not None:
        several = [*teacher.values()] if isinstance(teacher, Mapping) else [teacher]
        used |= {"teacher": " + ".join(each.name for each in several)}
        used |= {"teacher_licence": " + ".join(dict.fromkeys(each.licence for each in several))}
    return header | {SECTION: used}
