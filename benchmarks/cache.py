"""The feature cache: reads a second, size of a row, fidelity, and what building costs over the teacher alone.

python -m benchmarks.cache --dataset FOLDER            # a LeRobot dataset, such as `data record` makes

Reads are of rows as VGGT-1B gives them (16 x 16 tokens, two cameras; a sixteenth of raw bf16), random
frames in batches, page cache warm; their content is noise, which costs the same. Fidelity and build time are
those of vggt-nano on the dataset.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import tyro

from benchmarks.common import show
from spatial_forcing.alignment import Views
from spatial_forcing.data import Dataset, DecodedStore
from spatial_forcing.protocols import Teacher
from spatial_forcing.teachers import load_teacher
from spatial_forcing.teachers.cache import CachedTeacher, FrameSource, build_cache, cache_info, dataset_source
from spatial_forcing.teachers.cache.basis import Basis, save_bases
from spatial_forcing.teachers.cache.codec import CacheDtype
from spatial_forcing.teachers.cache.encode import read_views, spread_frames
from spatial_forcing.teachers.cache.format import (
    CachedEpisode,
    CacheHeader,
    Shard,
    TeacherFacts,
    encode_rows,
)

CAMERAS = ("front", "wrist")
GRID, WIDTH = 16, 2048
SIXTEENTH: dict[CacheDtype, int] = {"int8": 256, "int4": 436}
"""Channels in which a row is a sixteenth of VGGT-1B's 2048 in bf16."""


def noise_cache(folder: Path, frames: int, dtype: CacheDtype) -> Path:
    """Rows of VGGT-1B's sizes in a basis; their content is noise."""
    channels = SIXTEENTH[dtype]
    facts = TeacherFacts("noise", "0" * 64, "Apache-2.0", WIDTH, 24, 14, 224)
    vectors = torch.linalg.qr(torch.randn(WIDTH, channels)).Q.contiguous()
    basis = save_bases(folder, {23: Basis(torch.ones(WIDTH), vectors)})
    header = CacheHeader(
        facts, CAMERAS, (23,), (GRID, GRID), channels, dtype, (224, 224), "noise", basis=basis
    )
    header.save(folder)
    torch.manual_seed(0)
    some = torch.randn(32, len(CAMERAS), GRID, GRID, channels)
    rows = np.resize(encode_rows(header, [some], np.ones((32, len(CAMERAS)), bool)), frames)
    data = folder / "shard-00000.bin"
    rows.tofile(data)
    Shard(data, frames, (CachedEpisode(0, 0, frames, "noise", 0, 0),)).save()
    return folder


def main(
    dataset: Path | None = None,
    episodes: int | None = None,
    frames: int = 2048,
    batch: int = 32,
    seconds: float = 3.0,
    workers: tuple[int, ...] = (1, 2),
    repeats: int = 3,
    device: str = "cpu",
) -> None:
    """Measure all of it.

    Args:
        dataset: LeRobot dataset for fidelity and build time; None leaves those out.
        episodes: of it, the first ones; None: all.
        frames: rows of the cache that is read.
        batch: frames a read.
        seconds: of each measurement of reads.
        workers: numbers of processes that read at once.
        repeats: measurements.
        device: where features are delivered and, for the build, the teacher runs.
    """
    torch.set_num_threads(1)
    for dtype in SIXTEENTH:
        with tempfile.TemporaryDirectory() as folder:
            cache = noise_cache(Path(folder), frames, dtype)
            sizes(cache_info(cache).header)
            for count in workers:
                rates = [read_rates(cache, count, batch, seconds, device) for _ in range(repeats)]
                walls, busies = zip(*rates, strict=True)
                show(f"view-frames read a second, {dtype}, {count} at once", walls, "aim 2,000 in one")
                show("  the same for each processor second of one", busies)
    if dataset is not None:
        nano(dataset, episodes, repeats, device)


