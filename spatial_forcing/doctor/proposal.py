"""The adapter: `SpatialForcing` for what was found, as an object and as lines to paste.

Shapes: B samples, V views, h x w tokens of a view.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spatial_forcing.alignment import Alignment, Sequencer, TokenLayout, Views
from spatial_forcing.doctor.blocks import Candidate
from spatial_forcing.doctor.images import Normalisation, Pictures, Piece, access, entry, tensors
from spatial_forcing.doctor.subject import Subject
from spatial_forcing.errors import ConfigError
from spatial_forcing.forcing.adapter import ModuleStudent, as_student
from spatial_forcing.forcing.config import ForcingConfig
from spatial_forcing.forcing.layout import layout_from_input_ids, layout_from_offset
from spatial_forcing.forcing.module import SpatialForcing
from spatial_forcing.forcing.tap import width_of
from spatial_forcing.protocols import Teacher

CONFIG_DEPTH = 3
"""Modules nested deeper than this are not asked for their config."""
TAKEN = {"model", "teacher", "student", "forcing", "torch", "blocks", "layout", "views", "batch", "calls"}
"""Names that the lines use themselves."""


@dataclass
class Adapter:
    """`SpatialForcing` for a model: what is built, and the lines of Python that say the same.

    Attributes:
        names: imported from `spatial_forcing`.
        preamble: lines before `student = ...`, with functions that a lambda cannot hold.
        student: the arguments of `as_student` after the model.
        layer: blocks before the tap; None: the default.
        width: `student_dim` of `SpatialForcing`; None: read from the norms.
        mine: names of the user's own code.
        torch: whether the lines use torch.
        direct: the model is a student already, so `as_student` is not needed.
    """

    names: set[str] = field(default_factory=lambda: {"SpatialForcing", "as_student"})
    preamble: list[str] = field(default_factory=list)
    student: dict[str, Piece[Any]] = field(default_factory=dict)
    layer: int | None = None
    width: int | None = None
    mine: set[str] = field(default_factory=set)
    torch: bool = False
    direct: bool = False

    @property
    def code(self) -> str:
        """The lines."""
        names = self.names | ({"ForcingConfig"} if self.layer is not None else set())
        lines = ["import torch"] * self.torch
        lines += [f"from spatial_forcing import {', '.join(sorted(names))}", ""]
        lines += [*self.preamble, ""] if self.preamble else []
        lines += [f"# Your own: {', '.join(sorted(self.mine))}."] if self.mine else []
        if self.direct:
            lines += ["student = model  # a Student already"]
        else:
            arguments = [f"    {name}={piece.code}," for name, piece in self.student.items()]
            lines += ["student = as_student(", "    model,", *arguments, ")"]
        arguments = ["student", "teacher"]
        arguments += [f"ForcingConfig(pairs=(({self.layer}, -1),))"] if self.layer is not None else []
        arguments += [f"student_dim={self.width}"] if self.width is not None else []
        return "\n".join([*lines, f"forcing = SpatialForcing({', '.join(arguments)})"])

    def build(self, model: nn.Module, teacher: Teacher) -> SpatialForcing:
        """The `SpatialForcing` that the lines make."""
        config = None if self.layer is None else ForcingConfig(pairs=((self.layer, -1),))
        parts = {name: piece.value for name, piece in self.student.items()}
        student = model if self.direct else as_student(model, **parts)
        return SpatialForcing(student, teacher, config, student_dim=self.width)


def propose(
    subject: Subject,
    *,
    blocks: Candidate,
    stream: Piece[Sequencer] | None,
    pictures: Pictures,
    normalisation: Normalisation | None,
    grids: Sequence[Tensor] | None,
    width: int,
    layer: int | None,
) -> Adapter:
    """Put the adapter together.

    Args:
        subject: with what the user gave: own layout, views and loss are used where there are any.
        blocks: those that hold the visual tokens.
        stream: how a sequence is made of what enters them, where the first call is none.
        pictures: the batch's images.
        normalisation: of the images; None with the user's own views.
        grids: (h, w) positions of each view; None with the user's own layout.
        width: of the residual stream.
        layer: blocks before the tap, if not the default.
    """
    adapter = Adapter(layer=layer)
    if _read_width(blocks.blocks) != width:
        adapter.width = width
    if subject.student is not None and not isinstance(subject.student, ModuleStudent):
        adapter.names.discard("as_student")
        adapter.direct = True
        return adapter
    own = subject.student
    if isinstance(dict(subject.bare.named_modules()).get(blocks.path.partition(".")[0]), nn.Module):
        adapter.student["blocks"] = Piece(blocks.code, blocks.blocks)
    else:
        _own(adapter, "blocks", "blocks", blocks.blocks)
    if stream is not None and own is not None:
        _own(adapter, "sequence", "sequence", stream.value)
    elif stream is not None:
        adapter.torch = adapter.torch or "torch." in stream.code
        adapter.student["sequence"] = stream
    if grids is None:
        _own(adapter, "layout", "layout", subject.layout or (lambda batch: _alignment(subject, batch).layout))
    else:
        _layout(adapter, subject, pictures, grids)
    if normalisation is None:
        _own(adapter, "views", "views", subject.views or (lambda batch: _alignment(subject, batch).views))
    else:
        _views(adapter, pictures, normalisation)
    loss = subject.loss or (own._loss if own is not None else None)
    if loss is not None:
        name = getattr(loss, "__name__", "loss")
        _own(adapter, "loss", name if name.isidentifier() and name not in TAKEN else "loss", loss)
    return adapter


def _own(adapter: Adapter, argument: str, name: str, value: Any) -> None:
    """An argument that is the user's own object."""
    adapter.mine.add(name)
    adapter.student[argument] = Piece(name, value)


