"""How well a cached target follows a crop: teacher(crop) against the sampled teacher(full frame).

The student sees a random crop; the cache holds the whole frame's features, and the sampling rule of
`forcing.target` reads them where the crop lies. That is an approximation, because a teacher sees other
context and another scale in the crop.

Shapes: B batch, V view, h x w teacher grid, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from spatial_forcing.alignment import Views
from spatial_forcing.data.augment import Augment, Draw, colour_jitter
from spatial_forcing.data.geometry import warp
from spatial_forcing.errors import DataError
from spatial_forcing.forcing import layout_from_offset
from spatial_forcing.forcing.target import make_targets, token_validity
from spatial_forcing.protocols import Teacher
from spatial_forcing.teachers.cache.build import cosines
from spatial_forcing.teachers.cache.encode import Encoder, spread_frames
from spatial_forcing.teachers.cache.source import FrameSource


@dataclass(frozen=True)
class CropAgreement:
    """Mean cosines with teacher(crop), over the crop's valid tokens.

    Attributes:
        frames, tokens: how many.
        cosine, cosine_mean_removed: of what a cache delivers for the crop.
        unmoved, unmoved_mean_removed: of the full frame's features read as if there were no crop: what a
            cache without the sampling rule would deliver.
    """

    frames: int
    tokens: int
    cosine: float
    cosine_mean_removed: float
    unmoved: float
    unmoved_mean_removed: float


def crop_agreement(
    teacher: Teacher,
    source: FrameSource,
    augment: Augment,
    *,
    cameras: Sequence[str] | None = None,
    layer: int = -1,
    frames: int = 32,
    seed: int = 0,
    batch_size: int = 8,
) -> CropAgreement:
    """Encode frames and one augmentation of each, and compare.

    Args:
        teacher: encodes whole frames and crops alike, at its own resolution.
        source: the frames.
        augment: what is drawn, colours included.
        cameras: ordered; default the source's.
        layer: of the teacher.
        frames: evenly over the dataset.
        seed: of the draws.
        batch_size: frames in one call of the teacher.

    Raises:
        DataError: no token of any crop is valid.
    """
    names = tuple(source.cameras if cameras is None else cameras)
    picked = spread_frames(source, frames)
    rng = np.random.default_rng(seed)
    parts: list[list[Tensor]] = [[], [], []]
    for _, views, (full,) in Encoder(teacher, source, names, (layer,), batch_size).batches(picked):
        seen, moved = augmented(views, augment, rng)
        (real,) = teacher.features(seen, (layer,))
        B, V, h, w = real.shape[:4]
        layout = layout_from_offset(B, V, (h, w), start=0)
        valid = token_validity(layout, moved)
        for part, where in zip(parts[1:], (moved, views), strict=True):
            (target,) = make_targets([full.cpu()], where, layout, valid=valid, pe_scale=0.0)
            part.append(target[valid])
        parts[0].append(real.cpu()[valid])
    real, sampled, unmoved = (torch.cat(part) for part in parts)
    if not len(real):
        raise DataError("no token of these crops lies inside its frame; take larger crops.")
    ours, plain = cosines(real, sampled), cosines(real, unmoved)
    return CropAgreement(
        len(picked),
        len(real),
        ours["cosine"],
        ours["cosine_mean_removed"],
        plain["cosine"],
        plain["cosine_mean_removed"],
    )


def augmented(views: Views, augment: Augment, rng: np.random.Generator) -> tuple[Views, Views]:
    """One draw for every view: what a student (and a live teacher) sees, and `views` with the map to it."""
    size = (views.images.shape[-2], views.images.shape[-1])
    draws = [[augment.draw(rng, camera, size) for camera in views.cameras] for _ in views.images]
    flat: list[Draw] = [draw for row in draws for draw in row]
    maps = torch.stack([draw.affine for draw in flat])
    images = warp(views.images.flatten(0, 1), maps, size)
    if augment.photometric:
        images = colour_jitter(
            images,
            [draw.brightness for draw in flat],
            [draw.contrast for draw in flat],
            [draw.saturation for draw in flat],
        )
    lead = views.images.shape[:2]
    seen = Views.create(images.unflatten(0, lead), views.cameras, present=views.present, keys=views.keys)
    return seen, replace(views, student_to_view=maps.unflatten(0, lead))
