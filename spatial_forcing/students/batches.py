"""What every student reads in the same way: vectors of a batch, and observations of a rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spatial_forcing.alignment import IMAGE_PREFIX
from spatial_forcing.errors import DataError
from spatial_forcing.protocols import Batch, Observation

STATE, ACTION = "observation.state", "action"


def vector(batch: Batch, key: str, device: torch.device, shape: tuple[int, ...]) -> Tensor:
    """`batch[key]` as float32 on `device`.

    Raises:
        DataError: it is missing, or has another shape.
    """
    if key not in batch:
        raise DataError(f"{key!r} is not in the batch; it has {sorted(batch)}.")
    value = batch[key]
    if tuple(value.shape) != shape:
        raise DataError(
            f"{key!r} is {tuple(value.shape)}; this student takes {shape}. "
            "Record that feature with the student's size, or change state_dim, action_dim or chunk."
        )
    return value.to(device, torch.float32)


def collate(
    observations: Sequence[Observation],
    cameras: Sequence[str],
    device: torch.device,
    fit: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """A batch of B observations: texts, states (B, S), and for each camera images (B, 3, H, W).

    `fit` maps one image (1, 3, H, W), of the type it was observed in, to the student's size; without it the
    sizes must agree.

    Raises:
        DataError: no observation, a camera that one lacks, or states or images of different sizes.
    """
    if not observations:
        raise DataError("act was given no observation; give at least one.")
    batch: dict[str, Any] = {"task": [seen["task"] for seen in observations]}
    try:
        states = [torch.from_numpy(np.array(seen["state"], np.float32)) for seen in observations]
        batch[STATE] = torch.stack(states)
    except RuntimeError as error:
        raise DataError(f"the observations' states differ in size ({error}).") from error
    for camera in cameras:
        images = []
        for seen in observations:
            if camera not in seen["images"]:
                raise DataError(
                    f"an observation lacks camera {camera!r}; it has {sorted(seen['images'])}, and this "
                    f"student takes {', '.join(cameras)}."
                )
            pixels = torch.from_numpy(np.array(seen["images"][camera]))
            image = pixels.movedim(-1, 0)[None].to(device)
            images.append(fit(image) if fit else image)
        if len({image.shape for image in images}) > 1:
            raise DataError(f"images of camera {camera!r} differ in size between the observations.")
        if len({image.dtype for image in images}) > 1:
            raise DataError(f"images of camera {camera!r} differ in type between the observations.")
        batch[IMAGE_PREFIX + camera] = torch.cat(images)
    return batch
