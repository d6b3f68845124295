"""The target: teacher features, brought onto the student's token grid.

Shapes: B batch, V view, h x w student tokens of a view, H x W teacher tokens, C channels.

One sampling rule: token i of n has the coordinate -1 + 2i/(n-1) (the published align-corners resampling),
`student_to_view` maps it into the frame the teacher saw, and the teacher's grid is read there bilinearly.
It is continuous in the crop, and at the identity it is the released code's resize. Outside the frame the
border is repeated; tokens whose point lies outside by more than half a token cell are not valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_forcing.alignment import TokenLayout, Views, transform
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.forcing.extras.cell_mean import CellMean
from spatial_forcing.forcing.extras.projections import spatial_norm
from spatial_forcing.forcing.extras.standardise import Standardiser
from spatial_forcing.forcing.layout import grid_sizes, top_left

PE_BASE = 100.0
"""Base of the positional embedding's geometric frequencies."""


def token_points(sizes: Tensor, grid: tuple[int, int], registration: str = "corner") -> Tensor:
    """Coordinates of every token of a padded grid, in the student's token image.

    Args:
        sizes: (..., 2) real rows and columns.
        grid: padded (h, w).
        registration: `corner` or `pixel`; see `ForcingConfig`.

    Returns:
        (..., h, w, 2) float32, x first. One token alone sits at 0. Padded entries hold values past 1.
    """
    ys, xs = (_positions(sizes[..., i], grid[i], registration) for i in (0, 1))
    ys, xs = torch.broadcast_tensors(ys[..., :, None], xs[..., None, :])
    return torch.stack([xs, ys], dim=-1).float()


def _positions(count: Tensor, padded: int, registration: str) -> Tensor:
    """(...,) counts -> (..., padded) coordinates, computed in float64 and exact at both ends."""
    i = torch.arange(padded, device=count.device, dtype=torch.float64)
    n = count[..., None].to(torch.float64)
    if registration == "pixel":
        return (2 * i + 1) / n.clamp(min=1) - 1
    return torch.where(n > 1, 2 * i / (n - 1).clamp(min=1) - 1, torch.zeros_like(i))


def sample_grid(features: Tensor, points: Tensor) -> Tensor:
    """Read a grid bilinearly, border repeated: (N, H, W, C) at (N, h, w, 2) -> (N, h, w, C)."""
    sampled = F.grid_sample(
        features.permute(0, 3, 1, 2), points, mode="bilinear", padding_mode="border", align_corners=True
    )
    return sampled.permute(0, 2, 3, 1)


@lru_cache(maxsize=32)
def sincos_table(rows: int, columns: int, dim: int, device: torch.device) -> Tensor:
    """The fixed 2D positional embedding E of the target (paper, section 3), (rows, columns, dim) float32.

    The grid spans a rectangle of its own aspect ratio inside the unit circle, so that a cell is square;
    the first half of the channels encodes x, the second y, each as sines, then cosines. Do not modify the
    result: it is cached.

    Raises:
        ConfigError: `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ConfigError(
            f"the positional embedding needs a teacher width that is a multiple of 4, not {dim}; "
            "set forcing.pe_scale to 0."
        )
    diagonal = (rows**2 + columns**2) ** 0.5
    frequency = PE_BASE ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def encode(count: int) -> Tensor:
        # Half the rectangle's side times the centre of each cell in (-1, 1), which is (2i + 1 - n) / n.
        centres = (2 * torch.arange(count, dtype=torch.float64) + 1 - count) / diagonal
        angle = centres[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    x = encode(columns)[None].expand(rows, columns, dim // 2)
    y = encode(rows)[:, None].expand(rows, columns, dim // 2)
    return torch.cat([x, y], dim=-1).float().to(device)


def token_validity(layout: TokenLayout, views: Views, registration: str = "corner") -> Tensor:
    """Which tokens have a target, (B, V, h, w) bool. Needs no teacher.

    A token counts if the layout says so, its view is present, its point lies inside the frame or at most
    half a token cell outside, and the frame is not padding at the token's top-left pixel.
    """
    index = layout.index
    h, w = index.shape[2:]
    sizes = grid_sizes(layout)
    points = token_points(sizes, (h, w), registration)
    mapped = _map(views.student_to_view, points)
    step = (
        2 / (sizes.flip(-1) - 1).clamp(min=1).float()
        if registration == "corner"
        else 2 / sizes.flip(-1).clamp(min=1)
    )
    cell = (views.student_to_view[..., :2].abs() * step[..., None, :]).sum(-1)
    # The slack keeps points that are on the limit in exact arithmetic from falling off it by rounding.
    inside = (mapped.abs() <= 1 + cell[:, :, None, None] / 2 + 1e-5).all(-1)
    return (
        layout.valid
        & (index >= 0)
        & views.present[:, :, None, None]
        & inside
        & _pixel_valid(views, sizes, (h, w))
    )


def _pixel_valid(views: Views, sizes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Views.valid at each token's top-left pixel, (B, V, h, w); the pixel is mapped like the token."""
    H, W = views.valid.shape[-2:]
    device = sizes.device
    row = top_left(torch.arange(grid[0], device=device), sizes[..., :1].clamp(min=1), H)
    column = top_left(torch.arange(grid[1], device=device), sizes[..., 1:].clamp(min=1), W)
    y, x = torch.broadcast_tensors(row[..., :, None], column[..., None, :])
    extent = torch.tensor([max(W - 1, 1), max(H - 1, 1)], device=device)
    mapped = _map(views.student_to_view, torch.stack([x, y], dim=-1) * 2 / extent - 1)
    pixel = ((mapped + 1) / 2 * extent).round().long()
    flat = pixel[..., 1].clamp(0, H - 1) * W + pixel[..., 0].clamp(0, W - 1)
    return views.valid.flatten(2).gather(2, flat.flatten(2)).view(flat.shape)


