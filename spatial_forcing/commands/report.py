"""`spatial-forcing report` and `spatial-forcing open`."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from spatial_forcing.errors import ConfigError
from spatial_forcing.experiments.quickstart import SETTINGS, rebuild_report
from spatial_forcing.experiments.report import PAGE, rebuild_page

Folder = Annotated[Path, tyro.conf.Positional]


def report(folder: Folder = Path("quickstart"), open: bool = False) -> None:
    """Make the page of a finished quickstart or comparison again, from what lies in its folder.

    Nothing is trained or evaluated, and no other file is written. The folder may have been moved.

    Args:
        folder: output of the quickstart or of `compare`.
        open: show the page in the browser afterwards.
    """
    made = rebuild_report(folder) if (folder / SETTINGS).exists() else rebuild_page(folder)
    Console(soft_wrap=True, highlight=False).print(f"page: {made}", markup=False)
    if open:
        show(made)


def open_page(folder: Folder = Path("quickstart")) -> None:
    """Show a page in the browser.

    Args:
        folder: output of `quickstart`, `compare`, `probe` or `analyse`, or an HTML file.
    """
    pages = [folder] if folder.is_file() else sorted(folder.glob("*.html"))
    if not pages:
        raise ConfigError(f"{folder} holds no page (*.html); `spatial-forcing report` makes one.")
    show(folder / PAGE if folder / PAGE in pages else pages[0])


def show(page: Path) -> None:
    """Open `page` in the browser; where there is none, say how to see it."""
    if not webbrowser.open(page.resolve().as_uri()):
        Console(soft_wrap=True, highlight=False).print(
            f"No browser could be started here. Copy {page} to a machine with one: it is a single file.",
            markup=False,
        )
