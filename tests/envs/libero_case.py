"""LIBERO for tests: on `$SF_LIBERO_ASSETS`, else on stand-ins that are made here."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from functools import cache
from pathlib import Path

import pytest

from spatial_forcing.envs.libero_stand_ins import make_stand_ins

INSTALLED = all(importlib.util.find_spec(name) for name in ("libero", "robosuite", "bddl"))

needs_libero = pytest.mark.skipif(not INSTALLED, reason="LIBERO is not installed (see docs/libero.md)")


@cache
def assets() -> Path:
    """The folder of the assets, made once a test process."""
    if given := os.environ.get("SF_LIBERO_ASSETS"):
        return Path(given)
    made.append(tempfile.TemporaryDirectory())
    return make_stand_ins(Path(made[0].name) / "stand-ins")


made: list[tempfile.TemporaryDirectory[str]] = []


def use_assets(monkeypatch_or_environ, folder):
    """Point LIBERO at the assets and at a configuration of the test's own."""
    monkeypatch_or_environ.setenv("SF_LIBERO_ASSETS", str(assets()))
    monkeypatch_or_environ.setenv("LIBERO_CONFIG_PATH", str(folder))
