"""A 2D teacher that saw the very images that vggt-nano saw, and nothing of their geometry.

    python studies/compare/image_teacher.py --scenes runs/nano/scenes/train runs/nano/scenes/near \
        --output runs/compare/image-teacher

The control for a 3D teacher where no large 2D one can be loaded, and the stricter one: same width, number of
blocks, patch size and rendered scenes (`spatial-forcing teacher pretrain` leaves them in its folder), but the
task is to fill in masked patches (SimMIM, arXiv 2111.09886). What it writes is a DINOv2 checkpoint of
transformers, for `compare --image-teacher FOLDER`. Half an hour on one core; the same command resumes.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from spatial_forcing.nano_teacher.pretrain import augment
from spatial_forcing.nano_teacher.scenes import SceneDataset
from spatial_forcing.progress import progress_bar
from spatial_forcing.storage import replace_file, write_json

MASKED = 0.6
"""Share of the patches that are hidden, as in SimMIM."""
WARMUP = 0.05
"""Of the training time."""


@dataclass(frozen=True)
class Settings:
    """How it is trained.

    Attributes:
        scenes: folders of rendered scenes.
        output: folder of the checkpoint.
        minutes: of training, over all resumptions.
        scenes_per_step: all views of each are used.
        learning_rate: of AdamW at its peak.
        save_minutes: between checkpoints.
        seed: of weights, scenes and masks.
    """

    scenes: tuple[Path, ...]
    output: Path
    minutes: float = 30.0
    scenes_per_step: int = 16
    learning_rate: float = 1e-3
    save_minutes: float = 2.0
    seed: int = 0


class MaskedImages(nn.Module):
    """DINOv2's architecture at vggt-nano's size, and a linear layer from hidden patches to their pixels."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.config = Dinov2Config(
            hidden_size=128,
            num_hidden_layers=8,
            num_attention_heads=4,
            mlp_ratio=4,
            image_size=side,
            patch_size=16,
            use_mask_token=True,
        )
        self.encoder = Dinov2Model(self.config)
        self.pixels = nn.Linear(128, 3 * 16 * 16)

    def forward(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Normalised `images` (N, 3, S, S), `hidden` (N, patches) bool -> mean error of hidden pixels."""
        tokens = self.encoder(images, bool_masked_pos=hidden).last_hidden_state[:, 1:]
        patches = F.unfold(images, 16, stride=16).transpose(1, 2)
        patches = F.layer_norm(patches, patches.shape[-1:])
        return F.l1_loss(self.pixels(tokens[hidden]), patches[hidden])


def main(settings: tyro.conf.OmitArgPrefixes[Settings]) -> None:
    """Train, and write a checkpoint that `load_teacher` reads."""
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    sources = [SceneDataset(folder) for folder in settings.scenes]
    model = MaskedImages(sources[0].batch(torch.tensor([0])).images.shape[-1])
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=0.05)
    state, path = {"step": 0, "seconds": 0.0}, settings.output / "training.pt"
    if path.exists():
        stored = torch.load(path, weights_only=True)
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        state = stored["state"]
    settings.output.mkdir(parents=True, exist_ok=True)
    end, saved = 60 * settings.minutes, state["seconds"]
    with progress_bar() as bar:
        task = bar.add_task("masked images", total=end)
        while state["seconds"] < end:
            started = time.monotonic()
            done = state["seconds"] / end
            for group in optimizer.param_groups:
                rate = min(1, done / WARMUP, 0.5 + 0.5 * math.cos(math.pi * done))
                group["lr"] = settings.learning_rate * rate
            loss = step(model, optimizer, sources, settings, int(state["step"]))
            state = {"step": state["step"] + 1, "seconds": state["seconds"] + time.monotonic() - started}
            bar.update(task, completed=state["seconds"], description=f"masked images, error {loss:.3f}")
            if state["seconds"] - saved > 60 * settings.save_minutes or state["seconds"] >= end:
                content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}
                replace_file(path, partial(torch.save, content))
                saved = state["seconds"]
    model.encoder.save_pretrained(settings.output)
    side = model.config.image_size
    pixels = {"size": {"height": side, "width": side}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    write_json(settings.output / "preprocessor_config.json", pixels)
    print(f"{state['step']} steps; a 2D teacher is in {settings.output}")


def step(
    model: MaskedImages,
    optimizer: torch.optim.Optimizer,
    sources: list[SceneDataset],
    settings: Settings,
    number: int,
) -> float:
    """One optimizer step on scenes that depend on seed and number alone; the error."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
    source = sources[int(torch.randint(len(sources), (), generator=generator))]
    indices = torch.randint(len(source), (settings.scenes_per_step,), generator=generator)
    images = augment(source.batch(indices).images, generator).flatten(0, 1) * 2 - 1
    hidden = torch.rand(len(images), (images.shape[-1] // 16) ** 2, generator=generator) < MASKED
    loss = model(images, hidden)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


if __name__ == "__main__":
    tyro.cli(main)
