"""The model card of a trained policy: which teacher trained it, and under which licence that teacher is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load, metadata_save

from spatial_forcing.errors import CheckpointError

CARD = "README.md"
SECTION = "spatial_forcing"
"""Section of the card's header; `serve` reads it."""


def write_card(folder: Path, header: dict[str, Any]) -> None:
    """Write README.md into a policy's folder; what a header is there already says is kept."""
    path, held = folder / CARD, load_header(folder)
    if not path.is_file():
        path.write_text(f"---\n---\n{_body(header[SECTION])}", encoding="utf-8")
    metadata_save(path, {**header, **held, SECTION: header[SECTION]})


def read_card(folder: Path) -> dict[str, Any] | None:
    """The header that `write_card` wrote, or None where there is none."""
    found = load_header(folder)
    return found if SECTION in found else None


def load_header(folder: Path) -> dict[str, Any]:
    """The header of the card in a policy's folder; empty where there is none.

    Raises:
        CheckpointError: it is not YAML.
    """
    path = folder / CARD
    try:
        found = metadata_load(path) if path.is_file() else None
    except Exception as error:  # yaml has a family of exceptions of its own
        raise CheckpointError(
            f"the header of {path} is not YAML ({error}); correct it; the licence is read there."
        ) from error
    return found if isinstance(found, dict) else {}


def _body(used: dict[str, Any]) -> str:
    if used["teacher"] is None:
        return "# A robot policy\nFine-tuned by `spatial-forcing`, without a teacher.\n"
    return (
        "# A robot policy\n"
        "Fine-tuned by `spatial-forcing`: its visual tokens were aligned with the features of the teacher "
        f"`{used['teacher']}`, whose licence is {used['teacher_licence']}. Nothing of the teacher is in this "
        "policy; whether its licence reaches a policy that it trained is for the reader to judge.\n"
    )
