"""TokenLayout: where each view's token grid sits in the student's sequence.

Shapes: B batch, V view, h x w tokens of a view, H x W pixels, L sequence length.

Grids of different sizes are padded at the right and the bottom to the largest one; a padded entry has index
-1 and is never valid. So a layout knows each view's real grid, on which its sampling coordinates depend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from spatial_forcing.alignment import TokenLayout
from spatial_forcing.errors import LayoutError

Grid = tuple[int, int]
"""(rows, columns) of tokens."""


def layout_from_offset(
    batch_size: int,
    views: int,
    grid: Grid,
    *,
    start: int,
    stride: int | None = None,
    valid: Tensor | None = None,
    device: torch.device | str | None = None,
) -> TokenLayout:
    """Layout of views that sit one after the other at the same place in every sample.

    Args:
        batch_size: B.
        views: V.
        grid: (h, w).
        start: position of the first token of the first view.
        stride: distance between the starts of two views; default h * w (no separator between them).
        valid: (B, V) presence or (B, V, h, w) token validity; default all True.
        device: where to put it.

    Raises:
        LayoutError: no view tokens, a negative start, or overlapping views.
    """
    h, w = grid
    stride = h * w if stride is None else stride
    if views < 1 or h < 1 or w < 1:
        raise LayoutError(
            f"a layout of {views} views of {h} x {w} tokens has no view tokens; give at least one."
        )
    if start < 0 or (views > 1 and stride < h * w):
        raise LayoutError(
            f"views of {h} x {w} tokens cannot start at {start} with stride {stride}; start >= 0 and "
            f"stride >= {h * w} are needed."
        )
    one = torch.arange(h * w, device=device).view(h, w)
    starts = start + stride * torch.arange(views, device=device)
    index = (starts[:, None, None] + one).expand(batch_size, views, h, w).clone()
    return TokenLayout(index, _expand_valid(valid, index))


def layout_from_input_ids(
    input_ids: Tensor,
    image_token_id: int,
    grids: Grid | Sequence[Sequence[Grid]],
    *,
    views: int | None = None,
    valid: Tensor | None = None,
) -> TokenLayout:
    """Layout of a sequence in which every visual token is marked by a placeholder id.

    Args:
        input_ids: (B, L) long.
        image_token_id: the placeholder, e.g. `model.config.image_token_id`.
        grids: (h, w) for all views alike, or one list of (h, w) a sample, in the order of the views (for
            Qwen-VL: `image_grid_thw` divided by the merge size).
        views: V; default as many as the first sample holds (one grid) or as the longest list has.
        valid: (B, V) presence or (B, V, h, w) token validity; default all True.

    Raises:
        LayoutError: no placeholder at all, or a sample whose placeholders do not fill its grids.
    """
    marked = input_ids == image_token_id
    counts = marked.sum(1).tolist()
    if not any(counts):
        raise LayoutError(
            f"no token of input_ids is the image token {image_token_id}; pass the model's image token id and "
            "ids into which the processor has expanded the images."
        )
    per_sample = _per_sample_grids(grids, counts, views)
    V = max(len(sample) for sample in per_sample) if views is None else views
    h = max((g[0] for sample in per_sample for g in sample), default=0)
    w = max((g[1] for sample in per_sample for g in sample), default=0)
    index = torch.full((len(counts), V, h, w), -1, dtype=torch.long)
    for b, sample in enumerate(per_sample):
        needed = sum(rows * columns for rows, columns in sample)
        if needed != counts[b] or len(sample) > V:
            raise LayoutError(
                f"sample {b} has {counts[b]} image tokens, but its {len(sample)} grids {list(sample)} need "
                f"{needed} (views: {V}); check the grids, the merge size and truncation of the sequence."
            )
        positions = marked[b].nonzero().flatten().cpu()
        for v, (rows, columns) in enumerate(sample):
            here, positions = positions[: rows * columns], positions[rows * columns :]
            index[b, v, :rows, :columns] = here.view(rows, columns)
    index = index.to(input_ids.device)
    return TokenLayout(index, _expand_valid(valid, index))


def _per_sample_grids(
    grids: Grid | Sequence[Sequence[Grid]], counts: list[int], views: int | None
) -> list[Sequence[Grid]]:
    if len(grids) == 2 and all(isinstance(side, int) for side in grids):
        rows, columns = int(grids[0]), int(grids[1])  # type: ignore[arg-type]
        size = rows * columns
        if size < 1:
            raise LayoutError(
                f"a grid of {rows} x {columns} has no view tokens; give at least one row and column."
            )
        uneven = [b for b, n in enumerate(counts) if n % size]
        if uneven:
            raise LayoutError(
                f"sample {uneven[0]} has {counts[uneven[0]]} image tokens, which is not a multiple of "
                f"{rows} x {columns}; check the grid and truncation of the sequence."
            )
        return [[(rows, columns)] * (n // size) for n in counts]
    if len(grids) != len(counts):
        raise LayoutError(
            f"grids has {len(grids)} entries for a batch of {len(counts)}; give one list a sample."
        )
    return [[(int(g[0]), int(g[1])) for g in sample] for sample in grids]  # type: ignore[union-attr]


def _expand_valid(valid: Tensor | None, index: Tensor) -> Tensor:
    real = index >= 0
    if valid is None:
        return real
    valid = valid.to(index.device)
    if valid.ndim == 2:
        valid = valid[:, :, None, None]
    if valid.dtype != torch.bool or valid.ndim != 4 or valid.shape[:2] != index.shape[:2]:
        raise LayoutError(
            f"valid is {tuple(valid.shape)} of {valid.dtype}; expected bool of {tuple(index.shape[:2])} "
            f"or {tuple(index.shape)}."
        )
    return real & valid.expand_as(index)


def grid_sizes(layout: TokenLayout) -> Tensor:
    """(B, V, 2) long: the real (rows, columns) of each view's grid, without padding; 0 if absent."""
    real = layout.index >= 0
    return torch.stack([real.any(-1).sum(-1), real.any(-2).sum(-1)], dim=-1)


