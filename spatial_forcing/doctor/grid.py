"""Where each view's tokens are in the sequence, found by painting the images.

Shapes: L positions of the sequence, V views, h x w tokens of a view, H x W pixels.

Painting a whole view changes its positions; painting one of h stripes changes the tokens of that row more
than any other stripe does, and columns likewise. A grid is accepted if every cell has a token and single
patches then confirm it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spatial_forcing.alignment import Sequencer
from spatial_forcing.doctor.blocks import FLOOR, seeded
from spatial_forcing.doctor.images import Box, Pictures
from spatial_forcing.doctor.subject import Subject
from spatial_forcing.errors import LayoutError
from spatial_forcing.forcing.layout import Grid
from spatial_forcing.forcing.tap import entering, first_norm, in_sequence

RESPONDS = 1e-4
"""A position belongs to a view if painting it changes the position by this part of the largest change."""
EXTRAS = 8
"""Class tokens, registers and the like that may lie among a view's positions."""
TRIES = 8
CELL_BY_CELL = 2
"""Grids that are painted cell by cell where stripes, which mix more, did not tell."""
EXTRA_COST = 0.3
"""One position left over counts as much as this difference of the logarithm of height over width."""
LOCAL = 0.6
"""A position is local if one row stripe and one column stripe each make up this part of its changes."""
MIN_PATCHES = 5


class _Arrived(Exception):
    """The first block has run as often as it will; the rest of the model need not run."""


class Probe:
    """Reads what enters the first decoder block, and how painting changes it.

    Args:
        subject: the model.
        block: its first decoder block.
        batch: the example.
        sequence: see `Alignment.sequence`.
        calls: how often the block runs.

    Raises:
        LayoutError: the input differs between two runs of the same batch.
    """

    def __init__(
        self,
        subject: Subject,
        block: nn.Module,
        batch: Mapping[str, Any],
        sequence: Sequencer | None = None,
        calls: int = 1,
    ) -> None:
        self.subject, self.norm = subject, first_norm(block)
        self.sequence, self.calls = sequence, calls if sequence is not None else 1
        self.before = self.read(batch)
        if not bool(torch.isfinite(self.before).all()):
            raise LayoutError(
                "what enters the first decoder block is not finite; check the batch and the weights."
            )
        again = self.read(batch)
        if again.shape != self.before.shape or bool(
            (again - self.before).norm() > FLOOR * self.before.norm()
        ):
            raise LayoutError(
                "what enters the first decoder block differs between two runs of the same batch with the "
                "same seed, in eval mode; painting cannot be told from noise. Make the forward deterministic "
                "(no random crops or generators of its own) in eval mode."
            )

    @torch.no_grad()
    def read(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, L, D) float32: what enters the first block."""
        calls: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            value = entering(args, kwargs)
            calls.append(value[0] if isinstance(value, (tuple, list)) else value)
            if len(calls) == self.calls:
                raise _Arrived

        handle = self.norm.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with seeded():
                self.subject.run(batch)
        except _Arrived:
            return in_sequence(calls, self.sequence, 0).detach().float()
        finally:
            handle.remove()
        raise LayoutError("the first decoder block was not reached; name the blocks that run with --blocks.")

    def painted(self, pictures: Pictures, sample: int, view: int, box: Box | None = None) -> Tensor:
        """(B, L): how far each position moves when a box of an image is painted."""
        return torch.stack([self.change(batch) for batch in pictures.painted(sample, view, box)]).amax(0)

    def change(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, L) on the CPU: how far each position moved from the unpainted batch."""
        after = self.read(batch)
        if after.shape != self.before.shape:
            raise LayoutError(
                f"painting an image changes the sequence from {tuple(self.before.shape)} to "
                f"{tuple(after.shape)}; tokens that are dropped or added by content have no fixed places to "
                "align."
            )
        return (after - self.before).norm(dim=-1).cpu()


def cell(row: int, column: int, grid: Grid, size: tuple[int, int]) -> Box:
    """The pixels of one token of a grid over an image of (H, W)."""
    (h, w), (H, W) = grid, size
    return round(row * H / h), round((row + 1) * H / h), round(column * W / w), round((column + 1) * W / w)


def views_positions(probe: Probe, pictures: Pictures, sample: int = 0) -> list[Tensor]:
    """The positions that each view of a sample changes, ascending; each belongs to one view.

    Raises:
        LayoutError: a view that changes nothing, or another sample.
    """
    changes = []
    for view in range(pictures.views):
        change = probe.painted(pictures, sample, view)
        moved = change.amax(1)
        if int(moved.argmax()) != sample and float(moved.max()) > 0:
            raise LayoutError(
                f"image {view} of sample {sample} (counted sample by sample) changes sample "
                f"{int(moved.argmax())} of the decoder's batch; put the images of one sample next to each "
                "other, or on dimension 1."
            )
        if float(change[sample].max()) <= FLOOR * float(probe.before[sample].norm(dim=-1).max()):
            raise LayoutError(
                f"painting the whole of view {view} changes nothing at the first decoder block's input; is "
                "the view masked out, or does the model read it elsewhere? Name the images in use with "
                "--image-key."
            )
        changes.append(change[sample])
    stacked = torch.stack(changes)
    owner = stacked.argmax(0)
    responds = stacked > RESPONDS * stacked.amax(1, keepdim=True)
    return [((owner == v) & responds[v]).nonzero().flatten() for v in range(len(changes))]


