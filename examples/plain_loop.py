"""Spatial Forcing in a plain PyTorch training loop: optimizer, schedule, clipping and checkpoints are yours.

    python examples/plain_loop.py                                   # half a minute on a CPU
    python examples/plain_loop.py --dataset data/reach --cache data/reach-vggt    # teacher from a cache
    python examples/plain_loop.py --resume                          # goes on from runs/plain/checkpoint.pt

Without --dataset a few demonstrations are recorded in Meta-World (as `spatial-forcing data record` does), or
drawn by toy_data.py where Meta-World is not installed (or with --toy). --cache names a folder of cached
teacher features; if it does not exist, it is built first, and the teacher never runs in the loop.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from toy_data import toy_dataset

from spatial_forcing import ForcingConfig, SpatialForcing, load_teacher
from spatial_forcing.data import Dataset
from spatial_forcing.data.loader import BatchLoader
from spatial_forcing.data.record import RecordConfig, record
from spatial_forcing.protocols import Teacher
from spatial_forcing.students import NanoConfig, NanoVLA
from spatial_forcing.teachers.cache import CachedTeacher, build_cache, dataset_source

ACCUMULATE = 2
"""Micro-batches of an optimizer step."""


def open_dataset(arguments: argparse.Namespace) -> Dataset:
    """The one that was named, or a small new one."""
    if arguments.dataset is not None:
        return Dataset.open(arguments.dataset)
    root = arguments.output / "data"
    if arguments.toy or find_spec("metaworld") is None:
        return Dataset.open(toy_dataset(root))
    settings = {"episodes_per_task": 2, "image_size": 64, "workers": 1}
    return Dataset.open(record(RecordConfig(root=root, tasks=("reach-v3",), **settings)))


def open_teacher(arguments: argparse.Namespace, dataset: Dataset) -> Teacher:
    """Live, or its features from disk."""
    if arguments.cache is None:
        return load_teacher(arguments.teacher)
    source = dataset_source(dataset)
    if not arguments.cache.exists():
        build_cache(load_teacher(arguments.teacher), source, arguments.cache)
    return CachedTeacher(arguments.cache, source=source)  # refuses the cache of another dataset


def save(path: Path, forcing: SpatialForcing, step: int, **states: object) -> None:
    """Student and projector apart: only the student is ever handed on."""
    content = {
        "step": step,
        "student": forcing.student.state_dict(),
        "projector": forcing.projector_state_dict(),
        "random": torch.get_rng_state(),
        **states,
    }
    beside = path.with_suffix(".partial")
    torch.save(content, beside)
    beside.replace(path)  # never half a checkpoint


def train(arguments: argparse.Namespace) -> Path:
    """Train, and return the folder of the exported policy."""
    torch.manual_seed(arguments.seed)
    dataset = open_dataset(arguments)
    sizes = {"state_dim": dataset.state.shape[1], "action_dim": dataset.action.shape[1]}
    config = NanoConfig(cameras=dataset.cameras, image_size=64, width=64, **sizes)
    student = NanoVLA.create(config, dataset.statistics(), seed=arguments.seed)
    batches = BatchLoader(
        dataset, cameras=config.cameras, chunk=config.chunk, batch_size=8, seed=arguments.seed, progress=False
    )

    # The alignment: its weight warms up over the first tenth of training, then falls.
    settings = ForcingConfig(alpha=0.5, schedule="cosine", warmup=0.1, floor=0.2)
    forcing = SpatialForcing(student, open_teacher(arguments, dataset), settings)

    # Everything below is an ordinary loop; `forcing.parameters()` are those of student and projector.
    optimizer = torch.optim.AdamW(forcing.parameters(), lr=2e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    checkpoint, start = arguments.output / "checkpoint.pt", 0
    if arguments.resume:
        stored = torch.load(checkpoint, weights_only=True)
        student.load_state_dict(stored["student"])
        forcing.load_projector_state_dict(stored["projector"])
        optimizer.load_state_dict(stored["optimizer"])
        cosine.load_state_dict(stored["scheduler"])
        torch.set_rng_state(stored["random"])
        start = stored["step"]

    for step in range(start, arguments.stop or arguments.steps):
        forcing.set_progress(step, arguments.steps)  # where the schedule of alpha is
        window = [batches.batch(step * ACCUMULATE + i) for i in range(ACCUMULATE)]
        forcing.begin_accumulation(window)  # one mean over the samples of all micro-batches
        for batch in window:
            loss, metrics = forcing(batch)  # instead of student(batch)
            (loss / ACCUMULATE).backward()
        nn.utils.clip_grad_norm_(forcing.parameters(), 1.0)
        optimizer.step()
        cosine.step()
        optimizer.zero_grad()
        shown = {k: v.item() for k, v in metrics.items() if k in ("action_loss", "cosine", "alpha")}
        print(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in shown.items()))
        if (step + 1) % 10 == 0 or step + 1 in (arguments.steps, arguments.stop):
            states = {"optimizer": optimizer.state_dict(), "scheduler": cosine.state_dict()}
            save(checkpoint, forcing, step + 1, **states)

    forcing.export().save_pretrained(arguments.output / "policy")
    return arguments.output / "policy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/plain"))
    parser.add_argument("--dataset", type=Path, help="a LeRobot v3.0 dataset; default: a small new one")
    parser.add_argument("--toy", action="store_true", help="draw the small new one, do not simulate it")
    parser.add_argument("--teacher", default="vggt-nano", help="registered name, hub id or local folder")
    parser.add_argument("--cache", type=Path, help="folder of cached features; built if it does not exist")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--stop", type=int, help="stop after so many, for --resume to go on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    print(f"exported to {train(arguments)}: the bare policy, without projector and teacher")


if __name__ == "__main__":
    main()
