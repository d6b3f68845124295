"""The painted-patch test of a claimed layout: each patch must change most the position claimed for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spatial_forcing.alignment import Alignment, TokenLayout, Views, transform
from spatial_forcing.doctor.grid import MIN_PATCHES, Probe, largest, spread
from spatial_forcing.doctor.images import Box, Pictures
from spatial_forcing.errors import LayoutError, SpatialForcingError
from spatial_forcing.forcing.layout import Grid, check_layout, grid_sizes

INSIDE = 0.5
"""A painted part is in its place if this share of the change is there."""
SAMPLES = 2
"""Samples that are painted; a layout that fits the first alone is found out by the second."""


@dataclass(frozen=True)
class Patch:
    """One painted patch: the token it belongs to, the position claimed and the one that changed most."""

    sample: int
    view: int
    row: int
    column: int
    claimed: int
    found: int


def paint_patches(probe: Probe, pictures: Pictures, layout: TokenLayout, views: Views) -> list[Patch]:
    """Paint five patches or more of each view of the first samples.

    Raises:
        LayoutError: a layout that does not describe the batch.
    """
    check_layout(layout, batch_size=probe.before.shape[0], views=views.present.shape[1])
    if layout.index.shape[1] != pictures.views:
        raise LayoutError(
            f"the layout claims {layout.index.shape[1]} views a sample, but the batch holds "
            f"{pictures.views}; name the images to use with --image-key, or correct the layout."
        )
    length = probe.before.shape[1]
    if int(layout.index.max()) >= length:
        raise LayoutError(
            f"the layout claims position {int(layout.index.max())}, but the sequence at the first decoder "
            f"block has {length}; check start, stride and grid."
        )
    sizes, patches = grid_sizes(layout), []
    for sample in range(min(SAMPLES, layout.index.shape[0])):
        for view in range(pictures.views):
            grid = (int(sizes[sample, view, 0]), int(sizes[sample, view, 1]))
            for row, column in _chosen(layout.valid[sample, view], grid):
                affine = views.student_to_view[sample, view]
                box = patch_box(affine, (row, column), grid, pictures.size(view))
                found = int(largest(probe, pictures, sample, view, box))
                claimed = int(layout.index[sample, view, row, column])
                patches.append(Patch(sample, view, row, column, claimed, found))
    if not patches:
        raise LayoutError(
            "no token of the layout is valid, so nothing can be painted; give a batch with images."
        )
    return patches


def compare_views(pictures: Pictures, student: Any, layout: TokenLayout, views: Views) -> str | None:
    """What is wrong with the images that the student's views show, in words; None: nothing.

    A small part of one image is painted in the batch; it must change in `views`, in the same place.
    """
    before = views.images
    for view in range(pictures.views):
        grid = grid_sizes(layout)[0, view].tolist()
        for row, column in spread((grid[0], grid[1])):
            # A quarter of a token's patch: patches that are merged in a wrong order stay within the token.
            token = (2 * row, 2 * column + 1)
            box = patch_box(
                views.student_to_view[0, view], token, (2 * grid[0], 2 * grid[1]), pictures.size(view)
            )
            change = torch.zeros(before.shape[:2] + before.shape[3:])
            for batch in pictures.painted(0, view, box):
                after = claims(student, batch)[1].images
                change = torch.maximum(change, (after - before).abs().sum(2))
            fault = _misplaced(change, view, box, pictures.size(view))
            if fault is not None:
                return fault
    return None


def _misplaced(change: Tensor, view: int, box: Box, size: tuple[int, int]) -> str | None:
    """`change` is (B, V, H, W) of the views' images after `box` of an image of `size` was painted."""
    weights = change.flatten(2).sum(-1)
    if not bool(weights.any()):
        return (
            f"views(batch) does not change when the batch's image {view} of sample 0 is painted: it reads "
            "other images than the model does."
        )
    sample, shown = divmod(int(weights.argmax()), change.shape[1])
    if (sample, shown) != (0, view):
        return (
            f"views(batch) shows the batch's image {view} of sample 0 as view {shown} of sample {sample}: "
            "put the cameras in the order of the model's sequence."
        )
    height, width = change.shape[2:]
    y0, y1, x0, x1 = box
    rows = slice(int(y0 / size[0] * height - 1), int(y1 / size[0] * height + 1) + 1)
    columns = slice(int(x0 / size[1] * width - 1), int(x1 / size[1] * width + 1) + 1)
    rows, columns = (slice(max(part.start, 0), part.stop) for part in (rows, columns))
    inside = float(change[0, view, rows, columns].sum() / weights[0, view])
    if inside >= INSIDE:
        return None
    return (
        f"a part of image {view}, painted at rows {y0} to {y1} and columns {x0} to {x1} of {size[0]} x "
        f"{size[1]}, changes views(batch) elsewhere ({100 * inside:.0f} % in the same place): its "
        "pixels are in another order than the model's (the order in which patches are merged, rows and "
        "columns swapped), or framed otherwise without a student_to_view that says so."
    )