def candidate_grids(count: int, size: tuple[int, int]) -> list[Grid]:
    """Grids of at most `count` tokens: of the image's proportions, few positions left over."""
    wanted = math.log(size[0] / size[1])
    scored = [
        (abs(math.log(h / w) - wanted) + EXTRA_COST * (count - h * w), (h, w))
        for h in range(1, count + 1)
        for w in {(count - extra) // h for extra in range(min(EXTRAS, count - 1) + 1)}
        if w >= 1 and h * w > 1 and count - h * w <= EXTRAS
    ]
    return [grid for _, grid in sorted(scored)[:TRIES]]


def find_grid(probe: Probe, pictures: Pictures, view: int, positions: Tensor, wanted: Grid | None) -> Tensor:
    """(h, w) long: the position of each token of a view of sample 0.

    Args:
        probe: at the first block.
        pictures: to paint.
        view: which.
        positions: those that the view changes.
        wanted: the only grid to try.

    Raises:
        LayoutError: no grid fits; tokens that each see the whole image have none.
    """
    size = pictures.size(view)
    tried = [wanted] if wanted is not None else candidate_grids(len(positions), size)
    for grid in tried:
        index = _assign(probe, pictures, view, positions, grid)
        if index is not None and all(
            int(largest(probe, pictures, 0, view, cell(row, column, grid, size))) == int(index[row, column])
            for row, column in spread(grid)
        ):
            return index
    for grid in tried[:CELL_BY_CELL]:
        index = _every_cell(probe, pictures, view, grid)
        if len(index.unique()) == index.numel():
            return index
    named = ", ".join(f"{h} x {w}" for h, w in tried)
    raise LayoutError(
        f"view {view} changes {len(positions)} positions ({_ranges(positions)}), but no grid (tried {named}) "
        "has a token for each patch of the image. Tokens that each see the whole image (Q-Former, resampler) "
        "have no place and cannot be aligned; name blocks before them (--blocks), give the grid (--grid ROWS "
        "COLUMNS) or a Subject(..., layout=..., views=...) if the model crops or pads its images."
    )


def _assign(probe: Probe, pictures: Pictures, view: int, positions: Tensor, grid: Grid) -> Tensor | None:
    (h, w), size = grid, pictures.size(view)
    if h > size[0] or w > size[1] or h * w > len(positions):
        return None

    def stripes(boxes: Sequence[Box]) -> Tensor:
        changed = [probe.painted(pictures, 0, view, box)[0, positions] for box in boxes]
        return torch.stack(changed)

    rows = stripes([(*cell(r, 0, (h, 1), size)[:2], 0, size[1]) for r in range(h)])
    columns = stripes([(0, size[0], *cell(0, c, (1, w), size)[2:]) for c in range(w)])
    cells = rows.argmax(0) * w + columns.argmax(0)
    strength = rows.amax(0) + columns.amax(0)
    index = torch.full((h * w,), -1)
    for i in strength.argsort().tolist():  # the strongest is written last: class tokens change little
        index[cells[i]] = positions[i]
    shares = torch.minimum(*(part.amax(0) / part.sum(0).clamp(min=1e-12) for part in (rows, columns)))
    left_over = ~torch.isin(positions, index)
    if bool((index < 0).any()) or bool((shares[left_over] > LOCAL).any()):
        return None  # a cell without a token, or a token with a place but without a cell
    return index.view(h, w)


def _every_cell(probe: Probe, pictures: Pictures, view: int, grid: Grid) -> Tensor:
    h, w = grid
    boxes = [cell(row, column, grid, pictures.size(view)) for row in range(h) for column in range(w)]
    return torch.stack([largest(probe, pictures, 0, view, box) for box in boxes]).view(h, w)


def largest(probe: Probe, pictures: Pictures, sample: int, view: int, box: Box) -> Tensor:
    """The position of the sample that painting one box changes most."""
    return probe.painted(pictures, sample, view, box)[sample].argmax()


def spread(grid: Grid) -> list[tuple[int, int]]:
    """At least five cells of a grid (all of a smaller one): corners, centre, and others off the diagonal."""
    h, w = grid
    chosen = {
        (0, 0),
        (0, w - 1),
        (h - 1, 0),
        (h - 1, w - 1),
        (h // 2, w // 2),
        (h // 3, 2 * w // 3),
        (h // 2, w // 4),
    }
    for flat in range(h * w):
        if len(chosen) >= min(MIN_PATCHES, h * w):
            break
        chosen.add(divmod(flat, w))
    return sorted(chosen)


def _ranges(positions: Tensor) -> str:
    return f"{int(positions[0])}..{int(positions[-1])}" if len(positions) else "none"
