"""Settings of the method. Defaults are those of the released code, except for exact token positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
        schedule: how alpha moves: `constant`, or `linear` or `cosine` down to `floor`.
        warmup: fraction of training over which alpha rises from 0.
        end: fraction of training at which `linear` and `cosine` reach `floor`.
        floor: fraction of alpha that is left then.
        stop_at: fraction of training after which alpha is 0 (HASTE).
        pairs: (student layer, teacher layer) pairs. A student layer k is the
            residual stream after k decoder blocks (0: before the first; -1: after the last). A teacher
            layer counts its blocks from 0, negative from the end. None: ((round(0.75 * depth), -1),), once
            for each teacher.
        teachers: the label of each pair's teacher, where there are several (FRAPPE, arXiv 2602.17259).
            Empty with `pairs` None: every teacher, in its order.
        weights: of each pair's loss; the weighted losses are added. Empty: their mean.
        projectors: `shared`, one for all pairs of a teacher, or `independent`, one for each pair. Independent
            ones start equal, as the shared one would, so that both choices begin with the same loss.
        tap: where the student is read: the residual stream of its `decoder`, or the output of its `vision`
            tower (VEGA, arXiv 2605.10485), which pi0 and OpenVLA-OFT name; then the student layer of a pair
            is -1.
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
    teachers: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    projectors: Literal["shared", "independent"] = "shared"
    tap: Literal["decoder", "vision"] = "decoder"
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
        _one_of("tap", self.tap, ("decoder", "vision"))
        _one_of("loss", self.loss, LOSSES)
        _one_of("projection", self.projection, PROJECTIONS)
        _one_of("registration", self.registration, ("corner", "pixel"))
        _ = self.alpha_schedule
        if self.pairs is not None:
            # JSON and the command line deliver lists.
            object.__setattr__(self, "pairs", tuple((int(k), int(layer)) for k, layer in self.pairs))
        object.__setattr__(self, "teachers", tuple(self.teachers))
        for name in ("weights", "widths"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        self._check_pairs()
        for weight in self.weights:
            _finite_not_negative("weights", weight)

    @property
    def alpha_schedule(self) -> AlphaSchedule:
        """The schedule of alpha, validated."""
        return AlphaSchedule(self.schedule, self.warmup, self.end, self.floor, self.stop_at)

    def layers_of(self, label: str) -> tuple[int, ...]:
        """The layers, as configured, of the teacher with this label."""
        if self.pairs is None:
            return (-1,)
        labels = self.teachers or (label,) * len(self.pairs)
        return tuple(layer for (_, layer), own in zip(self.pairs, labels, strict=True) if own == label)

    def check_count(self, count: int) -> None:
        """Raise `ConfigError` where a setting that has one entry for each of `count` pairs has others."""
        for name in ("teachers", "weights", "widths"):
            given = getattr(self, name)
            if given and len(given) != count:
                raise ConfigError(
                    f"forcing.{name} has {len(given)} entries for {count} pairs; give one each."
                )

    def _check_pairs(self) -> None:
        if self.pairs == ():
            raise ConfigError("forcing.pairs is empty; name at least one pair, or set alpha to 0.")
        if self.pairs is not None or self.teachers:  # else one for each teacher, however many there are
            self.check_count(len(self.teachers if self.pairs is None else self.pairs))
        pairs = self.pairs or ()
        named = [*zip(self.teachers, pairs or self.teachers, strict=True)] if self.teachers else list(pairs)
        if len(set(named)) != len(named):
            raise ConfigError(f"forcing.pairs names a pair twice: {named}; remove one.")
        if self.tap == "vision" and any(k != -1 for k, _ in pairs):
            raise ConfigError(
                f"forcing.tap is vision, and forcing.pairs {self.pairs} count decoder blocks; the tower is "
                "read at its output, so the first number of every pair is -1."
            )
        if self.weights and not sum(self.weights):
            raise ConfigError(
                f"forcing.weights is {self.weights}, which aligns nothing; set forcing.alpha to 0 for that."
            )
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
        if self.gate and self.weights:
            raise ConfigError(
                "forcing.gate leaves one loss, which forcing.weights cannot weigh; clear one of them."
            )
        if self.gate and (len({layer for _, layer in pairs}) > 1 or len(set(self.teachers)) > 1):
            raise ConfigError(
                f"forcing.gate mixes student layers for one target, but forcing.pairs {self.pairs} name "
                "several teacher layers; give every pair the same one."
            )
        if any(not 0 < w <= 1 for w in self.widths):
            raise ConfigError(f"forcing.widths is {self.widths}; expected fractions in (0, 1].")


def _finite_not_negative(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"forcing.{name} is {value}; expected a finite number >= 0.")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"forcing.{name} is {value!r}; choose one of {', '.join(known)}.")


@dataclass(frozen=True)
class Pair:
    """One alignment, resolved.

    Attributes:
        blocks: student blocks before the tap, 0 to all of them.
        layer: index of the teacher's block.
        label: of the teacher; empty where there is one alone.
    """

    blocks: int
    layer: int
    label: str = ""


def pair_labels(config: ForcingConfig, labels: tuple[str, ...]) -> tuple[str, ...]:
    """The label of each pair's teacher, of the teachers `labels`; see `resolve_pairs`.

    Raises:
        ConfigError: a label that no teacher has, a teacher that no pair names, or several teachers and pairs
            that do not say whose they are.
    """
    several = len(labels) > 1
    if several and config.pairs is not None and not config.teachers:
        raise ConfigError(
            f"there are the teachers {', '.join(labels)}; say in forcing.teachers which of them each of the "
            f"{len(config.pairs)} forcing.pairs means."
        )
    named = config.teachers or labels * (1 if config.pairs is None else len(config.pairs))
    if unknown := sorted(set(named) - set(labels)):
        there = ", ".join(labels) if labels != ("",) else "one without a label"
        raise ConfigError(f"forcing.teachers names {', '.join(unknown)}; the teachers are {there}.")
    if idle := [label for label in labels if label not in named]:
        raise ConfigError(f"forcing.teachers {named} leaves out {', '.join(idle)}; name it, or drop it.")
    if config.gate and several:
        raise ConfigError("forcing.gate mixes student layers for one teacher; there are several. Clear it.")
    config.check_count(len(named))
    return named


def resolve_pairs(config: ForcingConfig, student_depth: int, depths: Mapping[str, int]) -> tuple[Pair, ...]:
    """The configured pairs with indices >= 0.

    The only place where "after k blocks" and negative indices are interpreted. A student of n blocks has
    n + 1 residual states, 0..n; a teacher of m blocks has m outputs, 0..m-1.

    Args:
        config: the method's settings.
        student_depth: n.
        depths: m by the label of every teacher; one alone has the label "".

    Raises:
        ConfigError: an index out of range (the message gives the range), a label that no teacher has, or a
            teacher that no pair names.
    """
    named = pair_labels(config, tuple(depths))
    chosen = config.pairs or ((max(1, round(0.75 * student_depth)), -1),) * len(named)
    return tuple(
        Pair(
            _resolve(k, student_depth + 1, f"student layer {k}", f"{student_depth} blocks"),
            _resolve(
                layer,
                depths[label],
                f"layer {layer} of teacher {label}" if label else f"teacher layer {layer}",
                f"{depths[label]} layers",
            ),
            label,
        )
        for (k, layer), label in zip(chosen, named, strict=True)
    )


def _resolve(index: int, count: int, what: str, size: str) -> int:
    if not -count <= index < count:
        raise ConfigError(
            f"forcing.pairs: {what} does not exist in a model of {size}; choose {-count}..{count - 1}."
        )
    return index % count
