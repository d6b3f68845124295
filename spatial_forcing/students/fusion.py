"""The fusion control: a nano student that takes the teacher's features as input, as Evo-0 does.

Where spatial forcing leaves no teacher behind, this student runs it at every call (arXiv 2507.00416); what it
costs is part of a comparison. Visual tokens read the teacher's patch features by one cross-attention in front
of the decoder, whose output starts at zero: the student begins as the nano student of the same seed.

Shapes: B batch, N visual tokens, M teacher tokens, D width, C teacher channels.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatial_forcing.alignment import CameraImages, Views
from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.protocols import Batch, Teacher
from spatial_forcing.students.base import STUDENTS, load_weights, read_config, save_checkpoint
from spatial_forcing.students.batches import ACTION, STATE
from spatial_forcing.students.nano import NanoConfig, NanoVLA
from spatial_forcing.students.normalize import Stats

MODEL_TYPE = "nano-fusion"


class CrossAttention(nn.Module):
    """Visual tokens (B, N, D) read teacher tokens (B, M, C); zero at the start."""

    def __init__(self, width: int, teacher_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.teacher_norm = nn.LayerNorm(teacher_dim)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(teacher_dim, 2 * width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens: Tensor, features: Tensor, keep: Tensor) -> Tensor:
        """What is added to `tokens`; `keep` (B, M) bool is False on features of absent views."""
        key, value = self.key_value(self.teacher_norm(features)).chunk(2, dim=-1)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(self.norm(tokens)), key, value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=keep[:, None, None, :])
        return self.out(mixed.transpose(1, 2).flatten(2))


class FusionVLA(NanoVLA):
    """A nano student with the teacher in its input. Implements `protocols.Student`.

    Args:
        config: of the nano student.
        seed: of the initial weights; those of the nano student are the same.
        teacher: a name for `load_teacher`. It is loaded when first needed, and never saved or trained.
    """

    config_class = None  # a nano configuration makes the plain student

    def __init__(self, config: NanoConfig, *, seed: int = 0, teacher: str = "vggt-nano") -> None:
        from spatial_forcing.teachers import load_teacher  # no other policy's process holds a teacher

        super().__init__(config, seed=seed)
        self.teacher_name = teacher
        # In a tuple, where nn.Module does not look: frozen weights are no part of the student's state.
        self._outside: tuple[Teacher, ...] = (load_teacher(teacher),)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.fuse = CrossAttention(config.width, self._outside[0].dim, config.heads)

    @classmethod
    def create(cls, config: NanoConfig, stats: Stats, *, seed: int = 0, teacher: str = "vggt-nano") -> Self:
        """A new student that normalises with `stats`; see `NanoVLA.create`."""
        student = cls(config, seed=seed, teacher=teacher)
        student.state_norm.fit(stats, STATE)
        student.action_norm.fit(stats, ACTION)
        return student

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` (with the teacher's name) and `model.safetensors` (without its weights)."""
        config: dict[str, Any] = {"model_type": MODEL_TYPE, "architectures": [type(self).__name__]}
        save_checkpoint(self, config | {"teacher": self.teacher_name, "nano": asdict(self.config)}, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what `save_pretrained` wrote.

        Raises:
            CheckpointError: another architecture, invalid settings, or weights that do not fit.
        """
        stored = read_config(folder, MODEL_TYPE)
        try:
            student = cls(NanoConfig(**stored["nano"]), teacher=stored["teacher"])
        except (KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(
                f"{folder}/config.json does not describe a {MODEL_TYPE} student: {error}"
            ) from error
        load_weights(student, folder)
        return student

    def _embed(self, batch: Batch, source: CameraImages) -> tuple[Tensor, Tensor]:
        tokens, keep = super()._embed(batch, source)
        views = source.views().to(self._device)
        features, present = self._features(views)
        start, count = self.config.max_text, len(self.config.cameras) * self.config.grid**2
        visual = tokens[:, start : start + count]
        visual = visual + self.fuse(visual, features, present)
        return torch.cat([tokens[:, :start], visual, tokens[:, start + count :]], dim=1), keep

    def _features(self, views: Views) -> tuple[Tensor, Tensor]:
        """The teacher's last layer (B, M, C), and which of it belongs to present views (B, M)."""
        (teacher,) = self._outside
        teacher.to(views.images.device)
        (grid,) = teacher.features(views, (-1,))
        B, V, h, w, _ = grid.shape
        present = views.present[:, :, None].expand(B, V, h * w).flatten(1)
        # Features made under inference mode cannot be saved for the backward pass.
        return grid.flatten(1, 3).float().clone(), present


STUDENTS.add(MODEL_TYPE, FusionVLA)
