"""Your own model on your own data, with the teacher's features from a cache: `docs/adapt.md`, last section.

    python examples/own_data.py          # seconds on a CPU; the features stay in runs/own/features

The data is a few arrays, no LeRobot dataset; the model is the GIT VLA of adapt_any_vla.py. The teacher runs
once for all frames. In training nothing but the frames' numbers is needed to find their features.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from adapt_any_vla import ACTION_DIM, CHUNK, FIRST_WORD, SIZE, git
from numpy.typing import NDArray
from torch import Tensor, nn

from spatial_forcing import SpatialForcing, Views, as_student, layout_from_offset, load_teacher
from spatial_forcing.teachers.cache import CachedTeacher, SourceEpisode, build_cache


# [source]
class MyFrames:
    """Frames of all episodes one after the other; a `FrameSource`, which is what `build_cache` reads."""

    identity = "my recordings"
    wanted = None  # all episodes

    def __init__(self, recordings: dict[str, NDArray[np.uint8]], lengths: list[int]) -> None:
        self.recordings = recordings  # camera -> (frames, H, W, 3)
        self.cameras = tuple(recordings)
        self.episodes = []
        for number, length in enumerate(lengths):
            first = sum(lengths[:number])
            pixels = [array[first : first + length].tobytes() for array in recordings.values()]
            digest = hashlib.sha256(b"".join(pixels)).hexdigest()  # a changed episode is noticed
            self.episodes.append(SourceEpisode(first, length, number, digest))

    def images(self, indices: NDArray[np.int64], camera: str) -> NDArray[np.uint8]:
        """Frames by number, (n, H, W, 3)."""
        return self.recordings[camera][indices]

    def present(self, indices: NDArray[np.int64], camera: str) -> NDArray[np.bool_]:
        """Every camera was on all the time."""
        return np.ones(len(indices), dtype=bool)


# [end]


def recorded(lengths: list[int]) -> MyFrames:
    """Blocks of colour that stand for two cameras."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, sum(lengths), 8, 8, 3), dtype=np.uint8)
    views = blocks.repeat(SIZE // 8, axis=2).repeat(SIZE // 8, axis=3)
    return MyFrames({"front": views[0], "wrist": views[1]}, lengths)


def batches(frames: MyFrames, steps: int, size: int = 4) -> Iterator[dict[str, Tensor]]:
    """What your loader gives, with the frames' numbers as `index`."""
    generator = torch.Generator().manual_seed(0)
    count = sum(episode.length for episode in frames.episodes)
    for _ in range(steps):
        index = torch.randint(count, (size,), generator=generator)
        images = np.stack([frames.images(index.numpy(), camera) for camera in frames.cameras], 1)
        pixels = torch.from_numpy(images).movedim(-1, 2).float() / 255
        yield {
            "index": index,
            "pixel_values": pixels * 2 - 1,
            "input_ids": torch.randint(FIRST_WORD, 100, (size, 7), generator=generator),
            "action": pixels.mean((1, 2, 3, 4))[:, None, None].expand(size, CHUNK, ACTION_DIM),
        }


def forced(model: nn.Module, frames: MyFrames, teacher: CachedTeacher) -> SpatialForcing:
    """The adapter that the doctor printed, with keys."""
    # [student]
    student = as_student(
        model,
        blocks=model.vlm.encoder.layer,
        layout=lambda batch: layout_from_offset(len(batch["pixel_values"]), 2, (4, 4), start=1, stride=17),
        views=lambda batch: Views.create(
            batch["pixel_values"] * 0.5 + 0.5, frames.cameras, keys=batch["index"]
        ),
        # The model does not know `index`.
        loss=lambda model, batch: model(**{k: v for k, v in batch.items() if k != "index"}).loss,
    )
    forcing = SpatialForcing(student, teacher, student_dim=48)
    # [end]
    return forcing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="vggt-nano", help="registered name, hub id or local folder")
    parser.add_argument("--output", type=Path, default=Path("runs/own"))
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    frames, folder = recorded([12, 8, 16]), arguments.output / "features"
    # [cache]
    build_cache(load_teacher(arguments.teacher), frames, folder)  # adds what is missing
    teacher = CachedTeacher(folder, source=frames)  # refuses the cache of other frames
    # [end]
    forcing = forced(git().model, frames, teacher)
    optimizer = torch.optim.AdamW(forcing.parameters(), lr=1e-3)
    for step, batch in enumerate(batches(frames, arguments.steps)):
        loss, metrics = forcing(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}, cosine to the teacher {metrics['cosine'].item():.3f}")
    print(f"exported: {type(forcing.export()).__name__}; features: {folder}")


if __name__ == "__main__":
    main()
