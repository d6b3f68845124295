"""`spatial-forcing libero stand-ins`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from spatial_forcing.envs.libero_setup import ASSETS_VARIABLE
from spatial_forcing.envs.libero_stand_ins import SUITES, make_stand_ins, stand_in_folder


def stand_ins(folder: Annotated[Path | None, tyro.conf.Positional] = None) -> None:
    """Make plain stand-ins for LIBERO's assets, so that two of its suites run without a download.

    Goals, sizes, masses and initial states are LIBERO's; looks are not, and every result is marked. Assets
    that are downloaded are preferred to them.

    Args:
        folder: a new one; default: one in the user's cache folder, where they are found by themselves.
    """
    made = make_stand_ins(folder)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"Stand-ins for {' and '.join(SUITES)} are in {made}", markup=False)
    if made != stand_in_folder():
        console.print(f"To use them: export {ASSETS_VARIABLE}={made.resolve()}", markup=False)
