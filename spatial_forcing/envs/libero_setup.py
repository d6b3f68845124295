"""Importing LIBERO without questions, finding its assets, and reading its initial states safely."""

from __future__ import annotations

import codecs
import importlib
import importlib.util
import logging
import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spatial_forcing.envs.gl import ensure_gl
from spatial_forcing.envs.libero_stand_ins import STAND_INS, make_stand_ins, stand_in_folder, suites_of
from spatial_forcing.envs.libero_tasks import COUNTS, parse_task
from spatial_forcing.errors import ConfigError, EnvironmentSetupError
from spatial_forcing.registry import unknown

ASSETS_VARIABLE = "SF_LIBERO_ASSETS"
DOWNLOADED = Path.home() / ".cache" / "libero" / "assets"
"""Where LIBERO itself downloads them to."""


def package_folder() -> Path:
    """Where LIBERO's bddl files and initial states are, found without importing it.

    Raises:
        EnvironmentSetupError: LIBERO is not installed.
    """
    spec = importlib.util.find_spec("libero")
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentSetupError(
            "LIBERO is not installed. `pip install hf-libero` would pull another torch; run: "
            "pip install --no-deps hf-libero==0.1.4 robosuite==1.4.0 bddl==1.0.1, then "
            'pip install "spatial-forcing[libero]"'
        )
    return Path(next(iter(spec.submodule_search_locations))) / "libero"


def find_assets() -> Path:
    """The folder of meshes and textures.

    `$SF_LIBERO_ASSETS`; without it the package's own, its download, or stand-ins that were made before.

    Raises:
        EnvironmentSetupError: none is there; says how to get them.
    """
    wanted = os.environ.get(ASSETS_VARIABLE)
    places = [Path(wanted)] if wanted else [package_folder() / "assets", DOWNLOADED, stand_in_folder()]
    folder = next((place for place in places if (place / "scenes").is_dir()), None)
    if folder is None:
        searched = " or ".join(str(place) for place in places)
        raise EnvironmentSetupError(
            f"LIBERO's assets are not in {searched} (no scenes/ there). Download the dataset repository "
            f"lerobot/libero-assets from the hub, unpack it, and set {ASSETS_VARIABLE} to its folder; or "
            "give --stand-ins to run libero_spatial and libero_object with plain stand-ins that are made "
            "here."
        )
    return folder


def ensure_assets() -> Path:
    """`find_assets`, and where nothing is found stand-ins, made in the user's cache folder.

    Raises:
        EnvironmentSetupError: LIBERO is not installed, or `$SF_LIBERO_ASSETS` names a folder without assets.
    """
    try:
        return find_assets()
    except EnvironmentSetupError:
        if os.environ.get(ASSETS_VARIABLE):
            raise
        package_folder()
        return make_stand_ins()


def require_suite(task: str) -> None:
    """Raise `EnvironmentSetupError` where the assets in use are stand-ins that lack `task`'s objects."""
    suite, _ = parse_task(task)
    assets = find_assets()
    suites = suites_of(assets)
    if suites is not None and suite not in suites:
        raise EnvironmentSetupError(
            f"{task}: the stand-ins in {assets} are made for {' and '.join(suites)}. Download the dataset "
            f"repository lerobot/libero-assets from the hub, and set {ASSETS_VARIABLE} to its folder."
        )


def uses_stand_ins() -> bool:
    """Whether the assets in use are marked as stand-ins: no result compares with published ones then."""
    return (find_assets() / STAND_INS).is_file()


def marks() -> dict[str, str]:
    """What evaluation results on LIBERO are marked with."""
    return {"assets": "stand-ins"} if uses_stand_ins() else {}


@cache
def libero() -> ModuleType:
    """The module that defines LIBERO's `ControlEnv`, imported without its question on standard input.

    Raises:
        EnvironmentSetupError: LIBERO, its assets or a GL library are missing.
    """
    # Before the import: robosuite chooses its GL backend when it is imported.
    ensure_gl()
    assets = find_assets()
    default = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero"))
    if not (default / "config.yaml").is_file():
        _write_config(default)
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    try:
        importlib.import_module("libero.libero")._assets_path_cache = str(assets)  # type: ignore[attr-defined]
        return importlib.import_module("libero.libero.envs.env_wrapper")
    except ImportError as error:
        raise EnvironmentSetupError(
            f'LIBERO cannot be imported ({error}). Run: pip install "spatial-forcing[libero]"'
        ) from error


def _write_config(folder: Path) -> None:
    root = package_folder()
    paths = {
        "benchmark_root": root,
        "bddl_files": root / "bddl_files",
        "init_states": root / "init_files",
        "datasets": root.parent / "datasets",
        "assets": root / "assets",
    }
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{name}: {path}\n" for name, path in paths.items())
    (folder / "config.yaml").write_text(lines, encoding="utf-8")


def task_entry(task: str) -> str:
    """The benchmark's own name of a task, e.g. `pick_up_the_black_bowl_..._place_it_on_the_plate`."""
    suite, number = parse_task(task)
    return _task_map()[suite][number]


def task_of_entry(entry: str) -> str:
    """The inverse of `task_entry`. Raises `ConfigError` for a name that no suite has."""
    for suite, entries in _task_map().items():
        if suite in COUNTS and entry in entries:
            return f"{suite}-{entries.index(entry)}"
    raise unknown("LIBERO task", entry, [e for s, es in _task_map().items() if s in COUNTS for e in es])


@cache
def _task_map() -> dict[str, list[str]]:
    # Loaded from its file: importing the package would ask questions and load the simulator.
    path = package_folder() / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("_libero_suite_task_map", path)
    if spec is None or spec.loader is None:
        raise EnvironmentSetupError(f"{path} is not there; install hf-libero==0.1.4.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    entries: dict[str, list[str]] = module.libero_task_map
    return entries


def instruction_of(entry: str) -> str:
    """The instruction that a task's name spells, as the benchmark derives it."""
    words = entry.split("_")
    if entry[:1].isupper():  # LIBERO-100: the scene's name comes first
        scene = next(i for i, word in enumerate(words) if word.startswith("SCENE"))
        words = words[scene + 1 :]
    return " ".join(words)


def bddl_file(task: str) -> Path:
    """The file that describes a task's scene and goal."""
    suite, _ = parse_task(task)
    return package_folder() / "bddl_files" / suite / f"{task_entry(task)}.bddl"


def init_states(task: str) -> NDArray[np.float64]:
    """The official initial simulator states, (50, size), read without running code from the file.

    Raises:
        ConfigError: the file holds anything but such an array.
    """
    suite, _ = parse_task(task)
    path = package_folder() / "init_files" / suite / f"{task_entry(task)}.pruned_init"
    core: Any = getattr(np, "_core", None) or np.core  # numpy 2, numpy 1
    # The files are pickles of one array, written by numpy 1.
    allowed: list[Any] = [
        (core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        type(np.dtype(np.float64)),
        codecs.encode,
    ]
    with torch.serialization.safe_globals(allowed):
        try:
            states = torch.load(path, weights_only=True)
        except Exception as error:  # unpickling raises many types
            raise ConfigError(f"{path} cannot be read safely ({error}); install hf-libero again.") from error
    array = np.asarray(states, np.float64)
    if array.ndim != 2:
        raise ConfigError(f"{path} holds an array of shape {array.shape}; expected (states, size).")
    return array
