"""The page of `analyse`: why a run turned out as it did."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from spatial_forcing.analysis.charts import Series
from spatial_forcing.analysis.features import Frames, Progress, silent, student_features, teacher_features
from spatial_forcing.analysis.figures import Figure
from spatial_forcing.analysis.pictures import pca_pictures
from spatial_forcing.analysis.report import Cell, PictureRow, Section, TableData, pca_rows
from spatial_forcing.analysis.representation import (
    RankReport,
    audit_curves,
    cka_matrix,
    collapse_verdict,
    on_grid,
    pca_2d,
    projected,
    rank_report,
    tsne,
)
from spatial_forcing.errors import DataError
from spatial_forcing.forcing.projector import Projector
from spatial_forcing.protocols import Student, Teacher

PICTURES = 3
TARGET, PROJECTED = "teacher", "projected tokens"


@dataclass(frozen=True)
class Representation:
    """Tokens of a student and a teacher over the same frames, and what is computed from them.

    Attributes:
        ranks: of every student layer, the teacher's last layer and, with a projector, the projected tokens.
        verdict: on collapse, in words.
        cka: (student layers, teacher layers).
        layers, teacher_layers: rows and columns of `cka`.
    """

    ranks: tuple[RankReport, ...]
    verdict: str
    cka: tuple[tuple[float, ...], ...]
    layers: tuple[int, ...]
    teacher_layers: tuple[int, ...]


def represent(
    student: Student,
    teacher: Teacher,
    frames: Frames,
    *,
    aligned: int,
    projector: Projector | None = None,
    progress: Progress = silent,
) -> tuple[Representation, dict[str, Tensor]]:
    """Compare a student's tokens at every layer with every layer of a teacher.

    Args:
        student, teacher, frames: whose tokens, on what.
        aligned: blocks before the tap.
        projector: of the run, for the projected tokens.
        progress: called with (what, done, total).

    Returns:
        The numbers, and the sets of tokens that maps and pictures show: the aligned layer's, the projected
        ones, the teacher's, each (N, V, h, w, C) on the student's grid.
    """
    layers = range(len(student.blocks) + 1)
    own = student_features(student, frames, layers, progress=progress)
    size = (own[0].shape[2], own[0].shape[3])
    others = {
        k: on_grid(teacher_features(teacher, frames, layer=k, progress=progress), size)
        for k in range(teacher.depth)
    }
    shown = {f"student, layer {aligned}": own[aligned]}
    if projector is not None:
        shown[PROJECTED] = projected(projector, own[aligned])
    shown[TARGET] = others[teacher.depth - 1]
    ranks = {f"student, layer {k}": tokens for k, tokens in own.items()} | shown
    reports = {name: rank_report(name, tokens) for name, tokens in ranks.items()}
    judged = reports[PROJECTED] if projector is not None else reports[f"student, layer {aligned}"]
    matrix = cka_matrix(own, others)
    found = Representation(
        ranks=tuple(reports.values()),
        verdict=collapse_verdict(judged, reports[TARGET]),
        cka=tuple(tuple(map(float, row)) for row in matrix),
        layers=tuple(own),
        teacher_layers=tuple(others),
    )
    return found, shown


def read_representation(folder: Path) -> Representation | None:
    """What `spatial-forcing analyse` left of a run; None where it left nothing.

    Raises:
        DataError: analysis.json is not what it writes.
    """
    path = folder / "analysis.json"
    if not path.exists():
        return None
    plain = json.loads(path.read_text(encoding="utf-8"))
    try:
        ranks = tuple(RankReport(**row) for row in plain.pop("ranks"))
        return Representation(ranks=ranks, **plain)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not an analysis of a run ({error}); analyse it again.") from error


def numbers_section(found: Representation, run: str) -> Section:
    """Ranks and CKA of one of several runs on a page, without maps and pictures."""
    return Section(
        key=f"tokens-{run}",
        title=f"Tokens of {run}",
        text=(found.verdict,),
        figures=(_cka_figure(found),),
        tables=(_rank_table(found), _cka_table(found)),
    )


def audit_section(rows: Sequence[Mapping[str, float]]) -> Section | None:
    """The gradient audit of a run's metrics lines; None where it was not logged."""
    curves = audit_curves(rows)
    if not curves["cosine"]:
        return None
    titles = {"cosine": "Cosine between the two gradients", "ratio": "Norm: alignment over action"}
    figures = []
    for kind, title in titles.items():
        series = [Series(place, n, x, y) for n, (place, (x, y)) in enumerate(sorted(curves[kind].items()))]
        figures.append(Figure.lines(series, title, x_label="training step", y_label=kind))
    last = curves["cosine"]["all"][1][-1]
    lean = (
        "the same way"
        if last > 0.05
        else "against each other"
        if last < -0.05
        else "neither with nor against"
    )
    return Section(
        key="gradients",
        title="Gradient audit",
        text=(
            f"At the last audit the gradients of the two losses point {lean} (cosine {last:+.3f} over what "
            "both reach; alpha is not included). Near 0 the alignment neither helps nor hinders the action "
            "loss directly.",
        ),
        figures=tuple(figures),
    )