def _read_width(blocks: Sequence[nn.Module]) -> int | None:
    try:
        return width_of(blocks, None)
    except ConfigError:
        return None


def _views(adapter: Adapter, pictures: Pictures, normalisation: Normalisation) -> None:
    adapter.names.add("Views")
    adapter.torch = adapter.torch or len(pictures.found) > 1
    views = views_function(pictures, normalisation)
    code = pictures.stacked.code
    plain = {
        (0.0, 1.0): "",
        (0.5, 0.5): " * 0.5 + 0.5",
        (0.0, 1 / 255): "" if normalisation.name == "uint8" else " / 255",
    }.get((normalisation.mean[0], normalisation.std[0]))
    if plain is not None:
        adapter.student["views"] = Piece(f"lambda batch: Views.create({code}{plain})", views)
        return
    adapter.torch = True
    adapter.preamble += [
        f"MEAN = torch.tensor({list(normalisation.mean)}).view(3, 1, 1)",
        f"STD = torch.tensor({list(normalisation.std)}).view(3, 1, 1)",
        "",
        "def views(batch):",
        f"    pixels = {code}",
        "    return Views.create(pixels * STD.to(pixels) + MEAN.to(pixels))",
    ]
    adapter.student["views"] = Piece("views", views)


def views_function(pictures: Pictures, normalisation: Normalisation) -> Callable[[Any], Views]:
    """The proposed batch -> Views."""
    stacked = pictures.stacked.value

    def views(batch: Any) -> Views:
        pixels = stacked(batch)
        return Views.create(pixels if normalisation.name == "uint8" else normalisation.undo(pixels))

    return views


def _layout(adapter: Adapter, subject: Subject, pictures: Pictures, grids: Sequence[Tensor]) -> None:
    shapes = [(grid.shape[0], grid.shape[1]) for grid in grids]
    if (placeholder := _placeholder(subject.example(), grids)) is not None:
        path, token = placeholder
        ids, alike = access(path), len(set(shapes)) == 1
        sizes = f"{shapes[0]}" if alike else f"[{shapes}] * len({ids})"

        def by_ids(batch: Any) -> TokenLayout:
            marked = entry(batch, path)
            return layout_from_input_ids(marked, token, shapes[0] if alike else [shapes] * len(marked))

        adapter.names.add("layout_from_input_ids")
        named = _config_name(subject.bare, token)
        code = f"lambda batch: layout_from_input_ids({ids}, {named}, {sizes})"
        adapter.student["layout"] = Piece(code, by_ids)
        return
    count = _count(pictures)
    if (plain := _offset(grids)) is not None:
        start, stride = plain
        adapter.names.add("layout_from_offset")
        step = "" if stride is None else f", stride={stride}"
        adapter.student["layout"] = Piece(
            f"lambda batch: layout_from_offset({count.code}, {len(grids)}, {shapes[0]}, start={start}{step})",
            lambda batch: layout_from_offset(
                count.value(batch), len(grids), shapes[0], start=start, stride=stride
            ),
        )
        return
    index = _index(grids)
    adapter.names.add("TokenLayout")
    adapter.torch = True
    if adapter.preamble:
        adapter.preamble.append("")
    adapter.preamble += [*_index_code(index), "", "def layout(batch):"]
    adapter.preamble += [
        f"    index = INDEX.expand({count.code}, *INDEX.shape)",
        "    return TokenLayout(index, index >= 0)",
    ]

    def by_index(batch: Any) -> TokenLayout:
        positions = index.expand(count.value(batch), *index.shape)
        return TokenLayout(positions, positions >= 0)

    adapter.student["layout"] = Piece("layout", by_index)


