"""The adapter to paste: `as_student(...)` lines for what was found.

Shapes: B samples, V views, h x w tokens of a view.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spatial_forcing.alignment import Alignment
from spatial_forcing.doctor.blocks import Candidate
from spatial_forcing.doctor.images import Normalisation, Pictures, access, tensors
from spatial_forcing.doctor.subject import Subject
from spatial_forcing.errors import ConfigError
from spatial_forcing.forcing.adapter import ModuleStudent
from spatial_forcing.forcing.tap import width_of

CONFIG_DEPTH = 3
"""Modules nested deeper than this are not asked for their config."""
TAKEN = {"model", "teacher", "student", "forcing", "torch", "blocks", "layout", "views", "batch"}
"""Names that the lines use themselves."""


@dataclass
class Adapter:
    """Lines of Python that make `student` from `model`, and `forcing` from it and a `teacher`.

    Attributes:
        names: imported from `spatial_forcing`.
        preamble: lines before `student = ...`, with functions that a lambda cannot hold.
        student: the arguments of `as_student`, one a line.
        forcing: the arguments of `SpatialForcing` after the student.
        mine: what the lines take from the user's own code, by name.
        torch: whether they use torch.
        direct: the model is a student already, so `as_student` is not needed.
    """

    names: set[str] = field(default_factory=lambda: {"SpatialForcing", "as_student"})
    preamble: list[str] = field(default_factory=list)
    student: list[str] = field(default_factory=list)
    forcing: list[str] = field(default_factory=list)
    mine: dict[str, Any] = field(default_factory=dict)
    torch: bool = False
    direct: bool = False

    @property
    def code(self) -> str:
        """The lines."""
        lines = ["import torch"] * self.torch
        lines += [f"from spatial_forcing import {', '.join(sorted(self.names))}", ""]
        lines += [*self.preamble, ""] if self.preamble else []
        lines += [f"# Your own: {', '.join(sorted(self.mine))}."] if self.mine else []
        if self.direct:
            lines += ["student = model  # a Student already"]
        else:
            lines += self._wrapped()
        lines += [f"forcing = SpatialForcing({', '.join(['student', 'teacher', *self.forcing])})"]
        return "\n".join(lines)

    def _wrapped(self) -> list[str]:
        return ["student = as_student(", "    model,", *(f"    {line}," for line in self.student), ")"]

    def build(self, model: nn.Module, teacher: Any) -> Any:
        """Run the lines; the `SpatialForcing` that they make."""
        namespace = {"model": model, "teacher": teacher, **self.mine}
        exec(compile(self.code, "<the adapter>", "exec"), namespace)
        return namespace["forcing"]


def propose(
    subject: Subject,
    *,
    blocks: Candidate,
    pictures: Pictures,
    normalisation: Normalisation | None,
    grids: Sequence[Tensor] | None,
    width: int,
    layer: int | None,
) -> Adapter:
    """Put the adapter together.

    Args:
        subject: with what the user gave: own layout, views and loss are used where there are any.
        blocks: the decoder's.
        pictures: the batch's images.
        normalisation: of the images; None with the user's own views.
        grids: (h, w) positions of each view; None with the user's own layout.
        width: of the residual stream.
        layer: blocks before the tap, if not the default.
    """
    adapter = Adapter()
    if layer is not None:
        adapter.names.add("ForcingConfig")
        adapter.forcing.append(f"ForcingConfig(pairs=(({layer}, -1),))")
    if _read_width(blocks.blocks) != width:
        adapter.forcing.append(f"student_dim={width}")
    if subject.student is not None and not isinstance(subject.student, ModuleStudent):
        adapter.names.discard("as_student")
        adapter.direct = True
        return adapter
    own = subject.student
    if hasattr(subject.bare, blocks.path.partition(".")[0]):
        adapter.student.append(f"blocks={blocks.code}")
    else:
        adapter.mine["blocks"] = blocks.blocks
        adapter.student.append("blocks=blocks")
    if grids is None:
        adapter.mine["layout"] = subject.layout or (lambda batch: _alignment(subject, batch).layout)
        adapter.student.append("layout=layout")
    else:
        _layout(adapter, subject, pictures, grids)
    if normalisation is None:
        adapter.mine["views"] = subject.views or (lambda batch: _alignment(subject, batch).views)
        adapter.student.append("views=views")
    else:
        _views(adapter, pictures, normalisation)
    loss = subject.loss or (own._loss if own is not None else None)
    if loss is not None:
        name = getattr(loss, "__name__", "loss")
        name = name if name.isidentifier() and name not in TAKEN else "loss"
        adapter.mine[name] = loss
        adapter.student.append(f"loss={name}")
    return adapter


def _read_width(blocks: Sequence[nn.Module]) -> int | None:
    try:
        return width_of(blocks, None)
    except ConfigError:
        return None


def _views(adapter: Adapter, pictures: Pictures, normalisation: Normalisation) -> None:
    adapter.names.add("Views")
    adapter.torch = adapter.torch or len(pictures.found) > 1
    code = pictures.code
    plain = {
        (0.0, 1.0): "",
        (0.5, 0.5): " * 0.5 + 0.5",
        (0.0, 1 / 255): "" if normalisation.name == "uint8" else " / 255",
    }.get((normalisation.mean[0], normalisation.std[0]))
    if plain is not None:
        adapter.student.append(f"views=lambda batch: Views.create({code}{plain})")
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
    adapter.student.append("views=views")


def views_function(pictures: Pictures, normalisation: Normalisation) -> Any:
    """The proposed batch -> Views, run as it is printed."""
    adapter = Adapter(names={"Views"})
    _views(adapter, pictures, normalisation)
    lines = ["import torch", "from spatial_forcing import Views", *adapter.preamble, *adapter.student]
    namespace: dict[str, Any] = {}
    exec("\n".join(lines), namespace)
    return namespace["views"]


def _layout(adapter: Adapter, subject: Subject, pictures: Pictures, grids: Sequence[Tensor]) -> None:
    placeholder = _placeholder(subject.example(), grids)
    shapes = [tuple(grid.shape) for grid in grids]
    if placeholder is not None:
        path, token = placeholder
        ids, named = access(path), _config_name(subject.bare, token)
        sizes = f"{shapes[0]}" if len(set(shapes)) == 1 else f"[{shapes}] * len({ids})"
        adapter.names.add("layout_from_input_ids")
        adapter.student.append(f"layout=lambda batch: layout_from_input_ids({ids}, {named}, {sizes})")
        return
    count = _count(pictures)
    if (plain := _offset(grids)) is not None:
        start, stride = plain
        adapter.names.add("layout_from_offset")
        step = "" if stride is None else f", stride={stride}"
        adapter.student.append(
            f"layout=lambda batch: layout_from_offset({count}, {len(grids)}, {shapes[0]}, "
            f"start={start}{step})"
        )
        return
    adapter.names.add("TokenLayout")
    adapter.torch = True
    if adapter.preamble:
        adapter.preamble.append("")
    adapter.preamble += [*_index_code(grids), "", "def layout(batch):"]
    adapter.preamble += [
        f"    index = INDEX.expand({count}, *INDEX.shape)",
        "    return TokenLayout(index, index >= 0)",
    ]
    adapter.student.append("layout=layout")


def _count(pictures: Pictures) -> str:
    """Python for the number of samples of `batch`."""
    first = [(image.path, image.value) for image in pictures.found]
    for path, value in [*first, *tensors(pictures.batch)]:
        if value.ndim and len(value) == pictures.samples:
            return f"len({access(path)})"
    return f"len({pictures.code})"


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


def _index_code(grids: Sequence[Tensor]) -> list[str]:
    """Python for INDEX, the (V, h, w) positions: by the steps of each view where they are regular."""
    h, w = (max(grid.shape[d] for grid in grids) for d in (0, 1))
    index = torch.full((len(grids), h, w), -1)
    for view, grid in enumerate(grids):
        index[view, : grid.shape[0], : grid.shape[1]] = grid
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
    found: Alignment = student.alignment(batch)
    return found
