"""The transformer block that the nano student and its flow head are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm attention and MLP. `input_layernorm` reads the residual stream, which is where taps sit.

    Shapes: B batch, N tokens, D width.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.input_layernorm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.post_attention_layernorm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, last: int = 0) -> Tensor:
        """`hidden` (B, N, D) -> the same shape, or the last tokens alone, (B, last, D).

        `mask` (B, N) is added to the attention to each token (see `attention_mask`).
        """
        mixed = self.dropout(self._attend(self.input_layernorm(hidden), mask, last))
        hidden = hidden[:, -last:] + mixed
        return hidden + self.dropout(self.mlp(self.post_attention_layernorm(hidden)))

    def _attend(self, hidden: Tensor, mask: Tensor | None, last: int) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(hidden).chunk(3, dim=-1)
        )
        mask = None if mask is None else mask[:, None, None, :]
        mixed = F.scaled_dot_product_attention(query[:, :, -last:], key, value, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


def attention_mask(keep: Tensor, like: Tensor) -> Tensor:
    """0 where `keep` (B, N) bool, minus infinity on tokens that are masked.

    Attention makes this of a boolean mask by itself, but again in every block.
    """
    return torch.zeros_like(keep, dtype=like.dtype).masked_fill_(~keep, -torch.inf)
