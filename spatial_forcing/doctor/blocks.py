"""Which list of modules is the decoder: the one in whose sequence the images meet the other inputs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spatial_forcing.alignment import Sequencer
from spatial_forcing.doctor.images import ImageTensor, Pictures, Piece, all_inverted, replaced, tensors
from spatial_forcing.doctor.subject import Subject
from spatial_forcing.errors import ConfigError, LayoutError, SpatialForcingError
from spatial_forcing.forcing.tap import entering, first_norm
from spatial_forcing.registry import did_you_mean

FLOOR = 1e-6
"""Changes below this part of the state's norm count as none."""


@dataclass
class Candidate:
    """A list of blocks, and what was seen at its first block's input.

    Attributes:
        path: in the model.
        blocks: in order.
        order: when its first block ran, compared with the others'; None: never.
        shape: of what entered it.
        images: whether changed images changed that.
        mixed: whether changed text or state did, too.
        carries: whether the loss depends on it.
        calls: how often its first block ran.
    """

    path: str
    blocks: list[nn.Module]
    order: int | None = None
    shape: tuple[int, ...] = ()
    images: bool = False
    mixed: bool = False
    carries: bool = False
    calls: int = 0

    @property
    def code(self) -> str:
        """Python that reads the blocks from `model`."""
        return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", f"model.{self.path}".rstrip("."))

    def __str__(self) -> str:
        seen = "never called" if self.order is None else f"{'images' if self.images else 'no images'}"
        if self.order is not None:
            seen += (" and other inputs" if self.mixed else "") + (
                ", reaches the loss" if self.carries else ", no loss"
            )
        return f"{self.path} ({len(self.blocks)} x {type(self.blocks[0]).__name__}: {seen})"


def block_lists(model: nn.Module) -> list[Candidate]:
    """Every list of two or more modules with parameters that does not lie within another one."""
    found: list[Candidate] = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(
            path.startswith(c.path + ".") for c in found
        ):
            continue
        blocks = list(module)
        # Steps of a Sequential differ; blocks are alike.
        alike = isinstance(module, nn.ModuleList) or len({type(b) for b in blocks}) == 1
        if len(blocks) > 1 and alike and all(any(True for _ in b.parameters()) for b in blocks):
            found.append(Candidate(path, blocks))
    return found


def choose(
    subject: Subject, batch: Mapping[str, Any], found: Sequence[ImageTensor], named: str | None
) -> tuple[Candidate, list[Candidate]]:
    """The decoder blocks, and all lists that were looked at.

    Args:
        subject: the model.
        batch: its example.
        found: the batch's images.
        named: path of the blocks, if the user gave it.

    Raises:
        ConfigError: no list of blocks, an unknown path, or blocks that are not called.
        LayoutError: the images do not enter the sequence of the blocks.
    """
    candidates = block_lists(subject.bare)
    if named is not None:
        candidates = [_named(subject.bare, named, candidates)]
    elif subject.student is not None:
        candidates = [_given(subject, candidates)]
    if not candidates:
        raise ConfigError(
            f"{type(subject.bare).__name__} has no list of blocks (nn.ModuleList or nn.Sequential of modules "
            "with parameters); spatial forcing reads the tokens between the blocks of a transformer. Collect "
            "them in one and name it with --blocks PATH."
        )
    if not survey(subject, batch, found, candidates) and named is None:
        keys = ", ".join(image.key for image in found) or "the pixels"
        raise LayoutError(
            f"the model ignores {keys}: with every pixel changed, neither the loss nor what enters its "
            "blocks changes. It may need another entry beside them (image_grid_thw of Qwen, image_sizes of "
            "Mistral), or placeholders of images in input_ids."
        )
    if named is not None or subject.student is not None:
        return _usable(candidates[0]), candidates
    carrying = [c for c in candidates if c.carries and len(c.shape) == 3]
    merging = [c for c in carrying if c.images and c.mixed]
    if merging:
        return min(merging, key=lambda c: c.order or 0), candidates
    deaf = [c for c in carrying if c.mixed and not c.images]
    # Encoders that hold the visual tokens: a vision tower, a backbone.
    seeing = [c for c in candidates if c.carries and c.images and len(c.shape) in (3, 4)]
    listed = "; ".join(map(str, candidates))
    if deaf and not seeing:
        raise LayoutError(
            f"the images do not enter the sequence of the decoder blocks {deaf[0].path}: changed images "
            "leave their input as it is. The decoder may read them by cross-attention, but no encoder was "
            "found whose blocks hold the visual tokens and reach the loss (a connector whose weights are all "
            f"zero looks the same). Name its blocks with --blocks PATH. Seen: {listed}."
        )
    cut = [c for c in candidates if c.images and not c.carries and len(c.shape) == 3]
    if cut and not seeing:
        raise ConfigError(
            f"the loss does not depend on what enters {' or '.join(c.path for c in cut)}: the graph is cut "
            f"on the way (detach, no_grad), or the head reads something else. Seen: {listed}."
        )
    if not seeing:
        raise LayoutError(
            f"no list of blocks has the images at its input and the loss behind it. Seen: {listed}. Name the "
            "blocks with --blocks PATH, or check that the batch's images are used."
        )
    return max(seeing, key=lambda c: sum(p.numel() for b in c.blocks for p in b.parameters())), candidates