def sizes(header: CacheHeader) -> None:
    """Bytes a row, against raw bf16 rows of all channels."""
    raw = len(header.cameras) * GRID * GRID * WIDTH * 2
    size = header.row.itemsize
    name = f"{header.channels} channels in {header.dtype}"
    print(f"row of two views, {name}: {size:,} bytes, raw bf16 {raw:,}: 1/{raw / size:.2f}")


def read_rates(folder: Path, processes: int, batch: int, seconds: float, device: str) -> tuple[float, float]:
    """View-frames per second of `processes` readers together, and a processor second of one of them."""
    if processes == 1:
        read(folder, batch, 0.2, device, 0)  # the page cache
        return read(folder, batch, seconds, device, 0)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for time_limit in (0.2, seconds):
            waiting = [pool.submit(read, folder, batch, time_limit, device, i) for i in range(processes)]
            done = [future.result() for future in waiting]
    return sum(wall for wall, _ in done), float(np.mean([busy for _, busy in done]))


def read(folder: Path, batch: int, seconds: float, device: str, seed: int) -> tuple[float, float]:
    """View-frames per second, and a processor second, of one reader."""
    torch.set_num_threads(1)
    cached, rng = CachedTeacher(folder, device=device), np.random.default_rng(seed)
    images, count = torch.zeros(batch, len(CAMERAS), 3, 8, 8), 0
    started, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        keys = torch.from_numpy(rng.integers(0, len(cached), batch))
        (features,) = cached.features(Views.create(images, CAMERAS, keys=keys))
        count += features.shape[0] * features.shape[1]
    if device != "cpu":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - started), count / (time.process_time() - used)


def nano(folder: Path, episodes: int | None, repeats: int, device: str) -> None:
    """Fidelity of a sixteenth of raw bf16, in both ways, and the cost of building over encoding."""
    dataset, teacher = Dataset.open(folder), load_teacher("vggt-nano", device=device)
    source = dataset_source(dataset)
    store = dataset_source(dataset, images=DecodedStore.build(dataset, dataset.cameras).images)
    for each in (source, store):
        each.episodes = each.episodes[:episodes]
    formats: tuple[tuple[CacheDtype, int | None], ...] = (
        ("bf16", None),
        ("int8", None),
        ("int8", 28),
        ("int4", 48),
    )
    with tempfile.TemporaryDirectory() as built:
        for dtype, channels in formats:
            path = Path(built) / f"{dtype}-{channels}"
            header = cache_info(
                build_cache(teacher, store, path, dtype=dtype, channels=channels, progress=False)
            ).header
            tokens = len(header.cameras) * header.grid[0] * header.grid[1]
            ratio = 2 * tokens * header.teacher.dim / header.row.itemsize
            figures = {k: round(v, 5) for k, v in (header.fidelity or {})["3"].items()}
            print(f"vggt-nano, {dtype}, {header.channels} channels: 1/{ratio:.2f} of raw bf16, {figures}")
        for name, frames in (("decoded store", store), ("PNG in parquet", source)):
            walls, busies = [], []
            for number in range(repeats):
                alone, alone_busy = encode_seconds(teacher, frames)
                started, used = time.perf_counter(), time.process_time()
                path = Path(built) / f"{name}-{number}"
                build_cache(teacher, frames, path, batch_size=16, progress=False)
                walls.append(100 * ((time.perf_counter() - started) / alone - 1))
                busies.append(100 * ((time.process_time() - used) / alone_busy - 1))
            show(f"build over the teacher alone, %, frames from {name}", walls, "aim 5 or less")
            show("  the same in processor time", busies)


def encode_seconds(teacher: Teacher, source: FrameSource) -> tuple[float, float]:
    """Wall and processor seconds the teacher takes for all frames, reading them not counted."""
    indices = spread_frames(source, 10**9)
    wall = busy = 0.0
    for start in range(0, len(indices), 16):
        views, _ = read_views(source, indices[start : start + 16], source.cameras)
        started, used = time.perf_counter(), time.process_time()
        teacher.features(views)
        wall, busy = wall + time.perf_counter() - started, busy + time.process_time() - used
    return wall, busy


if __name__ == "__main__":
    tyro.cli(main)
