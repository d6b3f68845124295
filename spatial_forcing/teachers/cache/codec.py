"""How the numbers of a cached token are stored.

    bf16    two bytes for each channel
    int8    one byte for each channel, one scale for each token
    int4    one byte for the leading sixth of the channels, half a byte for the others, a scale for each
    token for
            either part: for channels in the order of their variance, as a basis has them, since a
            direction that varies ten times less needs three bits less

Shapes: n rows, V view, h x w teacher grid, C channels, L leading channels of int4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CacheDtype = Literal["bf16", "int8", "int4"]
DTYPES: tuple[CacheDtype, ...] = ("bf16", "int8", "int4")
Parts = Mapping[str, NDArray[Any]]
"""What is stored of some tokens, by name: `layer` (their codes), and what `columns` adds for the type."""
BYTE, NIBBLE = 127, 7
"""Largest codes."""


def leading(channels: int) -> int:
    """L: channels of int4 that have a whole byte each; the others are even in number."""
    return min(channels, max(2, 2 * round(channels / 12)) + channels % 2)


def columns(dtype: CacheDtype, channels: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name, numpy type and shape of what is stored of one token."""
    if dtype == "bf16":
        return {"layer": ("<u2", (channels,))}
    if dtype == "int8":
        return {"scale": ("<f4", ()), "layer": ("i1", (channels,))}
    lead = leading(channels)
    return {"scale": ("<u2", (2,)), "lead": ("i1", (lead,)), "layer": ("u1", ((channels - lead) // 2,))}


def encode(dtype: CacheDtype, values: Tensor) -> dict[str, NDArray[Any]]:
    """Parts of `values` (..., C). Codes are computed where the values are; only codes leave the device."""
    if dtype == "bf16":
        return {"layer": _halves(values.to(torch.bfloat16))}
    exact = values.float()
    if dtype == "int8":
        scale = exact.abs().amax(-1) / BYTE
        return {"scale": scale.cpu().numpy(), "layer": _codes(exact, scale, BYTE).cpu().numpy()}
    lead = leading(exact.shape[-1])
    parts = exact[..., :lead], exact[..., lead:]
    scales = [_largest(part) / top for part, top in zip(parts, (BYTE, NIBBLE), strict=True)]
    scale = torch.stack(scales, -1).to(torch.bfloat16)
    nibbles = (_codes(parts[1], scale[..., 1].float(), NIBBLE) + NIBBLE + 1).to(torch.uint8)  # 1 to 15
    packed = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    codes = _codes(parts[0], scale[..., 0].float(), BYTE)
    return {"scale": _halves(scale), "lead": codes.cpu().numpy(), "layer": packed.cpu().numpy()}


def decode(dtype: CacheDtype, parts: Parts, device: torch.device | str = "cpu") -> Tensor:
    """Values (..., C) float32 on `device`, decoded there, so that what travels is small."""
    if dtype == "bf16":
        return _from_halves(parts["layer"], device)
    codes = torch.from_numpy(parts["layer"]).to(device)
    if dtype == "int8":
        scale = torch.from_numpy(parts["scale"]).to(device)
        return torch.mul(codes, scale.unsqueeze(-1))  # one pass: int8 times float32 is float32
    scale = _from_halves(parts["scale"], device)
    lead = torch.from_numpy(parts["lead"]).to(device)
    few, packed = lead.shape[-1], codes.shape[-1]
    values = torch.empty(*lead.shape[:-1], few + 2 * packed, device=device)
    torch.mul(lead, scale[..., :1], out=values[..., :few])
    nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).to(torch.int8) - (NIBBLE + 1)
    torch.mul(nibbles, scale[..., 1:], out=values[..., few:])
    return values


def _codes(values: Tensor, scale: Tensor, top: int) -> Tensor:
    """int8 in [-top, top]."""
    steps = values / torch.where(scale > 0, scale, 1).unsqueeze(-1)
    return steps.round_().clamp_(-top, top).to(torch.int8)


def _largest(values: Tensor) -> Tensor:
    return values.abs().amax(-1) if values.shape[-1] else values.new_zeros(values.shape[:-1])


def _halves(values: Tensor) -> NDArray[np.uint16]:
    """bfloat16, which numpy lacks, as its bits."""
    return values.cpu().contiguous().view(torch.int16).numpy().view(np.uint16)


def _from_halves(bits: NDArray[Any], device: torch.device | str) -> Tensor:
    return torch.from_numpy(bits.view(np.int16)).to(device).view(torch.bfloat16).float()
