"""A small student and teacher that honour the contracts exactly; used wherever a test needs one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from spatial_forcing.alignment import IMAGE_PREFIX, Alignment, TokenLayout, Views, views_from_batch
from spatial_forcing.protocols import Batch, Metrics, Observation
from spatial_forcing.students.base import StudentModule, StudentSpec

CAMERAS = ("front", "wrist")


class FakeBlock(nn.Module):
    """A pre-norm residual block with the attribute name that decoder blocks of transformers use."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.mix(self.input_layernorm(hidden)) + hidden.mean(1, keepdim=True))


class FakeStudent(StudentModule):
    """Sequence: one state token, then the views' token grids (view-major), then one action token."""

    def __init__(
        self,
        width: int = 16,
        depth: int = 4,
        grid: tuple[int, int] = (3, 3),
        cameras: Sequence[str] = CAMERAS,
        state_dim: int = 4,
        chunk: int = 2,
        action_dim: int = 3,
    ) -> None:
        super().__init__()
        self.names, self.grid, self.chunk, self.action_dim = tuple(cameras), grid, chunk, action_dim
        self.state_dim = state_dim
        self.embed = nn.Linear(3, width)
        self.state = nn.Linear(state_dim, width)
        self.action_query = nn.Parameter(torch.randn(1, 1, width))
        self.layers = nn.ModuleList(FakeBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, chunk * action_dim)

    @property
    def spec(self) -> StudentSpec:
        side = 3 * self.grid[0]
        return StudentSpec(self.names, side, self.state_dim, self.action_dim, self.chunk)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.layers)

    @property
    def final_norm(self) -> nn.Module | None:
        return self.norm

    def predict(self, images: Tensor, state: Tensor) -> Tensor:
        """(B, V, 3, H, W) and (B, D) -> (B, chunk, action_dim)."""
        B = len(images)
        patches = nn.functional.adaptive_avg_pool2d(images.flatten(0, 1), self.grid)
        tokens = patches.flatten(2).transpose(1, 2).reshape(B, -1, 3)
        hidden = torch.cat(
            [self.state(state)[:, None], self.embed(tokens), self.action_query.expand(B, -1, -1)], 1
        )
        for block in self.layers:
            hidden = block(hidden)
        return self.head(self.norm(hidden)[:, -1]).view(B, self.chunk, self.action_dim)

    def alignment(self, batch: Batch) -> Alignment:
        return Alignment(self.layout(batch), self.views(batch))

    def forward(self, batch: Batch, alignment: Alignment | None = None) -> tuple[Tensor, Metrics]:
        predicted = self.predict(self.views(batch).images, batch["observation.state"])
        loss = (predicted - batch["action"]).abs().mean()
        return loss, {"action_l1": loss.detach()}

    def layout(self, batch: Batch) -> TokenLayout:
        present = self.views(batch).present
        (B, V), (h, w) = present.shape, self.grid
        index = 1 + torch.arange(V * h * w, device=present.device).view(1, V, h, w).expand(B, V, h, w)
        return TokenLayout(index, present[:, :, None, None].expand(B, V, h, w))

    def views(self, batch: Batch) -> Views:
        return views_from_batch(batch, self.cameras)

    @torch.no_grad()
    def act(
        self,
        observations: Sequence[Observation],
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        images = torch.stack(
            [
                torch.stack([torch.from_numpy(o["images"][c].copy()).permute(2, 0, 1) for c in self.cameras])
                for o in observations
            ]
        )
        states = torch.stack([torch.from_numpy(o["state"]) for o in observations])
        return self.predict(images.float() / 255, states)

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_model(self, str(Path(folder) / "model.safetensors"))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        student = cls()
        load_model(student, str(Path(folder) / "model.safetensors"))
        return student


class FakeTeacher:
    """Features are a fixed random projection of each patch's mean colour, plus the mean of all views."""

    name, licence, patch, fingerprint, projected = "fake", "Apache-2.0", 4, "0" * 64, False

    def __init__(self, dim: int = 8, depth: int = 3, resolution: int = 20) -> None:
        self.dim, self.depth, self.resolution = dim, depth, resolution
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(depth, 3, dim, generator=generator)
        self.calls = 0

    @torch.no_grad()
    def features(self, views: Views, layers: Sequence[int] = (-1,)) -> tuple[Tensor, ...]:
        self.calls += 1
        side = self.resolution // self.patch
        pooled = nn.functional.adaptive_avg_pool2d(views.images.flatten(0, 1), side)
        pooled = pooled.unflatten(0, views.images.shape[:2]).permute(0, 1, 3, 4, 2)
        keep = views.present[:, :, None, None, None].float()
        context = (pooled * keep).sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp(min=1)
        return tuple(((pooled + context) @ self.weight[k].to(pooled) + 0.3) * keep for k in layers)

    def to(self, device: torch.device | str) -> Self:
        self.weight = self.weight.to(device)
        return self


def fake_batch(batch_size: int = 4, seed: int = 0, size: int = 24, chunk: int = 2) -> dict[str, Any]:
    """A batch with LeRobot's key names that `FakeStudent` takes."""
    generator = torch.Generator().manual_seed(seed)
    batch: dict[str, Any] = {
        IMAGE_PREFIX + camera: torch.rand(batch_size, 3, size, size, generator=generator)
        for camera in CAMERAS
    }
    batch["observation.state"] = torch.randn(batch_size, 4, generator=generator)
    batch["action"] = torch.randn(batch_size, chunk, 3, generator=generator)
    batch["action_is_pad"] = torch.zeros(batch_size, chunk, dtype=torch.bool)
    batch["task"] = ["touch the cube"] * batch_size
    batch["index"] = torch.arange(batch_size) + 100 * seed
    return batch