def _count(pictures: Pictures) -> Piece[Callable[[Any], int]]:
    """The number of samples of `batch`."""
    first = [(image.path, image.value) for image in pictures.found]
    for path, value in [*first, *tensors(pictures.batch)]:
        if value.ndim and len(value) == pictures.samples:
            return Piece(f"len({access(path)})", lambda batch, path=path: len(entry(batch, path)))
    stacked = pictures.stacked
    return Piece(f"len({stacked.code})", lambda batch: len(stacked.value(batch)))


def _placeholder(batch: Mapping[str, Any], grids: Sequence[Tensor]) -> tuple[tuple[Any, ...], int] | None:
    """An integer tensor, and the id whose places in the first sample are the tokens', in this order."""
    wanted = torch.cat([grid.flatten() for grid in grids])
    for path, value in tensors(batch):
        if value.dtype != torch.long or value.ndim != 2 or value.shape[1] <= int(wanted.max()):
            continue
        row = value[0].cpu()
        token = int(row[wanted[0]])
        places = (row == token).nonzero().flatten()
        # Masks and token types say where images are, but not always which of them; ids do.
        if token > 1 and torch.equal(places, wanted):
            return path, token
    return None


def _config_name(model: nn.Module, token: int) -> str:
    """`model.config.image_token_id` where that is the placeholder's id; otherwise the number."""
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if path.count(".") >= CONFIG_DEPTH or config is None:
            continue
        for name in ("image_token_id", "image_token_index"):
            if getattr(config, name, None) == token:
                return ".".join(filter(None, ("model", path, "config", name)))
    return str(token)


def _offset(grids: Sequence[Tensor]) -> tuple[int, int | None] | None:
    """(start, stride) of equal views without gaps inside; stride None: the views touch."""
    first = grids[0]
    if any(grid.shape != first.shape for grid in grids):
        return None
    start, size = int(first[0, 0]), first.numel()
    starts = [int(grid[0, 0]) for grid in grids]
    steps = {b - a for a, b in itertools.pairwise(starts)}
    solid = all(
        torch.equal(grid.flatten(), s + torch.arange(size)) for grid, s in zip(grids, starts, strict=True)
    )
    if not solid or len(steps) > 1 or any(step < size for step in steps):
        return None
    stride = steps.pop() if steps else size
    return start, None if stride == size else stride


def _index(grids: Sequence[Tensor]) -> Tensor:
    """(V, h, w) positions; grids of different sizes are padded with -1."""
    h, w = (max(grid.shape[d] for grid in grids) for d in (0, 1))
    index = torch.full((len(grids), h, w), -1)
    for view, grid in enumerate(grids):
        index[view, : grid.shape[0], : grid.shape[1]] = grid
    return index


def _index_code(index: Tensor) -> list[str]:
    """Python for INDEX, the (V, h, w) positions: by the steps of each view where they are regular."""
    _, h, w = index.shape
    if h > 1 and w > 1:
        steps = torch.stack(
            [index[:, 0, 0], index[:, 1, 0] - index[:, 0, 0], index[:, 0, 1] - index[:, 0, 0]], 1
        )
        start, down, right = steps.T[..., None, None]
        if torch.equal(start + down * torch.arange(h)[:, None] + right * torch.arange(w), index):
            return [
                "# Of each view: position of the first token, steps to the next row and column.",
                f"START, DOWN, RIGHT = torch.tensor({steps.T.tolist()})[..., None, None]",
                f"INDEX = START + DOWN * torch.arange({h})[:, None] + RIGHT * torch.arange({w})",
            ]
    return [f"INDEX = torch.tensor({index.tolist()})"]


def _alignment(subject: Subject, batch: Any) -> Alignment:
    student: Any = subject.student
    alignment: Alignment = student.alignment(batch)
    return alignment
