"""The six checks in order; each uses the results of the one before it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from spatial_forcing.alignment import Alignment, Sequencer
from spatial_forcing.doctor.blocks import Candidate, choose, stream_of, zero_weights
from spatial_forcing.doctor.cost import measure
from spatial_forcing.doctor.gradient import StandIn, follow, frozen_parts, see_tap
from spatial_forcing.doctor.grid import Probe, find_grid, views_positions
from spatial_forcing.doctor.images import (
    ImageTensor,
    Normalisation,
    Pictures,
    Piece,
    all_inverted,
    count_samples,
    find_images,
    normalisation_of,
)
from spatial_forcing.doctor.proposal import Adapter, propose, views_function
from spatial_forcing.doctor.report import Check, Report
from spatial_forcing.doctor.subject import Subject
from spatial_forcing.doctor.verify import claims, compare_views, explain, paint_patches
from spatial_forcing.errors import ConfigError, LayoutError, SpatialForcingError
from spatial_forcing.forcing.config import ForcingConfig, resolve_pairs
from spatial_forcing.forcing.layout import Grid
from spatial_forcing.forcing.module import SpatialForcing
from spatial_forcing.students.base import evaluating

COST = "cost"
STEPS = ("images", "decoder blocks", "token grid", "tap", "gradient path", COST)


@dataclass(frozen=True)
class DoctorOptions:
    """What the user says about the model.

    Attributes:
        blocks: path of the decoder blocks in the model, e.g. model.language_model.layers; none: found.
        layer: blocks before the tap; negative from the end; none: three quarters of the depth.
        image_key: tensors of the batch that hold the views, in order, a.b for batch["a"]["b"]; none: found.
        grid: rows and columns of a view's tokens; none: found.
        teacher_dim: channels of the teacher, for the cost; 2048 is VGGT-1B.
    """

    blocks: str | None = None
    layer: int | None = None
    image_key: tuple[str, ...] = ()
    grid: tuple[int, int] | None = None
    teacher_dim: int = 2048


def examine(subject: Subject, options: DoctorOptions | None = None, target: str = "") -> Report:
    """Inspect a subject; failures are in the report, not raised."""
    return _Examination(subject, options or DoctorOptions(), target).run()


class _Examination:
    """The state that the checks share."""

    found: list[ImageTensor]
    normalisation: Normalisation | None
    blocks: Candidate
    probe: Probe
    pictures: Pictures
    grids: list[Tensor] | None
    stream: Piece[Sequencer] | None
    adapter: Adapter
    forcing: SpatialForcing
    layer: int

    def __init__(self, subject: Subject, options: DoctorOptions, target: str) -> None:
        if options.teacher_dim < 1 or (options.grid is not None and min(options.grid) < 1):
            raise ConfigError(
                f"--teacher-dim is {options.teacher_dim} and --grid {options.grid}; expected numbers >= 1."
            )
        self.subject, self.options = subject, options
        if options.blocks is None and subject.blocks is not None:
            self.options = replace(options, blocks=subject.blocks)
        self.report = Report(target, [Check(name, needed=name != COST) for name in STEPS])
        self.claimed_layout = subject.layout is not None or subject.student is not None
        self.claimed_views = subject.views is not None or subject.student is not None

    def run(self) -> Report:
        """All steps in eval mode; the model is then as it was."""
        with evaluating(self.subject.model):
            try:
                self._steps()
            finally:
                if hasattr(self, "forcing"):
                    self.forcing.export()
        self.report.verified = self.report.ok
        return self.report

    def _steps(self) -> None:
        steps = (self.images, self.decoder, self.tokens, self.tap, self.gradient, self.cost)
        broken = False
        for check, step in zip(self.report.checks, steps, strict=True):
            try:
                step(check)
            except _Wrong as wrong:  # the claim is wrong, but what was found instead can be inspected further
                check.state, check.remedy = "FAIL", str(wrong)
            except SpatialForcingError as error:
                check.state, check.remedy, broken = "FAIL", str(error), True
                if isinstance(error, LayoutError) and (zero := zero_weights(self.subject.bare)):
                    check.remedy += f" Weights that are all zero: {', '.join(zero)}; load or draw them first."
            except Exception as error:  # what was found before must not be lost
                what = f"{type(error).__name__}: {error}"
                if check.needed:
                    check.state, broken = "FAIL", True
                    check.remedy = f"{what}. Call spatial_forcing.doctor.examine in Python for the traceback."
                else:
                    check.remedy = f"could not be measured: {what}"
            else:
                check.state = "pass"
            if broken:
                break

    def images(self, check: Check) -> None:
        """1: the tensors that hold the images, and the way back to [0, 1]."""
        self.batch = self.subject.example()
        functional = self.subject.pixels is not None and callable(self.subject.batch)
        self.found = [] if functional else find_images(self.batch, self.options.image_key)
        for image in self.found:
            low, high = (float(v) for v in image.value.float().aminmax())
            check.lines.append(
                f"{image.key} {tuple(image.value.shape)} {image.value.dtype}, [{low:.3g}, {high:.3g}]"
            )
        if self.claimed_views:
            self.normalisation = None
            check.lines.append("views: as given")
            return
        if functional:
            raise ConfigError(
                "the batch is made by a function, so the doctor cannot know how the training batch keeps its "
                "images; give Subject(..., views=lambda batch: Views.create(...)), too."
            )
        self.normalisation, sure = normalisation_of(self.found)
        check.lines.append(
            f"stored as {self.normalisation.name}" + ("" if sure else " (by the range; check your processor)")
        )

    def decoder(self, check: Check) -> None:
        """2: the blocks in whose sequence the images meet the other inputs."""
        self.blocks, seen = choose(self.subject, self.batch, self.found, self.options.blocks)
        check.lines.append(f"chosen: {self.blocks}")
        check.lines += [f"also seen: {other}" for other in seen if other is not self.blocks]
        self.report.facts |= {"blocks": self.blocks.path, "depth": len(self.blocks.blocks)}
        given = self.options.layer
        method = ForcingConfig(pairs=None if given is None else ((given, -1),))
        self.layer = resolve_pairs(method, len(self.blocks.blocks), {"": 1})[0].blocks

    def tokens(self, check: Check) -> None:
        """3: the positions of each view's tokens, found by painting, and the claim or proposal verified."""
        self._read_stream(check)
        if self.stream is not None:
            check.lines.append(f"the sequence is made by {self.stream.code}")
        try:
            self.grids = self._discover(check, self.options.grid)
        except LayoutError as error:
            if not self.claimed_layout:
                raise
            self.grids = None
            check.lines.append(f"not found without the claim: {str(error).partition(' (')[0]}")
        wrong = self._verify_claim(check) if self.claimed_layout else None
        self._propose()
        if wrong is not None and (self.grids is None or self.adapter.direct):
            self.report.adapter = ""
            raise LayoutError(wrong)
        if wrong is not None:
            raise _Wrong(f"{wrong} The adapter below uses the positions that were found.")
        layout, views = claims(self.forcing.student, self.batch)
        if self.claimed_views and (
            fault := compare_views(self.pictures, self.forcing.student, layout, views)
        ):
            raise LayoutError(fault)
        patches = paint_patches(self.probe, self.pictures, layout, views)
        if (fault := explain(patches, layout, self.grids)) is not None:
            raise LayoutError(f"the proposed layout does not hold for all samples: {fault}")
        check.lines.append(f"{len(patches)} painted patches, each changed its own position most")

    def _read_stream(self, check: Check) -> None:
        """The images in use, and the probe at the first block with the sequence that enters it."""
        samples = count_samples(self.subject, self.batch, self.found)
        first, blocks = self.blocks.blocks[0], self.blocks
        if blocks.shape[0] > samples and len(self.found) == 1:
            check.lines.append(
                f"{blocks.shape[0]} rows for {samples} samples: views lie in the batch dimension"
            )
        self.stream = None
        if self.subject.student is not None:
            sequence = self._student_alignment().sequence
            self.stream = None if sequence is None else Piece("sequence", sequence)
        elif blocks.shape[0] != samples or not blocks.mixed:
            pictures = Pictures(self.subject, self.batch, self.found, samples)
            self.stream = stream_of(self.subject, self.batch, blocks, pictures)
        sequence = None if self.stream is None else self.stream.value
        self.probe = Probe(self.subject, first, self.batch, sequence, blocks.calls)
        self.found = self._used()
        self.pictures = Pictures(self.subject, self.batch, self.found, self.probe.before.shape[0])

    def _student_alignment(self) -> Alignment:
        student: Any = self.subject.student
        alignment: Alignment = student.alignment(self.batch)
        return alignment

    def _used(self) -> list[ImageTensor]:
        """The image tensors that the decoder sees, if the user named none."""
        if self.options.image_key or len(self.found) < 2:
            return self.found
        used = [
            i
            for i in self.found
            if bool(self.probe.change(all_inverted(self.subject, self.batch, [i])).any())
        ]
        return used or self.found

    def _discover(self, check: Check, wanted: Grid | None) -> list[Tensor]:
        positions = views_positions(self.probe, self.pictures)
        grids = [find_grid(self.probe, self.pictures, v, p, wanted) for v, p in enumerate(positions)]
        for view, (index, all_) in enumerate(zip(grids, positions, strict=True)):
            (h, w), extra = index.shape, len(all_) - index.numel()
            others = f", {extra} more without a place (class or pooled tokens)" if extra else ""
            check.lines.append(
                f"view {view}: {h} x {w} tokens at {int(index.min())}..{int(index.max())} of "
                f"{self.probe.before.shape[1]}{others}"
            )
        self.report.facts |= {"views": len(grids), "positions": [index.tolist() for index in grids]}
        return grids

    def _verify_claim(self, check: Check) -> str | None:
        source: Any = self.subject.student or _Claims(self.subject, self._own_views())
        layout, views = claims(source, self.batch)
        patches = paint_patches(self.probe, self.pictures, layout, views)
        fault = explain(patches, layout, self.grids)
        if fault is None:
            check.lines.append(f"the layout as given holds for {len(patches)} painted patches")
            self.grids = None if self.subject.student is None else self.grids
        return fault

    def _own_views(self) -> Any:
        if self.subject.views is not None:
            return self.subject.views
        assert self.normalisation is not None
        return views_function(self.pictures, self.normalisation)

    def _propose(self) -> None:
        width = self.probe.before.shape[-1]
        self.adapter = propose(
            self.subject,
            blocks=self.blocks,
            stream=self.stream,
            pictures=self.pictures,
            normalisation=self.normalisation,
            grids=self.grids,
            width=width,
            layer=None if self.options.layer is None else self.layer,
        )
        self.report.adapter = self.adapter.code
        self.forcing = self.adapter.build(self.subject.bare, StandIn(self.options.teacher_dim))
        self.forcing.eval()

    def tap(self, check: Check) -> None:
        """4: the tap fires, on the same sequence."""
        seen = see_tap(self.forcing.student, self.batch, self.layer, self.probe.before.shape[1])
        B, L, D = seen.shape
        check.lines.append(
            f"after {seen.layer} of {len(self.blocks.blocks)} blocks: {B} x {L} tokens of width {D}"
        )
        if seen.calls > 1:
            check.lines.append(f"called {seen.calls} times a forward; the first call is aligned")
        self.report.facts |= {"layer": seen.layer, "width": D}

    def gradient(self, check: Check) -> None:
        """5: the alignment loss reaches trainable parameters, the action loss the aligned tokens."""
        try:
            path = follow(self.forcing, self.batch, self.blocks)
        except ConfigError as error:
            frozen = frozen_parts(self.subject.bare)
            raise ConfigError(f"{error}" + (f" Frozen: {', '.join(frozen)}." if frozen else "")) from error
        reached = ", ".join(f"{count:,} {place}" for place, count in sorted(path.reached.items()))
        check.lines.append(f"the alignment loss ({path.align_loss:.3f}) trains parameters: {reached}")
        if path.frozen:
            check.lines.append(f"frozen below the tap: {path.frozen:,} parameters of the blocks")
        check.lines.append(
            f"the action loss depends on the aligned tokens (gradient norm {path.action:.2g})"
            if path.action
            else "after the last block the actions no longer read the aligned tokens; both losses meet below"
        )
        self.report.facts["reached"] = path.reached

    def cost(self, check: Check) -> None:
        """6: what it adds."""
        cost = measure(self.forcing, self.batch)
        check.lines += cost.lines()
        self.report.facts["cost"] = cost.to_plain()


class _Wrong(LayoutError):
    """A claim that painting refuted; the true positions are known."""


class _Claims:
    """A claimed layout and views, as a student gives them."""

    def __init__(self, subject: Subject, views: Any) -> None:
        self.layout: Any = subject.layout
        self.views = views

    def alignment(self, batch: Any) -> Alignment:
        """Both of the batch."""
        return Alignment(self.layout(batch), self.views(batch))
