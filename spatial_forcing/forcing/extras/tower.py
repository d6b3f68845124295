"""`forcing.tap` "vision": the tap at the output of the vision tower (VEGA, arXiv 2605.10485).

The paper aligns the decoder's residual stream, where visual tokens have met the instruction; here they have
not, and only the tower learns from the alignment.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spatial_forcing.alignment import Sequencer, TokenLayout
from spatial_forcing.errors import ConfigError, LayoutError
from spatial_forcing.protocols import TowerStudent, VisionTower


def vision_tower_of(student: nn.Module) -> VisionTower:
    """Where the student's vision tower ends. Raises `ConfigError` for one that names none."""
    if not isinstance(student, TowerStudent):
        raise ConfigError(
            f"{type(student).__name__} names no vision tower for forcing.tap 'vision'; tap what enters its "
            "first block instead (forcing.tap decoder, forcing.pairs ((0, -1),)), or give as_student the "
            "tower's own blocks."
        )
    return student.vision_tower


def views_in_sequence(views: int) -> Sequencer:
    """Makes (B, V N, D) of the tower's output (B V, N, D); `views` is V."""

    def sequence(calls: Sequence[Tensor]) -> Tensor:
        if len(calls) != 1 or calls[0].ndim != 3 or len(calls[0]) % views:
            shapes = [tuple(call.shape) for call in calls]
            raise LayoutError(
                f"the vision tower gave {shapes}; expected one (batch x {views} views, patches, width)."
            )
        return calls[0].unflatten(0, (-1, views)).flatten(1, 2)

    return sequence


def on_tower(layout: TokenLayout) -> TokenLayout:
    """The layout of the tower's own tokens: V grids of h x w, one after the other."""
    index = layout.index
    own = torch.arange(index[0].numel(), device=index.device).view_as(index[0]).expand_as(index)
    return TokenLayout(torch.where(layout.valid, own, -1), layout.valid)
