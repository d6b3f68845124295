"""Real-time chunking for pi0: the stock model's sampler with guidance in every step (see `students.rtc`)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spatial_forcing.students.rtc import guided_velocity


def sample_guided(
    network: Any, inputs: Mapping[str, Tensor], noise: Tensor, previous: Tensor, weight: Tensor, *, steps: int
) -> Tensor:
    """Normalised, padded actions (B, T, P) float32 that continue `previous`; without weight those of the
    stock sampler.

    The prefix is encoded once, as there; gradients run through the action expert alone.

    Args:
        network: transformers' `PI0ForConditionalGeneration`.
        inputs: its arguments except for noise and time; none of them made in inference mode.
        noise: (B, T, P).
        previous, weight: (B, T, P) normalised and (B, T), as `rtc.guided_velocity` takes them.
        steps: Euler steps.
    """
    mask = inputs["attention_mask"]
    embeds = network.model.embed_prefix(
        inputs["input_ids"], inputs["pixel_values"], inputs["pixel_attention_mask"]
    )
    prefix = network.model.vlm(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=mask.cumsum(-1) - 1,
        token_type_ids=torch.zeros_like(embeds)[:, :, 0],
        use_cache=True,
    ).past_key_values
    field = partial(_velocity, network, inputs, prefix)
    actions = noise.to(previous)
    for step in range(steps):
        time = step / steps
        actions = actions + guided_velocity(partial(field, time), actions, time, previous, weight) / steps
    return actions


def _velocity(network: Any, inputs: Mapping[str, Tensor], prefix: Any, time: float, noisy: Tensor) -> Tensor:
    """Towards actions at `time` (0 is noise), (B, T, P) float32; pi0's own time runs backwards."""
    output = network(
        state=inputs["state"],
        noise=noisy.to(network.dtype),
        timestep=torch.full((len(noisy),), 1 - time, device=noisy.device),
        pixel_attention_mask=inputs["pixel_attention_mask"],
        attention_mask=inputs["attention_mask"],
        past_key_values=copy.deepcopy(prefix),  # each call appends to it, and keeps its graph
    )
    return -output.logits.float()
