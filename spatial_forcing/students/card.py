"""The model card of a trained policy: which teacher trained it, and under which licence that teacher is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load, metadata_save

CARD = "README.md"
SECTION = "spatial_forcing"
"""Section of the card's header; `serve` reads it."""


def write_card(folder: Path, header: dict[str, Any]) -> None:
    """Write README.md into a policy's folder; what a header is there already says is kept."""
    path = folder / CARD
    held = (metadata_load(path) or {}) if path.is_file() else {}
    if not path.is_file():
        path.write_text(f"---\n---\n{_body(header[SECTION])}", encoding="utf-8")
    metadata_save(path, {**header, **held, SECTION: header[SECTION]})


def read_card(folder: Path) -> dict[str, Any] | None:
    """The header that `write_card` wrote, or None where there is none."""
    path = folder / CARD
    found = metadata_load(path) if path.is_file() else None
    return found if isinstance(found, dict) and SECTION in found else None


def _body(used: dict[str, Any]) -> str:
    if used["teacher"] is None:
        return "# A robot policy\nFine-tuned by `spatial-forcing`, without a teacher.\n"
    return (
        "# A robot policy\n"
        "Fine-tuned by `spatial-forcing`: its visual tokens were aligned with the features of the teacher "
        f"`{used['teacher']}`, whose licence is {used['teacher_licence']}. Nothing of the teacher is in this "
        "policy; whether its licence reaches a policy that it trained is for the reader to judge.\n"
    )
