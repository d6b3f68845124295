"""`spatial-forcing cache build | info | verify | prune | crops`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from accelerate import PartialState
from rich.console import Console

from spatial_forcing.data import Dataset
from spatial_forcing.data.augment import Augment
from spatial_forcing.data.info import parse_keys
from spatial_forcing.errors import DataError
from spatial_forcing.teachers import load_teacher
from spatial_forcing.teachers.cache import cache_info, prune_cache, verify_cache
from spatial_forcing.teachers.cache.build import BASIS_FRAMES, build_cache
from spatial_forcing.teachers.cache.codec import CacheDtype
from spatial_forcing.teachers.cache.source import dataset_source
from spatial_forcing.teachers.crops import crop_agreement

Folder = Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True)
class BuildOptions:
    """The frames to encode, the teacher, and the storage format.

    Attributes:
        dataset: LeRobot v3.0 dataset.
        output: folder of the cache.
        keys: `NAME=FEATURE` where the dataset calls a feature otherwise.
        episodes: encode these only; default all.
        teacher: a registered name, a local checkpoint, or a hub id.
        cameras: ordered; default all of the dataset's.
        layers: of the teacher, negative from the end.
        dtype: int8 stores one scale for each token; int4, with channels only, half a byte for all but the
            leading
            sixth of them.
        channels: store that many directions of the features instead of all channels. With VGGT-1B a row is
            then a sixteenth: 436 in int4, or 256 in int8, which is less faithful.
        standardise: with channels: standardise the teacher's channels before the directions are fitted.
        basis_frames: frames that they are fitted on.
        batch_size: frames in one call of the teacher.
        resolution: pixels on a side at which the teacher encodes; default its own.
        framing: of frames that are not square: alone, or with white borders as in the released recipe.
        teacher_dtype: arithmetic of the teacher.
        memory_gib: activations of the teacher to stay below; larger batches are encoded in parts.
        compile: run the teacher through torch.compile.
        device: where it runs; default this process's GPU, or the CPU where there is none.
        replace_changed: build changed episodes again instead of refusing.
    """

    dataset: Path
    output: Path
    keys: tuple[str, ...] = ()
    episodes: tuple[int, ...] | None = None
    teacher: str = "vggt-nano"
    cameras: tuple[str, ...] | None = None
    layers: tuple[int, ...] = (-1,)
    dtype: CacheDtype = "bf16"
    channels: int | None = None
    standardise: bool = False
    basis_frames: int = BASIS_FRAMES
    batch_size: int = 8
    resolution: int | None = None
    framing: Literal["fit", "pad"] = "fit"
    teacher_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    memory_gib: float = 2.0
    compile: bool = False
    device: str | None = None
    replace_changed: bool = False


def build(options: tyro.conf.OmitArgPrefixes[BuildOptions]) -> None:
    """Encode a dataset once, so that training needs no teacher; the same command resumes or extends."""
    dataset = Dataset.open(options.dataset, keys=parse_keys(options.keys))
    state = PartialState(cpu=options.device == "cpu")
    teacher = load_teacher(
        options.teacher,
        resolution=options.resolution,
        dtype=options.teacher_dtype,
        device=options.device or state.device,
        framing=options.framing,
        memory=int(options.memory_gib * 2**30),
        compile=options.compile,
        dataset=dataset,
    )
    build_cache(
        teacher,
        dataset_source(dataset, options.cameras, episodes=options.episodes),
        options.output,
        layers=options.layers,
        dtype=options.dtype,
        channels=options.channels,
        standardise=options.standardise,
        basis_frames=options.basis_frames,
        batch_size=options.batch_size,
        replace_changed=options.replace_changed,
    )
    if state.is_main_process:
        info(options.output)


def info(folder: Folder) -> None:
    """Print a cache's header and size.

    Args:
        folder: of the cache.
    """
    facts = {"folder": str(folder), **asdict(cache_info(folder))}
    if facts["header"]["basis"] is not None:
        del facts["header"]["basis"]["mean"]  # a number for every channel
    Console().print_json(data=facts)


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


def prune(folder: Folder, dataset: Path | None = None, dry_run: bool = False) -> None:
    """Drop what no reader uses: leftovers of interrupted builds, damaged rows, episodes that are gone.

    Args:
        folder: of the cache.
        dataset: also drop episodes that this dataset no longer has as they were.
        dry_run: only say what would be dropped.
    """
    source = None
    if dataset is not None:
        source = dataset_source(Dataset.open(dataset), cache_info(folder).header.cameras)
    found = prune_cache(folder, source, dry_run=dry_run)
    console = Console(soft_wrap=True, highlight=False)
    verb = "would free" if dry_run else "freed"
    console.print(f"{folder}: {verb} {found.bytes / 2**20:,.1f} MiB")
    for what, things in (
        ("files left by interrupted builds", [path.name for path in found.leftovers]),
        ("episodes with damaged rows; the next build encodes them again", found.damaged),
        ("episodes that the dataset no longer has as they were", found.gone),
    ):
        if things:
            console.print(f"  {what}: {', '.join(map(str, things))}", markup=False)


@dataclass(frozen=True)
class CropOptions:
    """The frames and the augmentation to measure.

    Attributes:
        dataset: LeRobot v3.0 dataset.
        teacher: a registered name, a local checkpoint, or a hub id.
        cameras: ordered; default all of the dataset's.
        layer: of the teacher.
        frames: evenly over the dataset.
        augment: what the student's images go through.
        seed: of the augmentation.
        resolution: pixels on a side at which the teacher encodes; default its own.
        device: where it runs.
    """

    dataset: Path
    teacher: str = "vggt-nano"
    cameras: tuple[str, ...] | None = None
    layer: int = -1
    frames: int = 64
    augment: Augment = field(default_factory=Augment)
    seed: int = 0
    resolution: int | None = None
    device: str = "cpu"


def crops(options: tyro.conf.OmitArgPrefixes[CropOptions]) -> None:
    """Cosine between the features of augmented images and those a cache delivers for them."""
    teacher = load_teacher(options.teacher, resolution=options.resolution, device=options.device)
    source = dataset_source(Dataset.open(options.dataset), options.cameras)
    found = crop_agreement(
        teacher, source, options.augment, layer=options.layer, frames=options.frames, seed=options.seed
    )
    Console().print_json(data=asdict(found))