def _chosen(valid: Tensor, grid: Grid) -> list[tuple[int, int]]:
    """Cells to paint: `spread` over the grid, filled up with valid ones where those are masked out."""
    if min(grid) < 1:
        return []
    chosen = [(row, column) for row, column in spread(grid) if bool(valid[row, column])]
    tokens = [(row, column) for row, column in valid.nonzero().tolist() if (row, column) not in chosen]
    missing = max(MIN_PATCHES - len(chosen), 0)
    return chosen + tokens[:: max(1, len(tokens) // max(missing, 1))][:missing]


def patch_box(affine: Tensor, token: tuple[int, int], grid: Grid, size: tuple[int, int]) -> Box:
    """The pixels of a token, through the (2, 3) map from the student's framing to the view."""
    low, high = (
        torch.tensor([(token[1] + d) / grid[1], (token[0] + d) / grid[0]], dtype=torch.float64) * 2 - 1
        for d in (0, 1)
    )
    corners = transform(affine.double().cpu(), torch.stack([low, high]))
    H, W = size
    (x0, y0), (x1, y1) = ((corners + 1) / 2 * torch.tensor([W, H])).round().long().sort(0).values.tolist()
    y0, x0 = min(max(y0, 0), H - 1), min(max(x0, 0), W - 1)
    return y0, max(min(y1, H), y0 + 1), x0, max(min(x1, W), x0 + 1)


def explain(patches: list[Patch], layout: TokenLayout, truth: list[Tensor] | None = None) -> str | None:
    """What is wrong with the claimed positions, in words; None: nothing.

    Args:
        patches: painted.
        layout: the claim.
        truth: the positions of each view of sample 0 as found without it, if known.
    """
    wrong = [p for p in patches if p.claimed != p.found]
    if not wrong:
        return None
    shown = "; ".join(
        f"sample {p.sample} view {p.view} row {p.row} column {p.column}: claimed {p.claimed}, "
        f"changed {p.found}"
        for p in wrong[:4]
    )
    why = (
        _shift(patches)
        or _transpose(patches, layout)
        or _view_order(patches, layout)
        or _other_grid(layout, truth or [])
        or _stride(patches)
        or f"{shown}."
    )
    return f"{len(wrong)} of {len(patches)} painted patches changed another position than claimed. {why}"


def _shift(patches: list[Patch]) -> str | None:
    offsets = {p.found - p.claimed for p in patches}
    if len(offsets) != 1:
        return None
    (offset,) = offsets
    side = "early" if offset > 0 else "late"
    return f"Every claimed position is {abs(offset)} too {side}: add {offset:+d} to all of them."


def _transpose(patches: list[Patch], layout: TokenLayout) -> str | None:
    if any(_at(layout, p.sample, p.view, p.column, p.row) != p.found for p in patches):
        return None
    return "Rows and columns are swapped: the layout is the transpose of the image's grid."


def _view_order(patches: list[Patch], layout: TokenLayout) -> str | None:
    V = layout.index.shape[1]
    for shift in range(1, V):
        if all(_at(layout, p.sample, (p.view + shift) % V, p.row, p.column) == p.found for p in patches):
            return f"The views are in another order: the batch's view 0 lies where view {shift} is claimed."
    return None


def _other_grid(layout: TokenLayout, truth: list[Tensor]) -> str | None:
    for view, (index, claimed) in enumerate(zip(truth, grid_sizes(layout)[0].tolist(), strict=False)):
        if list(index.shape) != claimed:
            return (
                f"View {view} is claimed as {claimed[0]} x {claimed[1]} tokens, but has {index.shape[0]} x "
                f"{index.shape[1]}, from position {int(index[0, 0])} to {int(index[-1, -1])}."
            )
    return None


def _stride(patches: list[Patch]) -> str | None:
    offsets: dict[int, set[int]] = {}
    for p in patches:
        offsets.setdefault(p.view, set()).add(p.found - p.claimed)
    if any(len(found) > 1 for found in offsets.values()):
        return None
    each = ", ".join(f"view {view}: {found.pop():+d}" for view, found in sorted(offsets.items()))
    return f"The offset differs between the views ({each}): check start and stride."


def _at(layout: TokenLayout, sample: int, view: int, row: int, column: int) -> int:
    """The claimed position, -1 outside the grid."""
    _, _, h, w = layout.index.shape
    return int(layout.index[sample, view, row, column]) if row < h and column < w else -1


def claims(student: Any, batch: Mapping[str, Any]) -> tuple[TokenLayout, Views]:
    """The layout and views that a student claims for the batch, on the CPU.

    Raises:
        LayoutError: its `layout` or `views` fails on the batch.
    """
    try:
        alignment: Alignment = student.alignment(batch)
    except SpatialForcingError:
        raise
    except Exception as error:
        raise LayoutError(
            f"the given layout or views failed on the batch: {type(error).__name__}: {error}. They take the "
            "batch and return a TokenLayout and Views."
        ) from error
    layout = alignment.layout
    return TokenLayout(layout.index.cpu(), layout.valid.cpu()), alignment.views.to("cpu")