def _map(affine: Tensor, points: Tensor) -> Tensor:
    """Apply (B, V, 2, 3) to (B, V, h, w, 2), in float32 whatever autocast says: bf16 cannot place a token."""
    with torch.autocast(points.device.type, enabled=False):
        return transform(affine, points.flatten(2, 3)).view(points.shape)


def make_targets(
    features: Sequence[Tensor],
    views: Views,
    layout: TokenLayout,
    *,
    valid: Tensor,
    registration: str = "corner",
    pe_scale: float = 0.1,
    cell_mean: CellMean | None = None,
    standardiser: Standardiser | None = None,
    partial: bool = False,
    normalised: bool = False,
) -> list[Tensor]:
    """Teacher features -> targets on the student's tokens, one (B, V, h, w, C) float32 a layer.

    Order: subtract the cell mean, sample, standardise or normalise, add the positional embedding. The
    embedding is sampled from its table on the teacher's grid with the identity map (it describes the
    student's framing). Rows of
    tokens without a target are zero, and nothing carries gradients.

    Args:
        features: (B, V, H, W, C), one for each layer.
        views: what the teacher saw.
        layout: the student's tokens.
        valid: (B, V, h, w), from `token_validity`.
        registration, pe_scale: see `ForcingConfig`.
        cell_mean: applied to the teacher's grid, or None.
        standardiser: applied to the sampled features, or None.
        partial: a row of zeros says nothing (`protocols.PartialTeacher`): a token at least half of which
            reads such cells has no target either.
        normalised: every view through `extras.projections.spatial_norm`.

    Raises:
        DataError: a feature tensor of another shape.
    """
    B, V, h, w = layout.index.shape
    points = token_points(grid_sizes(layout), (h, w), registration)
    mapped = _map(views.student_to_view, points).flatten(0, 1)
    mask = valid[..., None]
    for feature in features:
        if feature.ndim != 5 or feature.shape[:2] != (B, V):
            raise DataError(
                f"the teacher returned features of shape {tuple(feature.shape)}; expected ({B}, {V}, rows, "
                "columns, channels), one grid for each view."
            )
    masks = [mask & _measured(f, mapped).view(B, V, h, w, 1) if partial else mask for f in features]
    centred = features if cell_mean is None else cell_mean(features, views.present)
    sampled = []
    for feature, mask in zip(centred, masks, strict=True):
        values = sample_grid(feature.detach().float().flatten(0, 1), mapped).view(B, V, h, w, -1)
        sampled.append(torch.where(mask, values, values.new_zeros(())))
    if standardiser is not None:
        sampled = standardiser(sampled, valid)
    if normalised:
        sampled = [spatial_norm(t, mask[..., 0]) for t, mask in zip(sampled, masks, strict=True)]
    if pe_scale:
        H, W, C = features[0].shape[2:]
        table = sincos_table(H, W, C, points.device)[None]
        # One long grid instead of one table a view.
        embedding = sample_grid(table, points.view(1, B * V * h, w, 2)).view(B, V, h, w, C)
        sampled = [t + pe_scale * embedding for t in sampled]
    return [torch.where(mask, t, t.new_zeros(())) for t, mask in zip(sampled, masks, strict=True)]


def _measured(feature: Tensor, points: Tensor) -> Tensor:
    """(B V, h, w) bool: tokens more than half of which reads cells that are not all zeros."""
    known = (feature != 0).any(-1).flatten(0, 1).float()[..., None]
    return sample_grid(known, points)[..., 0] > 0.5