def representation_section(
    found: Representation, shown: Mapping[str, Tensor], frames: Frames, *, maps: bool = True
) -> Section:
    """Ranks, CKA over layers, t-SNE and PCA maps, PCA pictures."""
    figures = [_cka_figure(found)]
    if maps:
        for kind, method in (("PCA", pca_2d), ("t-SNE", tsne)):
            cloud = {n: _by_camera(points.tolist(), frames) for n, points in method(shown).items()}
            figures += [Figure.points(groups, f"{kind}: {name}") for name, groups in cloud.items()]
    return Section(
        key="tokens",
        title="Tokens",
        text=(found.verdict,),
        figures=tuple(figures),
        tables=(_rank_table(found), _cka_table(found)),
        pictures=_pictures(shown, frames),
    )


def _by_camera(points: Sequence[Sequence[float]], frames: Frames) -> list[tuple[str, list[Sequence[float]]]]:
    """Points of evenly spread tokens (frames, cameras, rows, columns in that order) by their camera."""
    groups: dict[str, list[Sequence[float]]] = {camera: [] for camera in frames.cameras}
    total = len(frames) * len(frames.cameras)
    for number, point in enumerate(points):
        view = min(int(number / max(len(points) - 1, 1) * total), total - 1)
        groups[frames.cameras[view % len(frames.cameras)]].append(point)
    return [(camera, group) for camera, group in groups.items() if group]


def _cka_figure(found: Representation) -> Figure:
    series = [
        Series(f"teacher layer {k}", n, list(found.layers), [row[n] for row in found.cka])
        for n, k in enumerate(found.teacher_layers)
    ]
    return Figure.lines(
        series,
        "CKA of student and teacher",
        x_label="student layer (blocks before it)",
        y_label="linear CKA",
    )


def _rank_table(found: Representation) -> TableData:
    return TableData(
        "ranks",
        "Rank and collapse",
        ("tokens", "effective rank", "channels", "constant part", "mean cosine"),
        tuple(
            (Cell(r.name), Cell.number(r.rank, "{:.1f}"), Cell(str(r.channels)),
             Cell.number(r.constant, "{:.3f}"), Cell.number(r.cosine, "{:.3f}"))
            for r in found.ranks
        ),
    )  # fmt: skip


def _cka_table(found: Representation) -> TableData:
    return TableData(
        "cka",
        "Linear CKA",
        ("student layer", *(f"teacher layer {k}" for k in found.teacher_layers)),
        tuple(
            (Cell(str(layer)), *(Cell.number(v, "{:.3f}") for v in row))
            for layer, row in zip(found.layers, found.cka, strict=True)
        ),
    )


def _pictures(shown: Mapping[str, Tensor], frames: Frames) -> tuple[PictureRow, ...]:
    """PCA as RGB of a few frames of the first camera."""
    camera, few = frames.cameras[0], range(0, len(frames), max(1, len(frames) // PICTURES))
    chosen = list(few)[:PICTURES]
    pictures = pca_pictures({name: tokens[:, 0] for name, tokens in shown.items()}, TARGET, chosen)
    images = {f"{camera}, frame {int(frames.index[i])}": frames.images[camera][i] for i in chosen}
    return pca_rows(images, pictures)
