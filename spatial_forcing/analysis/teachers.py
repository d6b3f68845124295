"""`teacher compare`: several teachers on some frames of one's own data, side by side.

Shapes: N frames, V views, h x w tokens, C channels.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spatial_forcing.alignment import views_from_batch
from spatial_forcing.analysis.agreement import Agreement, Correspondence, correspondences, view_agreement
from spatial_forcing.analysis.features import Frames, Progress, silent, teacher_features
from spatial_forcing.analysis.pictures import pca_pictures
from spatial_forcing.analysis.probe import FEWEST_EPISODES, DepthProbe, ProbeMetrics
from spatial_forcing.analysis.report import Cell, ReportData, Section, TableData, pca_rows
from spatial_forcing.analysis.representation import RankReport, rank_report
from spatial_forcing.data import Dataset
from spatial_forcing.errors import ConfigError, SpatialForcingError
from spatial_forcing.memory import peak_over
from spatial_forcing.protocols import Teacher
from spatial_forcing.teachers.cards import commercial_use

SHOWN = 3
"""Frames whose features are shown as pictures."""
BYTES = 2
"""Of a channel in a raw cache (bf16)."""
Load = Callable[[str], Teacher]


@dataclass(frozen=True)
class TeacherMeasure:
    """What one teacher costs and gives on these frames.

    Attributes:
        name, licence, commercial: see `TeacherCard`.
        channels, grid: C, and tokens (h, w) of a view.
        milliseconds: wall clock of encoding one frame (all its views), the median over batches.
        peak: bytes over what the process (on a GPU: the device) held before, at the peak of encoding a batch,
            weights not counted; None where the system does not tell.
        frame: bytes of one frame in a raw bf16 cache.
        tokens: effective rank, constant share of the norm, mean cosine of two tokens.
        depth: of a linear readout, on held-out episodes; None where the dataset lacks depth.
        agreement: between views; None without two cameras, depth and poses.
    """

    name: str
    licence: str
    commercial: str
    channels: int
    grid: tuple[int, int]
    milliseconds: float
    peak: float | None
    frame: int
    tokens: RankReport
    depth: ProbeMetrics | None
    agreement: Agreement | None


@dataclass(frozen=True)
class TeacherComparison:
    """All teachers on the same frames.

    Attributes:
        measures: in the order asked for.
        failed: by name, why a teacher could not be measured.
        frames, cameras, batch_size: what was encoded, and how many frames at a time.
        floor: depth of the mean depth image; None where there is no depth.
        without: what could not be measured, and why.
        pictures: by name, (shown, h, w, 3) of the first camera; `images` by heading.
    """

    measures: tuple[TeacherMeasure, ...]
    failed: Mapping[str, str]
    frames: int
    cameras: tuple[str, ...]
    batch_size: int
    floor: ProbeMetrics | None
    without: tuple[str, ...]
    images: Mapping[str, NDArray[np.uint8]]
    pictures: Mapping[str, NDArray[np.uint8]]


def compare_teachers(
    names: Sequence[str],
    load: Load,
    dataset: Dataset,
    *,
    cameras: Sequence[str] | None = None,
    frames: int = 48,
    layer: int = -1,
    batch_size: int = 4,
    progress: Progress = silent,
) -> TeacherComparison:
    """Encode the same frames with every teacher, one after the other, and measure.

    Args:
        names: what `load` takes.
        load: makes a teacher.
        dataset: whose frames; depth, intrinsics and extrinsics are used where they are recorded.
        cameras: default: all of the dataset's.
        frames: most frames used, spread evenly over all episodes.
        layer: of every teacher.
        batch_size: frames in one call.
        progress: called with (what, done, total).

    Raises:
        ConfigError: cameras of different sizes.
        SpatialForcingError: no teacher could be measured; the message is that of the first one.
    """
    order = tuple(cameras or dataset.cameras)
    sizes = {camera: dataset.info.frame_size(camera) for camera in order}
    if len(set(sizes.values())) > 1:
        raise ConfigError(f"the cameras differ in size: {sizes}; name those of one size with --cameras.")
    without: list[str] = []
    probe = _probe(dataset, order, frames, without)
    seen = probe.frames if probe is not None else _spread_frames(dataset, order, frames)
    pairs = correspondences(dataset, seen)
    if not pairs:
        without.append(
            "agreement between views: it needs two cameras that see the same, with depth, intrinsics and "
            "extrinsics"
        )
    chosen = list(range(0, len(seen), max(1, len(seen) // SHOWN)))[:SHOWN]
    bench = _Bench(seen, probe, pairs, layer, batch_size, progress)
    measures, failed, kept = [], {}, {}
    first: SpatialForcingError | None = None
    for number, name in enumerate(names):
        progress("teachers", number, len(names))
        try:
            measure, features = bench.measure(name, load(name))
        except SpatialForcingError as error:
            first, failed[name] = first or error, str(error)
            continue
        measures.append(measure)
        kept[name] = features[chosen][:, 0].clone()
        del features
        gc.collect()
    progress("teachers", len(names), len(names))
    if first is not None and not measures:
        raise first
    floor = None if probe is None else probe.floor("linear")[-1]
    headings = {f"{order[0]}, frame {int(seen.index[i])}": seen.images[order[0]][i] for i in chosen}
    return TeacherComparison(
        measures=tuple(measures),
        failed=failed,
        frames=len(seen),
        cameras=order,
        batch_size=batch_size,
        floor=floor,
        without=tuple(without),
        images=headings,
        pictures=pca_pictures(kept, measures[0].name),
    )


def _probe(dataset: Dataset, cameras: Sequence[str], frames: int, without: list[str]) -> DepthProbe | None:
    if missing := [camera for camera in cameras if camera not in dataset.info.depths]:
        without.append(f"depth: none is recorded for {', '.join(missing)}")
        return None
    if len(dataset.episodes) < FEWEST_EPISODES:
        without.append(
            f"depth: a readout is fitted and measured on different episodes, {FEWEST_EPISODES} or more, and "
            f"there are {len(dataset.episodes)}"
        )
        return None
    return DepthProbe(dataset, cameras, frames=frames)


def _spread_frames(dataset: Dataset, cameras: Sequence[str], count: int) -> Frames:
    index = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().long().unique()
    return Frames.read(dataset, index.tolist(), cameras)


@dataclass(frozen=True)
class _Bench:
    """What every teacher is measured on."""

    frames: Frames
    probe: DepthProbe | None
    pairs: Sequence[Correspondence]
    layer: int
    batch_size: int
    progress: Progress

    def measure(self, name: str, teacher: Teacher) -> tuple[TeacherMeasure, Tensor]:
        """The measure, and the features (N, V, h, w, C)."""
        frames, layer = self.frames, self.layer
        views = views_from_batch(frames.batch(slice(0, self.batch_size)), frames.cameras)
        teacher.features(views, (layer,))  # the first call is slower: kernels, tables
        peak = peak_over(lambda: teacher.features(views, (layer,)))
        seconds: list[float] = []
        features = teacher_features(
            teacher,
            frames,
            layer=layer,
            batch_size=self.batch_size,
            progress=self.progress,
            seconds=seconds,
        )
        read = None if self.probe is None else self.probe.read(name, "ceiling", None, features, "linear")
        measure = TeacherMeasure(
            name=name,
            licence=teacher.licence,
            commercial=commercial_use(teacher.licence),
            channels=teacher.dim,
            grid=(features.shape[2], features.shape[3]),
            milliseconds=1000 * statistics.median(seconds),
            peak=peak,
            frame=BYTES * features[0].numel(),
            tokens=rank_report(name, features),
            depth=None if read is None else read[-1],
            agreement=view_agreement(features, self.pairs, torch.Generator().manual_seed(0)),
        )
        return measure, features


COSTS = (
    "teacher", "commercial use", "ms a frame", "peak, MB", "cached frame, MB", "channels", "tokens a view",
)  # fmt: skip
CONTENT = (
    "features", "AbsRel \u2193", "\u00b1 s.e.", "AbsRel, changing \u2193", "agreement \u2191",
    "of others \u2193", "constant part", "effective rank",
)  # fmt: skip


def cost_rows(found: TeacherComparison) -> list[tuple[Cell, ...]]:
    """One row of `COSTS` for each teacher."""
    return [
        (
            Cell(m.name, words=True),
            Cell(m.commercial, words=True),
            Cell.number(m.milliseconds, "{:.0f}"),
            Cell.number(None if m.peak is None else m.peak / 1e6, "{:.0f}"),
            Cell.number(m.frame / 1e6, "{:.2f}"),
            Cell(str(m.channels)),
            Cell(f"{m.grid[0]} x {m.grid[1]}"),
        )
        for m in found.measures
    ]


def content_rows(found: TeacherComparison) -> list[tuple[Cell, ...]]:
    """One row of `CONTENT` for each teacher, and at last for the floor, where there is one."""
    rows: list[tuple[Cell, ...]] = []
    for m in found.measures:
        agreed = m.agreement
        rows.append(
            (
                Cell(m.name, words=True),
                *_depth_cells(m.depth),
                Cell.number(None if agreed is None else agreed.same, "{:.3f}"),
                Cell.number(None if agreed is None else agreed.other, "{:.3f}"),
                Cell.number(m.tokens.constant, "{:.3f}"),
                Cell.number(m.tokens.rank, "{:.1f}"),
            )
        )
    if found.floor is not None:
        nothing = (Cell.number(None),) * 4
        rows.append((Cell("mean depth image (floor)", words=True), *_depth_cells(found.floor), *nothing))
    return rows


def _depth_cells(found: ProbeMetrics | None) -> tuple[Cell, Cell, Cell]:
    if found is None:
        return (Cell.number(None),) * 3
    values = (found.abs_rel, found.abs_rel_error, found.abs_rel_changing)
    return (Cell.number(values[0]), Cell.number(values[1]), Cell.number(values[2]))


NOTES = (
    "AbsRel: mean relative error of depth that a linear readout finds in the features, on held-out episodes; "
    "changing: over the pixels whose depth changes between frames. The floor knows nothing of a frame.",
    "Agreement: mean cosine of two cameras' features of the same point, after each camera's mean feature is "
    "removed; of others: of the same features in a random order.",
    "Constant part: share of the features' squared norm that is the same everywhere; a cosine to such "
    "features is nearly won by learning that constant.",
    "Peak: memory of encoding one batch, without the weights. Cached frame: all views, raw bf16; a cache "
    "with fewer channels or int8 is smaller.",
    "These numbers describe features. Which teacher trains the better policy, only runs tell: "
    "spatial-forcing compare.",
)


def teachers_page(found: TeacherComparison, dataset: str, command: str) -> ReportData:
    """The comparison as a page: two tables, and every teacher's features of the same frames as colours."""
    failures = tuple(f"{name} was not measured: {reason}" for name, reason in found.failed.items())
    missing = tuple(f"Not measured: {each}." for each in found.without)
    where = f"{dataset}: {found.frames} frames of {', '.join(found.cameras)}"
    return ReportData(
        title="Teachers",
        subtitle=f"{where}, {found.batch_size} at a time",
        sections=(
            Section(
                key="teachers",
                title="Side by side",
                text=(*failures, *missing),
                tables=(
                    TableData("costs", "What they cost", COSTS, tuple(cost_rows(found))),
                    TableData("content", "What their features hold", CONTENT, tuple(content_rows(found))),
                ),
            ),
            Section(
                key="features",
                title="Features as colours",
                text=(
                    "The first three principal components of each teacher's features, rotated to agree best "
                    "with those of the first one: equal structure has equal colours.",
                ),
                pictures=pca_rows(found.images, found.pictures),
            ),
            Section(key="reading", title="How to read it", notes=NOTES),
        ),
        commands=(command,),
    )