def tokens_valid(mask: Tensor, grid: Grid) -> Tensor:
    """Token validity from a pixel mask: (B, V, H, W) bool -> (B, V, h, w) bool.

    A token counts if its top-left pixel does (nearest sample, as in the released pi0 code).
    """
    H, W = mask.shape[-2:]
    rows = top_left(torch.arange(grid[0], device=mask.device), grid[0], H)
    columns = top_left(torch.arange(grid[1], device=mask.device), grid[1], W)
    return mask[..., rows[:, None], columns]


def top_left(token: Tensor, tokens: int | Tensor, pixels: int) -> Tensor:
    """The first pixel of token number `token` of `tokens` over `pixels`, in integer arithmetic."""
    return torch.div(token * pixels, tokens, rounding_mode="floor")


def shifted(layout: TokenLayout, shift: int) -> TokenLayout:
    """The same grids `shift` positions later; 1 is the slice of the released recipe."""
    if shift == 0:
        return layout
    return replace(layout, index=torch.where(layout.index >= 0, layout.index + shift, layout.index))


def check_layout(layout: TokenLayout, *, batch_size: int, views: int) -> None:
    """Refuse a layout that does not describe its batch.

    Args:
        layout: what the student returned, shifted.
        batch_size, views: B and V of the batch's `Views`.

    Raises:
        LayoutError: shapes that disagree, no view tokens at all, or a padded token marked valid.
    """
    index, valid = layout.index, layout.valid
    if (
        index.ndim != 4
        or index.dtype != torch.long
        or valid.shape != index.shape
        or valid.dtype != torch.bool
    ):
        raise LayoutError(
            f"layout.index is {tuple(index.shape)} of {index.dtype} and layout.valid {tuple(valid.shape)} of "
            f"{valid.dtype}; expected long and bool of the same shape (B, V, h, w)."
        )
    if index.numel() == 0 or bool((index < 0).all()):
        raise LayoutError(
            f"the layout has no view tokens (index is {tuple(index.shape)}); the alignment loss needs the "
            "image tokens of at least one view. Check the student's layout and that the batch holds images."
        )
    if tuple(index.shape[:2]) != (batch_size, views):
        raise LayoutError(
            f"the layout describes {index.shape[0]} samples x {index.shape[1]} views, but the teacher's "
            f"views are {batch_size} x {views}; make the student's layout and views agree."
        )
    if bool((valid & (index < 0)).any()):
        raise LayoutError(
            "the layout marks tokens valid whose position is negative (-1 is padding); fix `valid`."
        )


def gather_tokens(hidden: Tensor, layout: TokenLayout) -> Tensor:
    """The hidden states at the layout's positions: (B, L, D) -> (B, V * h * w, D), view-major, row-major.

    Raises:
        LayoutError: another batch size, or a position outside the sequence.
    """
    batch_size, length = hidden.shape[:2]
    if batch_size != layout.index.shape[0]:
        raise LayoutError(
            f"the residual stream has batch size {batch_size}, the layout {layout.index.shape[0]}; the "
            "layout needs one row for each row of the decoder's batch."
        )
    last = int(layout.index.max())
    if last >= length:
        raise LayoutError(
            f"the layout points at position {last} of a sequence of {length} tokens. Check the start and "
            "grid of the views, token_shift, and truncation of the sequence."
        )
    index = layout.index.to(hidden.device).flatten(1).clamp(min=0)
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
