"""Depth Anything 3 (arXiv 2511.10647), own implementation: model, checkpoints, frozen teacher, cards."""

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

register(f"{HUB}DA3-SMALL", SMALL, FREE, "Any view, 22 M parameters of backbone, 768 channels, 504 px.")
register(f"{HUB}DA3-BASE", BASE, FREE, "Any view, 87 M parameters of backbone, 1536 channels, 504 px.")
for _name in ("DA3-LARGE", "DA3-LARGE-1.1"):
    register(
        f"{HUB}{_name}",
        LARGE,
        NON_COMMERCIAL,
        "Any view, 304 M parameters of backbone, 2048 channels, 504 px. Not for commercial use.",
        f"{HUB}DA3-BASE",
    )
for _name in ("DA3-GIANT", "DA3-GIANT-1.1"):
    register(
        f"{HUB}{_name}",
        GIANT,
        NON_COMMERCIAL,
        "Any view, 1.14 B parameters of backbone, 3072 channels, 504 px. Not for commercial use.",
        f"{HUB}DA3-BASE",
    )
register(f"{HUB}DA3METRIC-LARGE", SINGLE_VIEW, FREE, "One view, 304 M parameters of backbone, 1024 channels.")
register(f"{HUB}DA3MONO-LARGE", SINGLE_VIEW, FREE, "One view, 304 M parameters of backbone, 1024 channels.")
