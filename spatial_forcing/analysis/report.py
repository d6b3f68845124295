"""The one page builder: sections of text, cards, charts, tables, pictures and videos in a self-contained
HTML file.

`ReportData` and all its parts are plain dataclasses that survive `json.dumps(dataclasses.asdict(data))`.
"""

from __future__ import annotations

import base64
import json
import mimetypes
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.analysis.charts import COLOURS, swatch
from spatial_forcing.analysis.figures import Figure, pdf, standalone
from spatial_forcing.analysis.pictures import png_bytes
from spatial_forcing.errors import DataError, EnvironmentSetupError
from spatial_forcing.evaluation.video import last_frame
from spatial_forcing.storage import replace_file


@dataclass(frozen=True)
class Media:
    """A picture or a video inside the page: `uri` is a data URI, `caption` also its alternative text.

    `poster`: data URI of the picture that a video shows until it plays.
    """

    uri: str
    caption: str
    kind: str
    poster: str = ""

    @classmethod
    def picture(cls, pixels: NDArray[np.uint8], caption: str) -> Media:
        """From (H, W, 3) uint8."""
        return cls(_data_uri(png_bytes(pixels), "image/png"), caption, "image")

    @classmethod
    def file(cls, path: Path, caption: str) -> Media:
        """From a PNG, JPEG, MP4 or WebM file; the poster of a video is its last picture.

        Raises:
            DataError: the file is missing, damaged or of another type.
        """
        kind = mimetypes.guess_type(path.name)[0] or ""
        if kind not in ("image/png", "image/jpeg", "video/mp4", "video/webm") or not path.is_file():
            raise DataError(
                f"{path} is not an existing PNG, JPEG, MP4 or WebM file; the report cannot show it."
            )
        medium = kind.split("/")[0]
        poster = _data_uri(png_bytes(last_frame(path)), "image/png") if medium == "video" else ""
        return cls(_data_uri(path.read_bytes(), kind), caption, medium, poster)


@dataclass(frozen=True)
class VideoRow:
    """Videos side by side, under a heading."""

    heading: str
    videos: tuple[Media, ...]


@dataclass(frozen=True)
class PictureRow:
    """Pictures side by side, under a heading."""

    heading: str
    pictures: tuple[Media, ...]


@dataclass(frozen=True)
class Card:
    """One large figure: `number` is the colour of its arm."""

    number: int
    name: str
    value: str
    detail: str
    text: str = ""


@dataclass(frozen=True)
class Cell:
    """A table cell: what is shown, and what the CSV holds (default the same); `words` are set as text."""

    text: str
    value: str | None = None
    words: bool = False

    @classmethod
    def number(cls, value: float | None, form: str = "{:.4f}") -> Cell:
        """A number, exact in the CSV; a dash for None."""
        return cls("-", "") if value is None else cls(form.format(value), f"{value:.6g}")


@dataclass(frozen=True)
class TableData:
    """A table; `name` is its file when it is downloaded as CSV, `strong` the numbers of the rows in bold."""

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    strong: tuple[int, ...] = ()


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        key, title: anchor and heading.
        cards: large figures at the top.
        text, notes: paragraphs, and a list below them (limits, deviations, seeds).
        figures, tables: charts, then tables.
        pictures: rows of pictures; `depth_scale`: nearest and farthest metres of their depth colours.
        videos: rows of players.
    """

    key: str
    title: str
    cards: tuple[Card, ...] = ()
    text: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[TableData, ...] = ()
    pictures: tuple[PictureRow, ...] = ()
    depth_scale: tuple[float, float] | None = None
    videos: tuple[VideoRow, ...] = ()


@dataclass(frozen=True)
class ReportData:
    """Everything on the page.

    Attributes:
        title, subtitle: heading and one line below it (preset, date).
        sections: in order.
        config: full settings by arm or part; `environment`: packages, machine, git state.
        commands: what to type to repeat it.
    """

    title: str
    subtitle: str
    sections: tuple[Section, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    commands: tuple[str, ...] = ()


def write_report(data: ReportData, path: Path) -> Path:
    """Render `data` into `path`; the old page stays until the new one is complete.

    Raises:
        DataError: no section.
        EnvironmentSetupError: jinja2 is not installed.
    """
    html = render(data)
    replace_file(path, lambda beside: beside.write_text(html, encoding="utf-8"))
    return path


def render(data: ReportData) -> str:
    """The page as text; raises as `write_report`."""
    if not data.sections:
        raise DataError("the report has no section; give at least one.")
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise EnvironmentSetupError(
            "the report needs jinja2: pip install 'spatial-forcing[report]'."
        ) from error
    folder = files("spatial_forcing.analysis") / "templates"
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = page.from_string((folder / "report.html").read_text(encoding="utf-8"))
    return template.render(
        data=data,
        css=(folder / "report.css").read_text(encoding="utf-8"),
        js=(folder / "report.js").read_text(encoding="utf-8"),
        colours=COLOURS,
        swatch=swatch,
        files=_files,
        config={key: json.dumps(value, indent=2, default=str) for key, value in data.config.items()},
        environment=_flat(data.environment),
    )


def pca_rows(
    images: Mapping[str, NDArray[np.uint8]], pictures: Mapping[str, NDArray[np.uint8]]
) -> tuple[PictureRow, ...]:
    """Rows of (image, PCA of each feature set); `images`: (H, W, 3) by heading, in their order."""
    return tuple(
        PictureRow(
            heading,
            (
                Media.picture(image, f"image, {heading}"),
                *(Media.picture(stack[number], f"{name}") for name, stack in pictures.items()),
            ),
        )
        for number, (heading, image) in enumerate(images.items())
    )


def _files(figure: Figure) -> dict[str, tuple[str, str]]:
    """What a figure can be saved as: (file name, data URI) by kind; without svglib not as PDF."""
    made = {"SVG": ("svg", "image/svg+xml", standalone(figure).encode())}
    # A page comes at the end of long work: what one link needs must not cost the page.
    with suppress(EnvironmentSetupError):
        made["PDF"] = ("pdf", "application/pdf", pdf(figure))
    made["CSV"] = ("csv", "text/csv", figure.csv.encode())
    return {
        kind: (f"{figure.name}.{suffix}", _data_uri(data, mime))
        for kind, (suffix, mime, data) in made.items()
    }


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names and text."""
    rows: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            rows |= _flat(value, f"{prefix}{key}.")
        else:
            rows[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return rows
