"""`spatial-forcing cache build | info | verify`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from spatial_forcing.data import Dataset
from spatial_forcing.errors import DataError
from spatial_forcing.teachers import load_teacher
from spatial_forcing.teachers.cache import cache_info, verify_cache
from spatial_forcing.teachers.cache_build import build_cache
from spatial_forcing.teachers.cache_source import dataset_source

Folder = Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True)
class BuildOptions:
    """What to encode, and how.

    Attributes:
        dataset: LeRobot v3.0 dataset.
        output: folder of the cache.
        teacher: a registered name, a local checkpoint, or a hub id.
        cameras: ordered; default all of the dataset's.
        layers: of the teacher, negative from the end.
        dtype: int8 stores one scale a token.
        batch_size: frames a call of the teacher.
        resolution: pixels on a side at which the teacher encodes; default its own.
        teacher_dtype: arithmetic of the teacher.
        device: where it runs.
        replace_changed: build changed episodes again instead of refusing.
    """

    dataset: Path
    output: Path
    teacher: str = "vggt-nano"
    cameras: tuple[str, ...] | None = None
    layers: tuple[int, ...] = (-1,)
    dtype: Literal["bf16", "int8"] = "bf16"
    batch_size: int = 8
    resolution: int | None = None
    teacher_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = "cpu"
    replace_changed: bool = False


def build(options: tyro.conf.OmitArgPrefixes[BuildOptions]) -> None:
    """Encode a dataset once, so that training needs no teacher; the same command resumes or extends."""
    dataset = Dataset.open(options.dataset)
    teacher = load_teacher(
        options.teacher, resolution=options.resolution, dtype=options.teacher_dtype, device=options.device
    )
    build_cache(
        teacher,
        dataset_source(dataset, options.cameras),
        options.output,
        layers=options.layers,
        dtype=options.dtype,
        batch_size=options.batch_size,
        replace_changed=options.replace_changed,
    )
    info(options.output)


def info(folder: Folder) -> None:
    """Print a cache's header and size.

    Args:
        folder: of the cache.
    """
    found = cache_info(folder)
    console = Console()
    console.print_json(data={"folder": str(folder), **asdict(found)})


def verify(folder: Folder) -> None:
    """Read every shard and compare it with its checksum.

    Args:
        folder: of the cache.
    """
    problems = verify_cache(folder)
    console = Console(soft_wrap=True)
    for problem in problems:
        console.print(problem, markup=False)
    if problems:
        raise DataError(f"{folder} has {len(problems)} damaged shards, listed above; build them again.")
    console.print(f"{folder}: every shard is as it was written.")
