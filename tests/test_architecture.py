"""Imports point one way, module by module, and nothing forbidden is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "spatial_forcing"

TIERS = [
    {"errors", "memory", "precision", "stem"},
    {"registry", "storage", "progress"},
    {"alignment"},
    {"protocols"},
    {"forcing", "envs"},
    {"data"},  # recording drives environments
    {"teachers"},  # a cache reads datasets
    {"students", "evaluation"},
    {"training"},
    {"analysis", "serving"},
    {"nano_teacher"},
    {"experiments", "doctor"},
    {"commands"},
    {"cli"},
]
"""What lies lower is imported by what lies higher, never by its neighbours of the same tier."""
RANK = {name: rank for rank, names in enumerate(TIERS) for name in names}
FORBIDDEN = {"torchvision", "timm", "tensorflow", "lerobot"}


def name_of(path: Path) -> str:
    return ".".join(("spatial_forcing", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    )


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> Iterator[str]:
    """Modules that `path` imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield module if module in MODULES else node.module


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    part = [*name.split("."), ""][1]
    if not part:
        return
    assert part in RANK, f"{part} has no place in the order; add it to TIERS"
    for imported in imports(MODULES[name]):
        root, *rest = imported.split(".")
        assert root not in FORBIDDEN, f"{name} imports {imported}"
        if root == "spatial_forcing" and rest and rest[0] != part:
            assert RANK[rest[0]] < RANK[part], f"{name} imports {imported}, which does not lie below it"


def test_no_two_modules_import_each_other():
    graph = {name: {i for i in imports(path) if i in MODULES} - {name} for name, path in MODULES.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))
    assert set(order) == set(MODULES)
