"""Golden vectors: inputs, weights and outputs of the original code, which ours must reproduce.

Each vector is `NAME.json` (config, cases) and, mostly, `NAME.safetensors` (tensors). They are looked up in
`$SF_GOLDEN` if that is set (and then nowhere else), else in `tests/data/golden`, else in `../shared/golden`
beside the repository. A vector that is not found fails the test; nothing here ever skips.

    @pytest.mark.golden
    def test_something():
        vectors = golden("align_pooling")
        vectors.config["cases"], vectors.tensors["real_n1.hidden"], vectors.under("w.")
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]


def golden_folders() -> tuple[Path, ...]:
    """Where vectors are looked for, first match wins."""
    override = os.environ.get("SF_GOLDEN")
    if override:
        return (Path(override),)
    return (ROOT / "tests" / "data" / "golden", ROOT.parent / "shared" / "golden")


@dataclass(frozen=True)
class Golden:
    """One vector: `config` is the parsed json, `tensors` the safetensors by name (read on first use)."""

    name: str
    folder: Path

    @cached_property
    def config(self) -> Any:
        return json.loads((self.folder / f"{self.name}.json").read_text())

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        path = self.folder / f"{self.name}.safetensors"
        if not path.is_file():
            pytest.fail(f"golden vector {path.name} is missing from {self.folder}.")
        return load_file(path)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name starts with `prefix`, without it."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


def golden(name: str) -> Golden:
    """Find the vector `name` (no extension); fail the test when it is nowhere."""
    folders = golden_folders()
    for folder in folders:
        if (folder / f"{name}.json").is_file():
            return Golden(name, folder)
    pytest.fail(f"golden vector {name}.json is in none of {[str(folder) for folder in folders]}.")
