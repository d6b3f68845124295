"""Depth Anything 3 (arXiv 2511.10647), own implementation: model, checkpoints, frozen teacher, cards."""

from spatial_forcing.teachers.cards import TeacherFacts
from spatial_forcing.teachers.da3.config import (
    BASE,
    GIANT,
    LARGE,
    SINGLE_VIEW,
    SMALL,
    DA3Config,
    DA3HeadConfig,
)
from spatial_forcing.teachers.da3.loading import find_da3, is_da3, load_da3, save_da3
from spatial_forcing.teachers.da3.model import DA3
from spatial_forcing.teachers.da3.teacher import DA3Teacher, load_da3_teacher, register

__all__ = [
    "DA3",
    "DA3Config",
    "DA3HeadConfig",
    "DA3Teacher",
    "find_da3",
    "is_da3",
    "load_da3",
    "load_da3_teacher",
    "save_da3",
]

HUB = "depth-anything/"
FREE, NON_COMMERCIAL = "Apache-2.0", "CC-BY-NC-4.0"

register(f"{HUB}DA3-SMALL", SMALL, FREE, "Any view.", TeacherFacts(22.1, 768, 504, True, 0.033))
register(
    f"{HUB}DA3-BASE",
    BASE,
    FREE,
    "Any view. What the recipes take.",
    TeacherFacts(86.6, 1536, 504, True, 0.093),
)
for _name in ("DA3-LARGE", "DA3-LARGE-1.1"):
    register(
        f"{HUB}{_name}",
        LARGE,
        NON_COMMERCIAL,
        "Any view. Not for commercial use.",
        TeacherFacts(304.4, 2048, 504, True, 0.29),
        commercial=f"{HUB}DA3-BASE",
    )
for _name in ("DA3-GIANT", "DA3-GIANT-1.1"):
    register(
        f"{HUB}{_name}",
        GIANT,
        NON_COMMERCIAL,
        "Any view. Not for commercial use.",
        TeacherFacts(1136.5, 3072, 504, True, 1.0),
        commercial=f"{HUB}DA3-BASE",
    )
for _name, _note in (("METRIC", "Depth in metres."), ("MONO", "Depth up to scale.")):
    register(
        f"{HUB}DA3{_name}-LARGE",
        SINGLE_VIEW,
        FREE,
        f"One view. {_note} Add ?views=alone for several.",
        TeacherFacts(304.4, 1024, 504, False, 0.27),
    )
