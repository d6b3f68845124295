"""Transformer block, 2D rotary embedding and layer numbers: what our own teachers share.

Shapes: B batch, N tokens, C channels, h heads, d channels of a head.

Without gradients a block works on its residual stream in place and, on a CPU, passes it through the MLP a few
rows at a time: the same numbers up to rounding, at a third of the memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatial_forcing.errors import ConfigError

MLP_ROWS = 1024
"""Tokens that pass through an MLP together on a CPU; its hidden layer is the largest tensor of a block."""

QUERY_ROWS = 512
"""Queries whose scores are held together where attention is computed without the fused kernel."""


def resolve_layers(layers: Sequence[int], depth: int) -> list[int]:
    """Turn layer numbers (0-based, negative from the end) into 0 .. depth - 1, order and repeats kept.

    Raises:
        ConfigError: a layer does not exist, or none is asked for.
    """
    if not layers:
        raise ConfigError("no layer was asked for; give at least one, for example layers=(-1,).")
    for layer in layers:
        if not -depth <= layer < depth:
            raise ConfigError(
                f"layer {layer} does not exist; the model has layers 0 to {depth - 1} (or -1 to -{depth})."
            )
    return [layer % depth for layer in layers]


class Rope2D(nn.Module):
    """Rotary position embedding in two dimensions (arXiv 2104.09864, one axis for each half of a head).

    The first half of a head's channels turns with y, the second half with x. Position 0 leaves a
    token unchanged, which is why special tokens sit there.
    """

    def __init__(self, base: float) -> None:
        super().__init__()
        self.base = base

    def table(self, positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines for integer `positions` (N, 2) as (y, x): two (N, head_dim) float32 tensors."""
        half = head_dim // 2
        exponent = torch.arange(0, half, 2, device=positions.device, dtype=torch.float32) / half
        angles = positions.float()[..., None] / self.base**exponent  # (N, 2, half / 2)
        angles = torch.cat([angles, angles], dim=-1).flatten(-2)  # (N, 2 * half)
        return angles.cos(), angles.sin()

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn `x` (B, h, N, d) by the angles of `table`; without gradients, in place."""
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        first, second = x.unflatten(-1, (2, 2, -1)).unbind(-2)  # (B, h, N, 2 axes, d / 4) each
        if torch.is_grad_enabled():
            turned = torch.stack([-second, first], dim=-2).flatten(-3)
            return x * cos + turned * sin
        # Both halves of an axis turn by the same angles.
        cos, sin = (angle.unflatten(-1, (2, 2, -1)).select(-2, 0) for angle in (cos, sin))
        turned_first = (first * cos).addcmul_(second, sin, value=-1)
        second.mul_(cos).addcmul_(first, sin)
        first.copy_(turned_first)
        return x


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, (B, h, N, d) each -> (B, h, N, d).

    PyTorch's fused kernel, except for bfloat16 on a CPU: there it multiplies no faster than in float32, while
    plain matrix products of one head at a time are up to 1.5 times as fast (scores are then bfloat16 too).
    """
    fused = q.device.type != "cpu" or q.dtype != torch.bfloat16
    if fused or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v)
    out = torch.empty(q.shape, dtype=q.dtype)
    scaled, keys = q * q.shape[-1] ** -0.5, k.transpose(-1, -2)
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        for start in range(0, q.shape[2], QUERY_ROWS):
            rows = slice(start, start + QUERY_ROWS)
            out[b, h, rows] = (scaled[b, h, rows] @ keys[b, h]).softmax(-1) @ v[b, h]
    return out


class Attention(nn.Module):
    """Multi-head self-attention with optional LayerNorm on queries and keys, and optional rotary angles."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C); `rope` holds the cosines and sines of the N positions."""
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in self._project(x))
        q, k, v = (part.transpose(1, 2) for part in (self.q_norm(q), self.k_norm(k), v))  # (B, h, N, d)
        if rope is not None:
            q, k = Rope2D.rotate(q, *rope), Rope2D.rotate(k, *rope)
        out = attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _project(self, x: Tensor) -> Iterator[Tensor]:
        """Queries, keys and values, (B, N, C) each; on a CPU without gradients, one after the other."""
        if x.device.type != "cpu" or torch.is_grad_enabled():
            yield from self.qkv(x).chunk(3, dim=-1)
            return
        for weight, bias in zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True):
            yield F.linear(x, weight, bias)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim if out is None else out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., out)."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """A gated MLP, silu(a) * b (arXiv 2002.05202); its hidden width is two thirds of `hidden`, in eights."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        hidden = (hidden * 2 // 3 + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned gain for each channel of a residual branch (arXiv 2103.17239)."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale on both branches.

    Args:
        dim, num_heads, mlp_ratio, init_values: sizes, and what LayerScale starts with.
        qk_norm: LayerNorm on queries and keys.
        eps: of the two norms of the block; those of queries and keys have PyTorch's.
        swiglu: a gated MLP instead of GELU's.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        init_values: float,
        qk_norm: bool,
        *,
        eps: float = 1e-5,
        swiglu: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qk_norm)
        self.ls1 = LayerScale(dim, init_values)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = (SwiGLU if swiglu else Mlp)(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, init_values)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C), a new tensor."""
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        if torch.is_grad_enabled():
            return x + self.ls2(self.mlp(self.norm2(x)))
        tokens = x.flatten(0, 1)
        for rows in tokens.split(MLP_ROWS if x.device.type == "cpu" else len(tokens)):
            rows.add_(self.ls2(self.mlp(self.norm2(rows))))
        return x
