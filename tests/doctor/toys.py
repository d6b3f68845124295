"""A small VLA whose token layout and faults can be chosen; the doctor must tell them apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from spatial_forcing.doctor import Subject
from tests.fakes import FakeBlock

SIZE, WORDS = 32, 5


class Output(NamedTuple):
    loss: Tensor


class Toy(nn.Module):
    """Sequence: one word, the views' tokens (each row ended by `breaks` learned tokens), the other words."""

    def __init__(
        self,
        grid=(4, 4),
        width=16,
        depth=4,
        *,
        column_major=False,
        breaks=0,
        resampled=False,
        crossed=False,
        reads=None,
        cut_before=None,
        listed=True,
        noisy=None,
    ):
        super().__init__()
        self.grid, self.column_major, self.breaks = grid, column_major, breaks
        self.resampled, self.crossed, self.reads, self.cut_before = resampled, crossed, reads, cut_before
        self.noisy = noisy
        self.embed, self.words = nn.Linear(3, width), nn.Embedding(50, width)
        self.end = nn.Parameter(torch.randn(breaks, width))
        self.queries = nn.Parameter(torch.randn(grid[0] * grid[1], width))
        blocks = [FakeBlock(width) for _ in range(depth)]
        if listed:
            self.layers = nn.ModuleList(blocks)
        else:
            for i, block in enumerate(blocks):
                self.add_module(f"block{i}", block)
        self._blocks = [blocks]  # a list within a list is not registered
        self.head = nn.Linear(width, 3)

    def forward(self, pixel_values, input_ids, action):
        B = len(pixel_values)
        pooled = nn.functional.adaptive_avg_pool2d(pixel_values.flatten(0, 1).float(), self.grid)
        tokens = self.embed(pooled.movedim(1, -1))
        if self.column_major:
            tokens = tokens.transpose(1, 2)
        if self.resampled:
            tokens = (tokens.mean((1, 2), keepdim=True) + self.queries.view(1, *self.grid, -1)).contiguous()
        ends = self.end.expand(*tokens.shape[:2], *self.end.shape)
        tokens = torch.cat([tokens, ends], 2).reshape(B, -1, tokens.shape[-1])
        words = self.words(input_ids)
        if self.noisy is not None:
            tokens = tokens + torch.rand(tokens.shape, generator=self.noisy)
        hidden = words if self.crossed else torch.cat([words[:, :1], tokens, words[:, 1:]], 1)
        states = []
        for i, block in enumerate(self._blocks[0]):
            hidden = hidden.detach() if i == self.cut_before else hidden
            hidden = block(hidden)
            hidden = hidden + tokens.mean(1, keepdim=True) if self.crossed else hidden
            states.append(hidden)
        read = states[-1 if self.reads is None else self.reads]
        return Output((self.head(read[:, -1]) - action).abs().mean())


class Tower(nn.Module):
    """A policy whose decoder reads a vision tower's tokens by cross-attention.

    Args:
        kind: how the tower sees the views: `rows` (sample by sample in its batch dimension), `views` (view by
            view there), `calls` (one call a view), `maps` (convolutions, views in the batch dimension) or
            `first` (all views in one sequence, which is the first dimension).
    """

    def __init__(self, kind, width=16, depth=4):
        super().__init__()
        self.kind = kind
        self.embed, self.words = nn.Conv2d(3, width, 8, 8), nn.Embedding(50, width)
        if kind == "maps":
            self.tower = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(depth))
        else:
            self.tower = nn.ModuleList(FakeBlock(width) for _ in range(depth))
        self.decoder = nn.ModuleList(FakeBlock(width) for _ in range(depth))
        self.cross, self.head = nn.MultiheadAttention(width, 2, batch_first=True), nn.Linear(width, 3)

    def forward(self, pixel_values, input_ids, action):
        B, V = pixel_values.shape[:2]
        images = pixel_values if self.kind != "views" else pixel_values.transpose(0, 1)
        maps = self.embed(images.flatten(0, 1))
        tokens = maps if self.kind == "maps" else maps.flatten(2).transpose(1, 2)
        if self.kind == "calls":
            views = tokens.unflatten(0, (B, V)).unbind(1)
            tokens = torch.cat([nn.Sequential(*self.tower)(view) for view in views], 1)
        else:
            if self.kind == "first":
                tokens = tokens.unflatten(0, (B, V)).flatten(1, 2).transpose(0, 1)
            for block in self.tower:
                tokens = block(tokens)
            if self.kind == "first":
                tokens = tokens.transpose(0, 1)
            elif self.kind == "views":
                tokens = tokens.unflatten(0, (V, B)).transpose(0, 1).flatten(1, 2)
            else:
                tokens = tokens.flatten(2).transpose(1, 2) if self.kind == "maps" else tokens
                tokens = tokens.unflatten(0, (B, V)).flatten(1, 2)
        hidden = self.words(input_ids)
        for block in self.decoder:
            hidden = block(hidden) + self.cross(hidden, tokens, tokens)[0]
        return Output((self.head(hidden[:, -1]) - action).abs().mean())


def tower(kind, views=2, samples=2):
    torch.manual_seed(0)
    return Subject(Tower(kind), toy_batch(views, samples))


def toy_batch(views=2, samples=2):
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.rand(samples, views, 3, SIZE, SIZE, generator=generator),
        "input_ids": torch.randint(10, 50, (samples, WORDS), generator=generator),
        "action": torch.randn(samples, 3, generator=generator),
    }


def toy(views=2, **settings):
    torch.manual_seed(0)
    return Subject(Toy(**settings), toy_batch(views))


def frozen():
    """A factory for the command."""
    subject = toy()
    subject.model.requires_grad_(False)
    return subject


def healthy():
    """Another one."""
    return toy()


def pair():
    """A tuple instead of a Subject."""
    subject = toy()
    return subject.model, subject.batch


def needs(argument):
    return argument


def breaks():
    raise RuntimeError("no weights")


def nothing():
    return None
