"""A synthetic depth dataset: a wall whose distance is its brightness, and a student that can copy it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from spatial_forcing.data import Dataset, DatasetWriter
from tests.fakes import FakeStudent

SIZE = 24


def room(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image and its depth: near is bright; 3 x 3 blocks of constant depth in 0.3 .. 3 metres."""
    log = rng.uniform(np.log(0.3), np.log(3.0), (3, 3))
    log = np.kron(log, np.ones((SIZE // 3, SIZE // 3)))
    bright = (np.log(3.0) - log) / np.log(10.0)
    image = np.repeat((bright * 255).round().astype(np.uint8)[..., None], 3, axis=2)
    return image, np.exp(log).astype(np.float32)


def write_rooms(root: Path, episodes: int = 10, frames: int = 8, moving: bool = False) -> Dataset:
    """Actions are zero, or with `moving` random except for the last number."""
    rng = np.random.default_rng(0)
    moves = np.random.default_rng(1)
    scale = np.array([1, 1, 0] if moving else [0, 0, 0], np.float32)
    with DatasetWriter.create(
        root,
        fps=10,
        cameras={"front": (SIZE, SIZE), "wrist": (SIZE, SIZE)},
        state_dim=4,
        action_dim=3,
        depth=True,
    ) as writer:
        for _ in range(episodes):
            for _ in range(frames):
                front, wrist = room(rng), room(rng)
                writer.add_frame(
                    {
                        "images": {"front": front[0], "wrist": wrist[0]},
                        "depth": {"front": front[1], "wrist": wrist[1]},
                        "state": np.zeros(4, np.float32),
                        "action": scale * moves.standard_normal(3).astype(np.float32),
                    },
                    "measure the room",
                )
            writer.save_episode()
    return Dataset.open(root)


class SeeingStudent(FakeStudent):
    """Its tokens carry the patch's colour; with `blind` they carry nothing."""

    def __init__(self, blind: bool = False) -> None:
        torch.manual_seed(0)
        super().__init__()
        with torch.no_grad():
            self.embed.weight.mul_(0.0 if blind else 1.0)
