"""Imports point one way, and nothing forbidden is imported."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "spatial_forcing"

TIERS = [
    {"errors", "precision", "registry", "stem", "storage", "alignment", "protocols"},
    {"forcing"},
    {"envs"},
    {"data"},  # recording drives environments
    {"teachers", "students"},  # a cache reads datasets
    {"evaluation"},
    {"training"},
    {"analysis", "serving"},
    {"nano_teacher"},
    {"experiments"},
    {"doctor"},
    {"commands"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(TIERS) for name in names}
FORBIDDEN = {"torchvision", "timm", "tensorflow", "lerobot"}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    assert part in RANK, f"{part} has no place in the order; add it to TIERS"
    for name in imports(path):
        root, *rest = name.split(".")
        assert root not in FORBIDDEN, f"{path.name} imports {name}"
        if root == "spatial_forcing" and rest:
            assert RANK[rest[0]] <= RANK[part], (
                f"{path.relative_to(PACKAGE)} imports {name}, which comes later"
            )