def _named(model: nn.Module, path: str, candidates: Sequence[Candidate]) -> Candidate:
    dotted = re.sub(r"\[(\d+)\]", r".\1", path)
    modules = dict(model.named_modules())
    if dotted not in modules:
        dotted = dotted.removeprefix("model.")  # as in the printed code
    if dotted not in modules:
        known = [c.path for c in candidates]
        raise ConfigError(
            f"--blocks {path!r} is not in {type(model).__name__}.{did_you_mean(path, known)} Lists of "
            f"blocks: {', '.join(known) or 'none'}."
        )
    module = modules[dotted]
    blocks = list(module) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
    if not blocks:
        raise ConfigError(
            f"--blocks {path!r} is a {type(module).__name__}; name the nn.ModuleList of the blocks itself: "
            f"{', '.join(c.path for c in candidates) or 'the model has none'}."
        )
    return Candidate(dotted, blocks)


def _given(subject: Subject, candidates: Sequence[Candidate]) -> Candidate:
    """The blocks of a student, with their path in the bare model where they are a list of it."""
    student: Any = subject.student
    blocks = list(student.blocks)
    path = next((c.path for c in candidates if [*map(id, c.blocks)] == [*map(id, blocks)]), "")
    return Candidate(path or "the student's blocks", blocks)


def _usable(candidate: Candidate) -> Candidate:
    if candidate.order is None:
        raise ConfigError(
            f"the blocks {candidate.path} were never called while the loss was computed; name those that run."
        )
    if len(candidate.shape) not in (3, 4):
        raise ConfigError(
            f"what enters the blocks {candidate.path} has shape {candidate.shape}; expected (batch, "
            "sequence, width), or feature maps (batch, width, rows, columns)."
        )
    if not candidate.images:
        raise LayoutError(
            f"the images do not enter the sequence of the blocks {candidate.path}: changed images leave "
            "their input as it is (cross-attention, or an action expert beside the decoder). Name the blocks "
            "whose sequence holds the visual tokens."
        )
    if not candidate.carries:
        raise ConfigError(
            f"the loss does not depend on the blocks {candidate.path}; aligning them cannot help the actions."
        )
    return candidate


def survey(
    subject: Subject, batch: Mapping[str, Any], found: Sequence[ImageTensor], candidates: Sequence[Candidate]
) -> bool:
    """Fill in what is seen at each candidate's first block when images and other inputs change.

    Whether changed images change anything: one of those states, or the loss.
    """
    with _all_trainable(subject.model):
        try:
            before, loss = _inputs(subject, batch, candidates)
        except SpatialForcingError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{type(subject.model).__name__} failed on the batch: {type(error).__name__}: {error}. Train "
                "one step with the subject's model and batch in Python to see the traceback."
            ) from error
        states = [h for h in before.values() if h.requires_grad]
        grads = torch.autograd.grad(loss, states, allow_unused=True) if states and loss.requires_grad else ()
        reached = {
            id(h) for h, g in zip(states, grads, strict=bool(grads)) if g is not None and bool(g.any())
        }
    with torch.no_grad():
        seen, other = _inputs(subject, all_inverted(subject, batch, found), candidates)
        others = disturbed(batch, found)
        try:
            heard, _ = _inputs(subject, others, candidates) if others is not None else ({}, None)
        except Exception:  # the model refuses made-up inputs; then nothing is known about them
            heard = {}
    for order, (i, state) in enumerate(before.items()):
        candidate = candidates[i]
        candidate.order, candidate.shape = order, tuple(state.shape)
        candidate.images = _differs(state, seen.get(i))
        candidate.mixed = _differs(state, heard.get(i))
        candidate.carries = id(state) in reached
    return any(c.images for c in candidates) or bool(other != loss.detach())


def zero_weights(model: nn.Module) -> list[str]:
    """Matrices of the model in which every number is zero: nothing passes them."""
    return [
        name
        for name, p in model.named_parameters()
        if p.ndim > 1 and p.numel() and "lora_" not in name and not bool(p.any())
    ]


