"""The target: teacher features, brought onto the student's token grid.

Shapes: B batch, V view, h x w student tokens of a view, H x W teacher tokens, C channels.

One sampling rule: token i of n has the coordinate -1 + 2i/(n-1) (the published align-corners resampling),
`student_to_view` maps it into the frame the teacher saw, and the teacher's grid is read there bilinearly.
It is continuous in the crop, and at the identity it is the released code's resize. Outside the frame the
border is repeated; tokens whose point lies outside by more than half a token cell are not valid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_forcing.alignment import TokenLayout, Views, transform
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.forcing.layout import grid_sizes, top_left
from spatial_forcing.forcing.loss import sum_over_ranks
from spatial_forcing.precision import FixedPrecision

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
        ConfigError: `dim` is no multiple of 4.
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


class Standardiser(FixedPrecision):
    """Standardises each teacher channel by the mean and variance of all valid target tokens seen so far.

    Most of the norm of VGGT's features is one constant vector, which the cosine rewards before anything
    spatial is learned (beyond the paper). The moments are cumulative, one set for each teacher layer, summed
    over ranks before use (so every rank has the same ones), include the current batch, and are saved with
    the projector.

    Args:
        layers: number of teacher layers.
        dim: C.
    """

    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, layers: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64, device="cpu"))
        self.register_buffer("total", torch.zeros(layers, dim, dtype=torch.float64, device="cpu"))
        self.register_buffer("squares", torch.zeros(layers, dim, dtype=torch.float64, device="cpu"))

    @torch.no_grad()
    def forward(self, targets: Sequence[Tensor], valid: Tensor) -> list[Tensor]:
        """Standardise one (..., C) target a layer; `valid` (...) selects the tokens that update the moments.

        Moments move in training mode only. Before the first token the targets pass unchanged.
        """
        if self.training:
            self._update(targets, valid)
        if float(self.count) == 0:
            return list(targets)
        mean = self.total / self.count
        deviation = (self.squares / self.count - mean**2).clamp(min=0).sqrt().clamp(min=1e-6)
        return [(t - m.float()) / d.float() for t, m, d in zip(targets, mean, deviation, strict=True)]

    def _update(self, targets: Sequence[Tensor], valid: Tensor) -> None:
        tokens = [t[valid].double() for t in targets]
        moments = torch.cat(
            [
                valid.sum().double()[None],
                torch.stack([t.sum(0) for t in tokens]).flatten(),
                torch.stack([t.square().sum(0) for t in tokens]).flatten(),
            ]
        )
        moments = sum_over_ranks(moments.to(self.count.device))
        self.count += moments[0]
        self.total += moments[1 : 1 + self.total.numel()].view_as(self.total)
        self.squares += moments[1 + self.total.numel() :].view_as(self.squares)


class PlaceMean(FixedPrecision):
    """Subtracts from every cell of the teacher's grid the mean of all frames seen so far (beyond the paper).

    With cameras that do not move, most of what the teacher says at a cell is the same in every frame; the
    cosine is then nearly won by learning that alone. What is left is how this frame differs. Done on the
    teacher's grid, before sampling, so that it is right under crops. The moments are cumulative, one set for
    each layer and view, summed over ranks, include the current batch, and are saved with the projector; they
    take 8 bytes a channel of a cell.

    Args:
        layers: number of teacher layers.
    """

    count: Tensor
    total: Tensor

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers
        # The grid is known with the first features.
        self.register_buffer("count", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("total", torch.zeros(layers, 0, 0, 0, 0, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, features: Sequence[Tensor], present: Tensor) -> list[Tensor]:
        """Centre (B, V, H, W, C) features, one a layer; views that are `present` (B, V) update the moments.

        Moments move in training mode only. Before a view's first frame it passes unchanged.

        Raises:
            DataError: the number of views or the grid is another than before.
        """
        if not self.count.numel():
            self._shape_like(features[0].shape[1:], features[0].device)
        for feature in features:
            if feature.shape[1:] != self.total.shape[1:]:
                raise DataError(
                    f"forcing.centre has the means of (views, rows, columns, channels) "
                    f"{tuple(self.total.shape[1:])}, but the teacher returned {tuple(feature.shape[1:])}; it "
                    "needs the same cameras and image size in every batch. Set it to false for mixed data."
                )
        if self.training:
            self._update(features, present)
        mean = (self.total / self.count.clamp(min=1)[:, None, None, None]).float()
        return [feature.float() - layer for feature, layer in zip(features, mean, strict=True)]

    def _update(self, features: Sequence[Tensor], present: Tensor) -> None:
        shown = present[:, :, None, None, None]
        sums = torch.stack([torch.where(shown, f, 0).double().sum(0) for f in features])
        moments = torch.cat([present.sum(0).double(), sums.flatten()])
        moments = sum_over_ranks(moments.to(self.count.device))
        self.count += moments[: self.count.numel()]
        self.total += moments[self.count.numel() :].view_as(self.total)

    def _shape_like(self, shape: Sequence[int], device: torch.device) -> None:
        self.count = torch.zeros(shape[0], dtype=torch.float64, device=device)
        self.total = torch.zeros(self.layers, *shape, dtype=torch.float64, device=device)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
        stored = state_dict.get(f"{prefix}total")
        if stored is not None and not self.count.numel():
            self._shape_like(stored.shape[1:], self.count.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def make_targets(
    features: Sequence[Tensor],
    views: Views,
    layout: TokenLayout,
    *,
    valid: Tensor,
    registration: str = "corner",
    pe_scale: float = 0.1,
    centre: PlaceMean | None = None,
    standardiser: Standardiser | None = None,
) -> list[Tensor]:
    """Teacher features -> targets on the student's tokens, one (B, V, h, w, C) float32 a layer.

    Order: centre, sample, standardise, add the positional embedding, which is sampled from its table on the
    teacher's grid with the identity map (it describes the student's framing). Rows of invalid tokens are
    zero, whatever the teacher had there, and nothing carries gradients.

    Args:
        features: (B, V, H, W, C), one a layer.
        views: what the teacher saw.
        layout: the student's tokens.
        valid: (B, V, h, w), from `token_validity`.
        registration, pe_scale: see `ForcingConfig`.
        centre: applied to the teacher's grid, or None.
        standardiser: applied to the sampled features, or None.

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
    centred = features if centre is None else centre(features, views.present)
    sampled = []
    for feature in centred:
        values = sample_grid(feature.detach().float().flatten(0, 1), mapped).view(B, V, h, w, -1)
        sampled.append(torch.where(mask, values, values.new_zeros(())))
    if standardiser is not None:
        sampled = standardiser(sampled, valid)
    if pe_scale:
        H, W, C = features[0].shape[2:]
        table = sincos_table(H, W, C, points.device)[None]
        # One long grid instead of one table a view.
        embedding = sample_grid(table, points.view(1, B * V * h, w, 2)).view(B, V, h, w, C)
        sampled = [t + pe_scale * embedding for t in sampled]
    return [torch.where(mask, t, t.new_zeros(())) for t in sampled]
