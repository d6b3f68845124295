"""SpatialForcing: student in, (loss, metrics) out.

    sf = SpatialForcing(student, teacher)      # attach
    loss, metrics = sf(batch)                  # L = L_action + alpha * L_align
    policy = sf.export()                       # the bare student; nothing of this package is left in it

It is the one module that DDP or FSDP (see `sharding`) wraps, so that both losses pass its gradient
synchronisation. The teacher is reached by a reference outside the module tree.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from spatial_forcing.alignment import Alignment, TokenLayout
from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.forcing.adapter import Alignable, ModuleStudent
from spatial_forcing.forcing.config import ForcingConfig, Pair, resolve_pairs
from spatial_forcing.forcing.distributed import SampleWeights, gather, shard_like
from spatial_forcing.forcing.extras.cell_mean import CellMean
from spatial_forcing.forcing.extras.gate import GatedProjector
from spatial_forcing.forcing.extras.losses import distance_loss
from spatial_forcing.forcing.extras.projections import ConvProjector
from spatial_forcing.forcing.extras.standardise import Standardiser
from spatial_forcing.forcing.extras.tower import on_tower, views_in_sequence, vision_tower_of
from spatial_forcing.forcing.extras.widths import narrowed
from spatial_forcing.forcing.layout import check_layout, gather_tokens, shifted
from spatial_forcing.forcing.loss import alignment_loss, sample_cosines
from spatial_forcing.forcing.projector import Projector
from spatial_forcing.forcing.source import Source, by_label, of_label
from spatial_forcing.forcing.tap import Site, Tap, check_trainable, in_sequence, width_of
from spatial_forcing.forcing.target import make_targets, token_validity
from spatial_forcing.protocols import Batch, Metrics, Teacher

logger = logging.getLogger(__name__)

Project = Callable[[Tensor, Tensor], Tensor]
"""(student tokens (B, N, D), valid (B, N)) -> teacher channels (B, N, C)."""
AnyProjector = Projector | ConvProjector


class SpatialForcing(nn.Module):
    """A student whose intermediate visual tokens are pulled towards a frozen teacher's (arXiv 2510.12276).

    Args:
        student: an `nn.Module` that is a `Student` (or `Alignable`; see `as_student`).
        teacher: a `Teacher`, or several by label ("geometry", "semantics"), each with a projector of its own
            (see `ForcingConfig.teachers`); may be None where alpha is 0.
        config: the method's settings. With alpha 0 there is no projector, no tap and no teacher call, and
            training is bit-identical to training the student alone.
        student_dim: width of the student's residual stream; default: read from its norms.

    Attributes:
        student: the policy; parameters are saved under `student.`.
        projector: maps student tokens to teacher channels; by label where there are several teachers; a list
            with one for each pair where they are independent; None where alpha is 0.
        cell_mean, standardiser: running means (and scales) of the teacher's features (by label where there
            are several), or None where the configuration does not ask for them. Saved with the projector.
        pairs: what is aligned, resolved to indices >= 0.

    Raises:
        ConfigError: no teacher although alpha > 0, a layer that does not exist, an unknown width, a label
            that is no name.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | Mapping[str, Teacher] | None,
        config: ForcingConfig | None = None,
        *,
        student_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config if config is not None else ForcingConfig()
        self.student = student
        self.projector: AnyProjector | nn.ModuleList | nn.ModuleDict | None = None
        self.cell_mean: CellMean | nn.ModuleDict | None = None
        self.standardiser: Standardiser | nn.ModuleDict | None = None
        self.pairs: tuple[Pair, ...] = ()
        self._schedule = self.config.alpha_schedule
        self._progress: float | None = None
        self._weights = SampleWeights()
        self._announced: list[_Prepared] = []
        self._trainable_checked = False
        self._versions: tuple[int, int] | None = None
        self._projector_trains = False
        self._sources: tuple[Source, ...] = ()
        if self.active:
            self._attach(teacher, student_dim)

    def _attach(self, teacher: Teacher | Mapping[str, Teacher] | None, student_dim: int | None) -> None:
        if not teacher:
            raise ConfigError(
                f"alpha is {self.config.alpha}, but there is no teacher; pass one (load_teacher) or set "
                "alpha to 0."
            )
        if not isinstance(self.student, Alignable):
            raise ConfigError(
                f"{type(self.student).__name__} does not say what is aligned: it needs `blocks`, "
                "`final_norm` and `alignment(batch)`. Wrap the model with `as_student`."
            )
        config, site = self.config, self._site(student_dim)
        teachers = teacher if isinstance(teacher, Mapping) else {"": teacher}
        depths = {label: each.depth for label, each in teachers.items()}
        self.pairs = resolve_pairs(config, len(site.blocks), depths)
        self._sources = tuple(
            Source.of(label, each, [pair.layer for pair in self.pairs if pair.label == label])
            for label, each in teachers.items()
        )
        self._tap = Tap(site.blocks, [pair.blocks for pair in self.pairs], site.final_norm)
        self.projector = self._new_projector(
            site.width, {source.label: source.dim for source in self._sources}
        )
        for source in self._sources:
            source.check(means=config.subtract_cell_mean, standardise=config.standardise)
        if config.subtract_cell_mean:
            self.cell_mean = by_label({s.label: CellMean(len(s.layers)) for s in self._sources})
        if config.standardise:
            self.standardiser = by_label({s.label: Standardiser(len(s.layers), s.dim) for s in self._sources})
        device = next((p.device for p in self.student.parameters()), torch.device("cpu"))
        for own in (self.projector, self.cell_mean, self.standardiser):
            if own is not None:
                own.to(device)

    def _site(self, student_dim: int | None) -> Site:
        if self.config.tap == "vision":
            tower = vision_tower_of(self.student)
            return Site((tower.module,), None, tower.dim)
        blocks, final_norm = self.blocks, self._alignable.final_norm
        return Site(tuple(blocks), final_norm, student_dim or width_of(blocks, final_norm))

    def _new_projector(
        self, width: int, channels: Mapping[str, int]
    ) -> AnyProjector | nn.ModuleList | nn.ModuleDict:
        """As configured; the pairs of a teacher share one, unless each is to have its own."""
        config = self.config

        def one(label: str) -> AnyProjector:
            if config.projection == "conv":
                return ConvProjector(width, channels[label])
            if config.gate:
                return GatedProjector(width, channels[label], config.norm, len(self._tap.depths))
            return Projector(width, channels[label], config.norm)

        made: AnyProjector | nn.ModuleList | nn.ModuleDict
        if config.projectors == "independent":
            made = nn.ModuleList(one(pair.label) for pair in self.pairs)
            if len(self.pairs) > len(channels):
                logger.warning(
                    "forcing.projectors is independent for %d layers; ROCKET reports 80.0 with a projector "
                    "each against 98.2 with a shared one.",
                    len(self.pairs),
                )
        else:
            made = by_label({label: one(label) for label in channels})
        return made.requires_grad_(config.projection != "frozen")

    # ---- what the training loop uses

    @property
    def policy(self) -> nn.Module:
        """The bare student (the wrapped model itself after `as_student`); see `export`."""
        return self.student.model if isinstance(self.student, ModuleStudent) else self.student

    @property
    def blocks(self) -> list[nn.Module]:
        """The student's decoder blocks, in order."""
        return list(self._alignable.blocks)

    @property
    def active(self) -> bool:
        """Whether this run aligns at all (alpha is not 0 throughout)."""
        return self.config.alpha > 0

    @property
    def alpha(self) -> float:
        """The present weight of the alignment loss.

        Raises:
            ConfigError: the schedule moves, but `set_progress` was never called.
        """
        if self._progress is None and self._schedule.needs_progress and self.active:
            raise ConfigError(
                f"alpha follows the schedule {self._schedule}, but its progress is unknown; call "
                "set_progress(step, total_steps) before every step."
            )
        return self.config.alpha * self._schedule.factor(self._progress or 0.0)

    def set_progress(self, step: int, total_steps: int) -> None:
        """Tell the schedule where training is; `step` counts optimizer steps from 0."""
        if total_steps < 1 or step < 0:
            raise ConfigError(
                f"set_progress({step}, {total_steps}): expected step >= 0 and total_steps >= 1."
            )
        self._progress = min(step / total_steps, 1.0)

    def begin_accumulation(self, batches: Sequence[Batch], divisor: int | None = None) -> None:
        """Announce the micro-batches of one optimizer step, so that their losses add up to one mean.

        The denominator of the alignment loss (samples with any valid token) is then summed over these
        batches and all ranks; without it every forward is normalised over the ranks alone. Every rank must
        call this with as many batches. The alignment made of a batch here is used by its forward; a batch
        that was not announced gets its own.

        Args:
            batches: this rank's micro-batches, on the device, in the order they will be passed.
            divisor: what the loop divides each loss by; default the number of batches (as Accelerate does
                when the window is full).
        """
        if not self.active:
            return
        self._announced = [self._prepare(batch) for batch in batches]
        counts = torch.stack([each.samples.sum() for each in self._announced]).sum()
        self._weights.begin(counts, len(batches), divisor or len(batches))

    @torch.compiler.disable(recursive=False)
    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The training loss of `batch` and its metrics.

        Metrics beyond the student's own: `action_loss`, `alpha` and, where the alignment is active,
        `align_loss`, `cosine` (and one for each pair), `samples_without_tokens`. With several ranks or
        micro-batches, `align_loss` and `cosine` are weighted so that their mean is the global value.

        Raises:
            ConfigError, LayoutError: see `Tap`, `check_trainable`, `check_layout`.
        """
        alpha = self.alpha
        if alpha == 0:
            loss, metrics = self.student(batch)
            shared = {"action_loss": loss.detach(), "alpha": loss.new_tensor(0.0, requires_grad=False)}
            return self._touch_projector(loss), {**metrics, **shared}
        loss, align_loss, metrics = self.losses(batch)
        return loss + alpha * align_loss, {**metrics, "alpha": loss.detach().new_tensor(alpha)}

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor, Metrics]:
        """The action loss, the alignment loss without its weight alpha, and the metrics of both.

        Raises:
            ConfigError: the alignment is off (alpha is 0 throughout).
        """
        if not self.active:
            raise ConfigError("there is no alignment loss: alpha is 0 throughout this run.")
        ready = self._announced.pop(0) if self._announced and self.training else None
        if ready is None or not _same(ready.batch, batch):
            ready = self._prepare(batch)
        with self._tap.armed() as states:
            loss, metrics = self.student(batch, ready.alignment)
        align_loss, own = self._align(states, ready)
        return loss, align_loss, {**metrics, "action_loss": loss.detach(), **own}

    def aligned_tokens(self, batch: Batch) -> Tensor:
        """Which of the batch's tokens have a target, (B, V, h, w) bool."""
        return self._prepare(batch).valid

    # ---- what is kept, and what is handed on

    def export(self) -> nn.Module:
        """Remove the taps and return `policy`, on which no trace of the alignment is left.

        Training may go on afterwards (the taps come back), unless the student is compiled.
        """
        if self.active:
            self._tap.detach()
        return self.policy

    def projector_state_dict(self) -> dict[str, Tensor]:
        """Everything trained or counted that is not the student (projector, gate, moments); may be empty.

        Shards of `distributed.shard` are gathered: every process must call this then.
        """
        return {k: gather(v) for k, v in self.state_dict().items() if not k.startswith("student.")}

    def load_projector_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `projector_state_dict`.

        Raises:
            CheckpointError: missing, unexpected or misshapen entries; the message lists them.
        """
        # What earlier versions called `centre`.
        state = {re.sub(r"^centre\.", "cell_mean.", name): value for name, value in state.items()}
        own = self.projector_state_dict()
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        misshapen = [
            k for k in own.keys() & state.keys() if own[k].numel() and own[k].shape != state[k].shape
        ]
        if missing or unexpected or misshapen:
            raise CheckpointError(
                f"the projector's state does not fit: missing {missing}, unexpected {unexpected}, other "
                f"shape {misshapen}; resume with the configuration and teacher it was trained with."
            )
        held = self.state_dict()
        self.load_state_dict({k: shard_like(v, held[k]) for k, v in state.items()}, strict=False)

    # ---- inside

    @property
    def _alignable(self) -> Alignable:
        return cast(Alignable, self.student)

    @torch.compiler.disable
    def _prepare(self, batch: Batch) -> _Prepared:
        """Ask the student once what the batch holds, check it, and find the tokens that have a target."""
        alignment = self._alignable.alignment(batch)
        views = alignment.views
        layout = shifted(alignment.layout, self.config.token_shift)
        B, V = views.present.shape
        check_layout(layout, batch_size=B, views=V)
        layout = TokenLayout(layout.index.to(views.device), layout.valid.to(views.device))
        if self.config.tap == "vision":
            layout = on_tower(layout)
        valid = token_validity(layout, views, self.config.registration)
        return _Prepared(batch, alignment, layout, valid)

    @torch.compiler.disable
    def _align(self, states: Mapping[int, Sequence[Tensor]], ready: _Prepared) -> tuple[Tensor, Metrics]:
        """The alignment loss from captured states; scaled for ranks and micro-batches, not by alpha."""
        if self.training and not self._projector_trains:
            self._check_projector_trains()
        samples = ready.samples
        count = int(samples.sum())
        # Ranks may evaluate different numbers of batches: they never wait for each other there.
        device = next(iter(states.values()))[0].device
        weight = self._weights.next(count, device) if self.training else 1 / max(count, 1)
        hidden = {k: self._tokens(k, calls, ready) for k, calls in states.items()}
        targets = self._targets(ready)
        mask = ready.valid.flatten(1)
        losses, metrics = [], {}
        for name, project, state, pair in self._compared(hidden, ready.valid):
            on_device = mask.to(state.device)
            projected = project(state, on_device)
            target, partial = targets[pair.label, pair.layer]
            target = target.flatten(1, 3).to(state.device)
            aimed = on_device & (target != 0).any(-1) if partial else on_device
            losses.append(self._distance(projected, target, aimed, weight, ready.valid.shape[1]))
            cosines = sample_cosines(projected.detach(), target, aimed)
            metrics[f"cosine/{name}"] = cosines.sum() * weight
        together = torch.stack([loss.to(losses[0].device) for loss in losses])
        weights = self.config.weights
        align_loss = (together * together.new_tensor(weights)).sum() if weights else together.mean()
        metrics["cosine"] = torch.stack(list(metrics.values())).mean()
        metrics["align_loss"] = align_loss.detach()
        metrics["samples_without_tokens"] = (~samples).sum().float()
        return align_loss, metrics

    def _check_projector_trains(self) -> None:
        """Warn once where the student has been updated and the projector has not: no optimizer holds it."""
        own = [] if self.projector is None else [p for p in self.projector.parameters() if p.requires_grad]
        if not own or not torch.is_grad_enabled():
            return
        others = (p for p in self.student.parameters() if p.requires_grad)
        now = (sum(p._version for p in others), sum(p._version for p in own))
        before = self._versions = self._versions or now
        if now[0] == before[0]:
            return
        self._projector_trains = True  # or it was said
        if now[1] == before[1]:
            logger.warning(
                "the student was updated and the projector was not: the optimizer does not hold it, and the "
                "alignment learns through random weights. Build it with forcing.parameters()."
            )

    def _distance(
        self, projected: Tensor, target: Tensor, valid: Tensor, weight: float, views: int
    ) -> Tensor:
        if self.config.loss == "cosine":
            return alignment_loss(projected, target, valid, weight)
        return distance_loss(self.config.loss, projected, target, valid, weight, views=views)

    def _compared(
        self, hidden: Mapping[int, Tensor], grid: Tensor
    ) -> Iterator[tuple[str, Project, Tensor, Pair]]:
        """What is compared: name, projector, states (B, N, D), and with what.

        `grid` says which tokens have a target, (B, V, h, w) bool.
        """
        pair = self.pairs[0]
        gated = of_label(self.projector, pair.label)
        if isinstance(gated, GatedProjector):  # the only one, and of the only teacher
            name = f"{pair.label or 'teacher'}{pair.layer}"
            yield name, gated, gated.mix(list(hidden.values())), pair
            return
        for i, pair in enumerate(self.pairs):
            own = self.projector[i] if isinstance(self.projector, nn.ModuleList) else self.projector
            own = of_label(own, pair.label)
            project: Project
            if isinstance(own, ConvProjector):
                project = own.on(grid)
            else:
                projector = cast(Projector, own)
                project = narrowed(projector, self.config.widths[i]) if self.config.widths else projector
            place = "vision" if self.config.tap == "vision" else f"block{pair.blocks}"
            name = f"{place}_{pair.label or 'teacher'}{pair.layer}"
            yield name, project, hidden[pair.blocks], pair

    def _tokens(self, k: int, calls: Sequence[Tensor], ready: _Prepared) -> Tensor:
        vision = self.config.tap == "vision"
        sequence = views_in_sequence(ready.valid.shape[1]) if vision else ready.alignment.sequence
        state = in_sequence(calls, sequence, k)
        if torch.is_grad_enabled() and not self._trainable_checked:
            check_trainable(state, k, self._tap.blocks)
            self._trainable_checked = k == self._tap.depths[-1]
        return gather_tokens(state, ready.layout)

    @torch.no_grad()
    def _targets(self, ready: _Prepared) -> dict[tuple[str, int], tuple[Tensor, bool]]:
        """By label and layer, the target (B, V, h, w, C) and whether zeros in it say nothing."""
        views, valid = ready.alignment.views, ready.valid
        found: dict[tuple[str, int], tuple[Tensor, bool]] = {}
        for source in self._sources:
            teacher = source.teacher.on(views.device)
            # The means of places are summed over ranks, so a rank without a token must take part in it.
            if bool(valid.any()) or self.cell_mean is not None:
                features = teacher.features(views, source.layers)
            else:
                nothing = torch.zeros(*valid.shape[:2], 1, 1, teacher.dim, device=views.device)
                features = (nothing,) * len(source.layers)
            made = make_targets(
                features,
                views,
                ready.layout,
                valid=valid,
                registration=self.config.registration,
                pe_scale=self.config.pe_scale,
                cell_mean=cast("CellMean | None", of_label(self.cell_mean, source.label)),
                standardiser=cast("Standardiser | None", of_label(self.standardiser, source.label)),
                partial=source.partial,
                normalised=self.config.projection == "conv",
            )
            for layer, target in zip(source.layers, made, strict=True):
                found[source.label, layer] = (target, source.partial)
        return found

    def _touch_projector(self, loss: Tensor) -> Tensor:
        """Keep the projector in the graph while alpha is 0: DDP waits for every parameter's gradient."""
        parameters: Iterable[nn.Parameter] = () if self.projector is None else self.projector.parameters()
        for parameter in parameters:
            loss = loss + 0 * parameter.sum()
        return loss


@dataclass(frozen=True)
class _Prepared:
    """A batch made ready for the alignment.

    Attributes:
        batch: what the rest was made of.
        alignment: what the student says of it.
        layout: its layout, shifted, on the views' device.
        valid: (B, V, h, w) bool, which tokens have a target.
    """

    batch: Batch
    alignment: Alignment
    layout: TokenLayout
    valid: Tensor

    @property
    def samples(self) -> Tensor:
        """(B,) bool: which samples have a token with a target."""
        return self.valid.flatten(1).any(1)


def _same(one: Batch, other: Batch) -> bool:
    """Whether two batches hold the same tensors; DDP and FSDP pass a new mapping of them."""
    if one is other:
        return True
    tensors = [key for key, value in other.items() if isinstance(value, Tensor)]
    return bool(tensors) and all(one.get(key) is other[key] for key in tensors)