def stream_of(
    subject: Subject, batch: Mapping[str, Any], candidate: Candidate, pictures: Pictures
) -> Piece[Sequencer] | None:
    """How the (B, L, D) sequence is made of what enters the blocks; None: the first call is that.

    Views may lie in the batch dimension, sample by sample or view by view; the blocks may run once a view;
    the sequence may come first; a feature map is a sequence of its cells.
    """
    samples, views, shape = pictures.samples, pictures.views, candidate.shape
    if len(shape) == 3 and shape[0] != samples and shape[1] == samples:
        return Piece("lambda calls: calls[0].transpose(0, 1)", lambda calls: calls[0].transpose(0, 1))
    maps = len(shape) == 4
    cells, flat = (".flatten(2).transpose(1, 2)", _cells) if maps else ("", _same)
    if candidate.calls == views > 1 and not candidate.mixed and shape[0] == samples:
        code = (
            f"lambda calls: torch.cat([call{cells} for call in calls], 1)"
            if maps
            else ("lambda calls: torch.cat(calls, 1)")
        )
        return Piece(code, lambda calls: torch.cat([flat(call) for call in calls], 1))
    if shape[0] == samples * views and views > 1:
        with torch.no_grad():
            before, _ = _inputs(subject, batch, [candidate])
            after, _ = _inputs(subject, next(pictures.painted(0, 1)), [candidate])
        row = int((after[0] - before[0]).flatten(1).norm(dim=1).argmax())
        if row == 1 and (samples > 1 or views > 1):
            code = f"lambda calls: calls[0]{cells}.unflatten(0, (-1, {views})).flatten(1, 2)"
            return Piece(code, lambda calls: flat(calls[0]).unflatten(0, (-1, views)).flatten(1, 2))
        code = f"lambda calls: calls[0]{cells}.unflatten(0, ({views}, -1)).transpose(0, 1).flatten(1, 2)"
        return Piece(
            code, lambda calls: flat(calls[0]).unflatten(0, (views, -1)).transpose(0, 1).flatten(1, 2)
        )
    return Piece(f"lambda calls: calls[0]{cells}", lambda calls: flat(calls[0])) if maps else None


def _cells(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)


def _same(sequence: Tensor) -> Tensor:
    return sequence


def _differs(before: Tensor, after: Tensor | None) -> bool:
    if after is None or after.shape != before.shape:
        return after is not None
    return bool((after - before).norm() > FLOOR * before.norm())


def _inputs(
    subject: Subject, batch: Mapping[str, Any], candidates: Sequence[Candidate]
) -> tuple[dict[int, Tensor], Tensor]:
    """What enters each candidate's first block at its first call, in the order of the calls, and the loss."""
    seen: dict[int, Tensor] = {}
    handles = []
    for candidate in candidates:
        candidate.calls = 0
    for i, candidate in enumerate(candidates):

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], i: int = i) -> None:
            value = entering(args, kwargs)
            value = value[0] if isinstance(value, (tuple, list)) and value else value
            if isinstance(value, Tensor):
                seen.setdefault(i, value)
                candidates[i].calls += 1

        handles.append(first_norm(candidate.blocks[0]).register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with seeded():
            loss = subject.run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen, loss


@contextmanager
def seeded() -> Iterator[None]:
    """The same random numbers each time (flow matching draws noise); the streams outside do not move."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)  # torch.manual_seed takes milliseconds, hundreds of times
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(0)
        yield


@contextmanager
def _all_trainable(model: nn.Module) -> Iterator[None]:
    """Every floating parameter requires a gradient, so that the graph shows what depends on what."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def disturbed(batch: Mapping[str, Any], found: Sequence[ImageTensor]) -> dict[str, Any] | None:
    """The batch with other text and state: the two rarest ids of each row swapped, noise on float tensors.

    Placeholders of images are frequent, so they stay. None where there is nothing to change.
    """
    images = {image.path for image in found}
    changed: Any = batch
    generator = torch.Generator().manual_seed(0)
    for path, value in tensors(batch):
        name = str(path[-1]).lower()
        if path in images:
            continue
        if value.is_floating_point() and value.ndim < 4:
            noise = torch.randn(value.shape, generator=generator).to(value)
            changed = replaced(changed, path, value + noise)
        elif value.dtype == torch.long and value.ndim == 2 and re.search(r"ids?$|tokens?$", name):
            changed = replaced(changed, path, torch.stack([_swapped(row) for row in value]))
    return None if changed is batch else changed


def _swapped(row: Tensor) -> Tensor:
    ids, inverse, counts = row.unique(return_inverse=True, return_counts=True)
    if len(ids) < 2:
        return row
    # Of the rarest, high ids are more often words than marks like the beginning of the sequence.
    rarest = (counts == counts.min()).nonzero().flatten()[-2:]
    rarest = rarest if len(rarest) == 2 else counts.argsort(stable=True)[:2]
    places = [int((inverse == i).nonzero()[0]) for i in rarest]
    swapped = row.clone()
    swapped[places] = row[places[::-1]]
    return swapped
