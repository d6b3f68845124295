"""Where a checkpoint is: a folder, or a hub id whose files are fetched first."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from spatial_forcing.errors import CheckpointError

ASSETS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "preprocessor_config.json", "processor_config.json", "generation_config.json",
    "configuration_prismatic.py", "modeling_prismatic.py", "processing_prismatic.py",
)  # fmt: skip
"""Small files that the official loader wants; handed on unchanged (the Python files are never run here)."""
WANTED = ("*.json", "*.safetensors", "*_checkpoint.pt", "tokenizer.model", "*_prismatic.py")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(place: str | Path) -> bool:
    """Whether `place` can only be a hub id: `owner/name`, and no such folder."""
    return not Path(place).exists() and _HUB_ID.fullmatch(str(place)) is not None


def locate(place: str | Path) -> Path:
    """The folder of a checkpoint; a hub id is downloaded into the hub's own cache.

    Raises:
        CheckpointError: neither a folder nor a hub id that can be fetched.
    """
    if Path(place).is_dir():
        return Path(place)
    if not is_hub_id(place):
        raise CheckpointError(f"{place} is neither a folder nor a hub id (owner/name).")
    try:
        return Path(snapshot_download(str(place), allow_patterns=list(WANTED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{place} is not a folder here, and cannot be fetched from the hub ({type(error).__name__}). "
            "Check the name and the connection, or download it elsewhere and give its folder."
        ) from error
