"""Settings of the method. Defaults are those of the released code, except for exact token positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from spatial_forcing.errors import ConfigError
from spatial_forcing.forcing.extras.losses import LOSSES, Loss
from spatial_forcing.forcing.extras.projections import PROJECTIONS, Projection
from spatial_forcing.forcing.schedule import AlphaSchedule, Kind

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ForcingConfig:
    """Everything that defines the alignment loss (arXiv 2510.12276, section 3).

    Attributes:
        alpha: weight of the alignment loss, >= 0. 0 switches the package off entirely.
        schedule, warmup, end, floor, stop_at: see `AlphaSchedule`; fractions of training.
        pairs: (student layer, teacher layer) pairs. A student layer k is the
            residual stream after k decoder blocks (0: before the first; -1: after the last). A teacher
            layer counts its blocks from 0, negative from the end. None: ((round(0.75 * depth), -1),).
        projectors: `shared`, one for all pairs, or `independent`, one for each pair. Independent ones start
            equal, as the shared one would, so that both choices begin with the same loss.
        loss: distance of projected tokens and targets: `cosine`, the paper's, or one of `extras.losses`.
        projection: `mlp`, the paper's trained projector, `frozen`: the same with its initial weights, or
            `conv`: one convolution, and targets normalised in each view (`extras.projections`).
        norm: norm in front of the projector. `layer` as released, `batch` as in the paper's text.
        pe_scale: scale of the sin-cos positional embedding added to the target; 0 leaves it out.
        token_shift: added to every token position; 1 is the slice of the released recipe, one token late.
        registration: where token i of n samples the teacher: `corner` -1 + 2i/(n-1) as published,
            `pixel` (2i+1)/n - 1.
        subtract_cell_mean: subtract from each cell of the teacher's grid its running mean over the frames;
            for fixed cameras, where most of a feature is the same in every frame (see `CellMean`).
        standardise: subtract the running mean of each teacher channel and divide by its deviation.
        gate: mix the tapped layers with learned softmax weights before the projector (the paper's
            appendix calls it adaptive); all pairs must then name one teacher layer.
        widths: Matryoshka widths, one fraction in (0, 1] for each pair: how much of its
            projector's hidden layer the pair uses. Empty: all of it.

    Raises:
        ConfigError: a value out of range, or settings that contradict each other.
    """

    alpha: float = 0.5
    schedule: Kind = "constant"
    warmup: float = 0.0
    end: float = 1.0
    floor: float = 0.0
    stop_at: float = 1.0
    pairs: Pairs | None = None
    projectors: Literal["shared", "independent"] = "shared"
    loss: Loss = "cosine"
    projection: Projection = "mlp"
    norm: Literal["layer", "batch", "none"] = "layer"
    pe_scale: float = 0.1
    token_shift: int = 0
    registration: Literal["corner", "pixel"] = "corner"
    subtract_cell_mean: bool = False
    standardise: bool = False
    gate: bool = False
    widths: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _finite_not_negative("alpha", self.alpha)
        _finite_not_negative("pe_scale", self.pe_scale)
        _one_of("projectors", self.projectors, ("shared", "independent"))
        _one_of("norm", self.norm, ("layer", "batch", "none"))
        _one_of("loss", self.loss, LOSSES)
        _one_of("projection", self.projection, PROJECTIONS)
        _one_of("registration", self.registration, ("corner", "pixel"))
        _ = self.alpha_schedule
        if self.pairs is not None:
            # JSON and the command line deliver lists.
            object.__setattr__(self, "pairs", tuple((int(k), int(layer)) for k, layer in self.pairs))
        object.__setattr__(self, "widths", tuple(float(w) for w in self.widths))
        self._check_pairs(1 if self.pairs is None else len(self.pairs))

    @property
    def alpha_schedule(self) -> AlphaSchedule:
        """The schedule of alpha, validated."""
        return AlphaSchedule(self.schedule, self.warmup, self.end, self.floor, self.stop_at)

    def _check_pairs(self, count: int) -> None:
        if count == 0:
            raise ConfigError("forcing.pairs is empty; name at least one pair, or set alpha to 0.")
        if self.pairs is not None and len(set(self.pairs)) != count:
            raise ConfigError(f"forcing.pairs names a pair twice: {self.pairs}; remove one.")
        if self.projection == "conv" and (self.gate or self.widths):
            raise ConfigError(
                "forcing.projection 'conv' has no hidden layer for forcing.gate or forcing.widths; clear "
                "them."
            )
        if self.gate and self.widths:
            raise ConfigError("forcing.gate and forcing.widths exclude each other; clear one of them.")
        if self.gate and self.projectors == "independent":
            raise ConfigError(
                "forcing.gate mixes the layers before one projector, so there are no independent ones; set "
                "forcing.projectors to shared, or clear forcing.gate."
            )
        if self.gate and self.pairs is not None and len({layer for _, layer in self.pairs}) != 1:
            raise ConfigError(
                f"forcing.gate mixes student layers for one target, but forcing.pairs {self.pairs} name "
                "several teacher layers; give every pair the same one."
            )
        if self.widths and len(self.widths) != count:
            raise ConfigError(
                f"forcing.widths has {len(self.widths)} entries for {count} pairs; give one each."
            )
        if any(not 0 < w <= 1 for w in self.widths):
            raise ConfigError(f"forcing.widths is {self.widths}; expected fractions in (0, 1].")


def _finite_not_negative(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"forcing.{name} is {value}; expected a finite number >= 0.")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"forcing.{name} is {value!r}; choose one of {', '.join(known)}.")


def resolve_pairs(pairs: Pairs | None, student_depth: int, teacher_depth: int) -> Pairs:
    """Turn configured pairs into (blocks before the tap, index of the teacher's block), both >= 0.

    The only place where "after k blocks" and negative indices are interpreted. A student of n blocks has
    n + 1 residual states, 0..n; a teacher of m blocks has m outputs, 0..m-1.

    Raises:
        ConfigError: an index out of range; the message gives the range.
    """
    chosen = ((max(1, round(0.75 * student_depth)), -1),) if pairs is None else pairs
    return tuple(
        (
            _resolve(k, student_depth + 1, f"student layer {k}", f"{student_depth} blocks"),
            _resolve(layer, teacher_depth, f"teacher layer {layer}", f"{teacher_depth} layers"),
        )
        for k, layer in chosen
    )


def _resolve(index: int, count: int, what: str, size: str) -> int:
    if not -count <= index < count:
        raise ConfigError(
            f"forcing.pairs: {what} does not exist in a model of {size}; choose {-count}..{count - 1}."
        )
    return index % count
