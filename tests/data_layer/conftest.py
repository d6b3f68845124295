"""Small datasets to test on."""

from pathlib import Path

import numpy as np
import pytest

from spatial_forcing.data import Dataset, DatasetWriter

LENGTHS = (6, 9, 4)
SIZES = {"front": (24, 32), "wrist": (16, 16)}


def picture(episode: int, frame: int, camera: str) -> np.ndarray:
    """A smooth image (so that video keeps it) that differs between episodes, frames and cameras."""
    height, width = SIZES[camera]
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    channels = [x * 120 + frame * 8, y * 120 + episode * 40, (x + y) * 60 + 10 * len(camera)]
    return np.stack(channels, -1).astype(np.uint8)


def frame_of(episode: int, frame: int, *, depth: bool = False) -> dict:
    content = {
        "images": {camera: picture(episode, frame, camera) for camera in SIZES},
        "state": np.array([episode, frame, 0.5, -1], dtype=np.float32),
        "action": np.array([frame, 10 * episode], dtype=np.float32),
    }
    if depth:
        content["depth"] = {c: np.full(size, 1 + frame / 8, np.float32) for c, size in SIZES.items()}
        content["extrinsics"] = {c: np.eye(4) * (frame + 1) for c in SIZES}
    return content


def new_writer(root: Path, *, depth: bool = False, **options) -> DatasetWriter:
    intrinsics = {c: np.diag([50.0, 50.0, 1.0]) for c in SIZES} if depth else None
    return DatasetWriter.create(
        root,
        fps=20,
        cameras=SIZES,
        state_dim=4,
        action_dim=2,
        depth=depth,
        extrinsics=depth,
        intrinsics=intrinsics,
        **options,
    )


def add_episode(writer: DatasetWriter, episode: int, length: int, *, depth: bool = False) -> None:
    for frame in range(length):
        writer.add_frame(frame_of(episode, frame, depth=depth), task=f"task {episode % 2}")
    writer.save_episode()


def write_dataset(root: Path, *, depth: bool = False, **options) -> Path:
    writer = new_writer(root, depth=depth, **options)
    for episode, length in enumerate(LENGTHS):
        add_episode(writer, episode, length, depth=depth)
    writer.finalize()
    return root


@pytest.fixture
def root(tmp_path) -> Path:
    return write_dataset(tmp_path / "dataset")


@pytest.fixture
def dataset(root) -> Dataset:
    return Dataset.open(root)


@pytest.fixture
def build():
    """The helpers above, for tests that build datasets of their own."""
    return _Build


class _Build:
    LENGTHS, SIZES = LENGTHS, SIZES
    picture = staticmethod(picture)
    frame_of = staticmethod(frame_of)
    new_writer = staticmethod(new_writer)
    add_episode = staticmethod(add_episode)
    write_dataset = staticmethod(write_dataset)
