"""`spatial-forcing report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from spatial_forcing.experiments.quickstart import rebuild_report


def report(folder: Annotated[Path, tyro.conf.Positional] = Path("quickstart")) -> None:
    """Probe and draw again, from what a finished quickstart left.

    Args:
        folder: output of the quickstart.
    """
    rebuild_report(folder)
