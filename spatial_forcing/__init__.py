"""Spatial Forcing: align a VLA with a frozen 3D foundation model while it is fine-tuned (arXiv 2510.12276).

    from spatial_forcing import SpatialForcing, as_student, load_teacher

Names are imported on first use, so that `import spatial_forcing` (and the command line's --help) is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spatial_forcing.alignment import TokenLayout, Views
    from spatial_forcing.forcing import (
        ForcingConfig,
        SpatialForcing,
        as_student,
        layout_from_input_ids,
        layout_from_offset,
        layout_from_qwen,
        views_from_qwen,
    )
    from spatial_forcing.teachers import as_teacher, load_teacher

_HOMES = {
    "ForcingConfig": "spatial_forcing.forcing",
    "SpatialForcing": "spatial_forcing.forcing",
    "TokenLayout": "spatial_forcing.alignment",
    "Views": "spatial_forcing.alignment",
    "as_student": "spatial_forcing.forcing",
    "as_teacher": "spatial_forcing.teachers",
    "layout_from_input_ids": "spatial_forcing.forcing",
    "layout_from_offset": "spatial_forcing.forcing",
    "layout_from_qwen": "spatial_forcing.forcing",
    "load_teacher": "spatial_forcing.teachers",
    "views_from_qwen": "spatial_forcing.forcing",
}

__all__ = [
    "ForcingConfig",
    "SpatialForcing",
    "TokenLayout",
    "Views",
    "as_student",
    "as_teacher",
    "layout_from_input_ids",
    "layout_from_offset",
    "layout_from_qwen",
    "load_teacher",
    "views_from_qwen",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
