"""The depth probe: how much depth a linear readout finds in frozen features (arXiv 2510.12276, section 3).

The paper trains a DPT head on the frozen model's visual embeddings and shows pictures. Here the readout is
linear, so that it can only find what is there, and it is measured on held-out episodes against floors
(the mean depth image, a random student) and a ceiling (the teacher's own features).

A probe maps one token to the log depth of its patch. Every pixel has its own mean over the training frames,
removed from depth and features alike, so a probe that learns nothing predicts the mean depth image: the
floor is inside every probe, and what a probe gains comes from the features.

Shapes: N frame, V view, h x w tokens, C channels, R pixels on a side of the depth maps compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spatial_forcing.analysis.depth import NEAREST, depth_metrics
from spatial_forcing.analysis.features import (
    Frames,
    Progress,
    read_depth,
    silent,
    student_cameras,
    student_features,
    teacher_features,
)
from spatial_forcing.analysis.readout import Head, Split, dpt_readout, linear_readout
from spatial_forcing.data import Dataset
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.protocols import Student, Teacher

MEAN_IMAGE = "mean depth image"
TEACHER = "teacher"
FEWEST_EPISODES = 4
MOVING = 0.05
"""A pixel whose log depth varies by more than this (standard deviation, so 5 %) counts as changing."""


@dataclass(frozen=True)
class ProbeMetrics:
    """One readout on the held-out episodes of one camera; each metric is a mean over images.

    Attributes:
        name: which features; `kind`: "floor", "student" or "ceiling"; `layer`: blocks before the tap, None
            where there is no student; `head`: the readout.
        camera: name of the camera, or "all" for the mean over cameras.
        abs_rel: mean of |predicted - true| / true; `abs_rel_error`: its standard error over episodes.
        rmse: metres.
        delta: fraction of pixels with max(predicted / true, true / predicted) < 1.25.
        abs_rel_changing: AbsRel over those pixels whose depth changes between frames; None without any.
        per_episode: mean AbsRel of each held-out episode.
        seeds: training seeds that this is the mean of; the error is then over them.
    """

    name: str
    kind: str
    layer: int | None
    camera: str
    abs_rel: float
    abs_rel_error: float
    rmse: float
    delta: float
    abs_rel_changing: float | None
    head: Head = "linear"
    per_episode: tuple[float, ...] = ()
    seeds: int = 1


@dataclass(frozen=True)
class DepthPanel:
    """One held-out frame: image (H, W, 3) uint8, truth (R, R) metres, predictions (R, R) by name."""

    index: int
    camera: str
    image: NDArray[np.uint8]
    truth: NDArray[np.float32]
    predictions: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class ProbeResult:
    """What `probe_depth` found. `metrics` hold every readout by camera; `panels` show the best layer's."""

    metrics: tuple[ProbeMetrics, ...]
    panels: tuple[DepthPanel, ...]
    train_frames: int
    test_frames: int
    test_episodes: int
    clip: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Everything but the panels, JSON-able."""
        kept = {k: v for k, v in vars(self).items() if k not in ("metrics", "panels")}
        return kept | {"metrics": [asdict(m) for m in self.metrics]}


def probe_depth(
    students: Mapping[str, Student],
    dataset: Dataset,
    *,
    layers: Sequence[int],
    floors: Mapping[str, Student] | None = None,
    teacher: Teacher | None = None,
    heads: Sequence[Head] = ("linear",),
    depth_source: DepthSource | None = None,
    cameras: Sequence[str] | None = None,
    frames: int = 2000,
    held_out: float = 0.25,
    test_episodes: Sequence[int] | None = None,
    side: int = 48,
    clip: float = 3.0,
    panels: int = 3,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress = silent,
) -> ProbeResult:
    """Fit linear depth readouts on frozen features and measure them on held-out episodes.

    Args:
        students: by name, e.g. `{"base": ..., "SF": ...}`; frozen, run as they are deployed.
        dataset: with depth for the cameras probed.
        layers: numbers of blocks before the tap; a probe is trained for each.
        floors: students that should know nothing, e.g. one with random weights.
        teacher: whose features give the ceiling.
        heads: readouts: `linear`, and `dpt`, which also uses neighbouring tokens.
        depth_source: predicts the depth to be found, where none was measured; default: the dataset's.
        cameras: default: those of the first student.
        frames: most frames used, spread evenly over all episodes.
        held_out: fraction of the episodes kept for measuring.
        test_episodes: episodes to measure on, e.g. those that no policy was trained on; default: a
            draw of `held_out`.
        side: R, pixels on a side of the depth maps compared.
        clip: metres; depth beyond counts as `clip`.
        panels: held-out frames a camera to return as pictures.
        batch_size: frames in one forward pass.
        seed: chooses the held-out episodes, and those that the readouts are tuned on.
        progress: called with (what, done, total).

    Raises:
        ConfigError: fewer than 4 episodes, a fraction outside (0, 1), episodes to measure on that are not
            there or leave fewer than two, no student, or a name used twice.
        DataError: the dataset lacks a camera or its depth, or too few pixels are measured.
    """
    floors = dict(floors or {})
    _check_names(students, floors)
    probe = DepthProbe(
        dataset,
        tuple(cameras or student_cameras(next(iter(students.values())), dataset)),
        depth_source=depth_source,
        frames=frames,
        held_out=held_out,
        test_episodes=test_episodes,
        side=side,
        clip=clip,
        seed=seed,
    )
    probe.floor(heads[0])
    for kind, group in (("floor", floors), ("student", students)):
        for name, student in group.items():
            tokens = student_features(student, probe.frames, layers, batch_size=batch_size, progress=progress)
            for (layer, values), head in product(tokens.items(), heads):
                probe.read(name, kind, layer, values, head)
                progress(f"{head} readouts of {name}", layer, max(tokens))
    if teacher is not None:
        values = teacher_features(teacher, probe.frames, batch_size=batch_size, progress=progress)
        for head in heads:
            probe.read(TEACHER, "ceiling", None, values, head)
    return probe.result(panels)


Key = tuple[str, str, int | None, Head]
DepthSource = Callable[[Frames, int, float], dict[str, Tensor]]
"""(frames, R, clip) -> (N, R, R) by camera, 0 where there is none; see `features.predicted_depth`."""


class DepthProbe:
    """Depth readouts from any features of the same frames of a dataset.

    Args:
        dataset, cameras: with depth for these cameras.
        depth_source, frames, held_out, test_episodes, side, clip, seed: see `probe_depth`.

    Attributes:
        frames: what features are to be made of, in order.

    Raises:
        ConfigError: fewer than 4 episodes, a fraction outside (0, 1), episodes to measure on that are not
            there or leave fewer than two.
        DataError: the dataset lacks a camera or its depth, or too few pixels are measured.
    """

    def __init__(
        self,
        dataset: Dataset,
        cameras: Sequence[str],
        *,
        depth_source: DepthSource | None = None,
        frames: int = 2000,
        held_out: float = 0.25,
        test_episodes: Sequence[int] | None = None,
        side: int = 48,
        clip: float = 3.0,
        seed: int = 0,
    ) -> None:
        self._started = time.perf_counter()
        _check_episodes(dataset, held_out)
        index, self._split = _choose(dataset, frames, _tests(dataset, held_out, test_episodes, seed), seed)
        self.frames = Frames.read(dataset, index, cameras)
        self._clip = clip
        self._depth = (
            {c: read_depth(dataset, index, c, side, clip) for c in cameras}
            if depth_source is None
            else depth_source(self.frames, side, clip)
        )
        self._probes = {c: _CameraProbe(self._depth[c], self._split, clip, c) for c in cameras}
        self._results: dict[Key, dict[str, Tensor]] = {}
        self._metrics: list[ProbeMetrics] = []

    def floor(self, head: Head) -> Sequence[ProbeMetrics]:
        """Measure the mean depth image, which knows nothing of a frame; see `read`."""
        return self._add(
            (MEAN_IMAGE, "floor", None, head), {c: probe.mean_image() for c, probe in self._probes.items()}
        )

    def read(
        self, name: str, kind: str, layer: int | None, features: Tensor, head: Head
    ) -> Sequence[ProbeMetrics]:
        """Fit a readout to features (N, V, h, w, C) of `frames`; its metrics, the mean over cameras last."""
        views = {camera: features[:, number] for number, camera in enumerate(self.frames.cameras)}
        return self._add(
            (name, kind, layer, head), {c: probe.readout(views[c], head) for c, probe in self._probes.items()}
        )

    def _add(self, key: Key, predicted: dict[str, Tensor]) -> Sequence[ProbeMetrics]:
        rows = _metrics(key, predicted, self._probes, self._split)
        self._results[key] = predicted
        self._metrics += rows
        return rows

    def result(self, panels: int = 3) -> ProbeResult:
        """All that was read, in order, with `panels` held-out frames a camera as pictures."""
        test = self._split.test
        shown = _spread(len(test), panels)
        return ProbeResult(
            metrics=tuple(self._metrics),
            panels=tuple(
                _panels(self._results, self._metrics, self.frames, self._depth, shown=shown, test=test)
            ),
            train_frames=len(self._split.train),
            test_frames=len(test),
            test_episodes=len(set(self._split.test_episode.tolist())),
            clip=self._clip,
            seconds=time.perf_counter() - self._started,
        )


class _CameraProbe:
    """Truth of one camera and the readouts fitted to it."""

    def __init__(self, depth: Tensor, split: Split, clip: float, camera: str) -> None:
        self.split, self.clip, self.depth = split, clip, depth
        self.measured = depth > NEAREST
        if self.measured[split.test].flatten(1).sum(1).min() == 0 or not self.measured[split.fit].any():
            raise DataError(f"camera {camera!r} has a frame without any measured depth; record it again.")
        self.log = depth.clamp(min=NEAREST).log()
        weight = self.measured[split.train].float()
        count = weight.sum(0)
        overall = (self.log[split.train] * weight).sum() / weight.sum()
        self.mean = torch.where(
            count > 0, (self.log[split.train] * weight).sum(0) / count.clamp(min=1), overall
        )
        # Unmeasured pixels take the mean: a linear readout learns to add nothing there, a DPT one leaves them
        # out, and no metric counts them.
        self.residual = torch.where(self.measured, self.log - self.mean, 0.0)
        self.changing = self.residual[split.train].std(0) > MOVING

    def mean_image(self) -> Tensor:
        """Predictions (test frames, R, R) of the floor."""
        return self._metres(torch.zeros_like(self.residual[self.split.test]))

    def readout(self, features: Tensor, head: Head) -> Tensor:
        """Predictions (test frames, R, R) in metres from (N, h, w, C)."""
        if head == "dpt":
            return self._metres(dpt_readout(features, self.residual, self.measured, self.split))
        return self._metres(linear_readout(features, self.residual, self.split))

    def _metres(self, residual: Tensor) -> Tensor:
        return (residual + self.mean).exp().clamp(NEAREST, self.clip)


def _metrics(
    key: Key, found: Mapping[str, Tensor], probes: Mapping[str, _CameraProbe], split: Split
) -> list[ProbeMetrics]:
    name, kind, layer, head = key
    rows = []
    for camera, predicted in found.items():
        probe = probes[camera]
        values = depth_metrics(predicted, probe.depth[split.test], probe.measured[split.test])
        keep = probe.measured[split.test] & probe.changing
        changing = depth_metrics(predicted, probe.depth[split.test], keep)["abs_rel"]
        per_episode = [
            values["abs_rel"][split.test_episode == e].nanmean() for e in np.unique(split.test_episode)
        ]
        error = (
            float(torch.stack(per_episode).std() / len(per_episode) ** 0.5) if len(per_episode) > 1 else 0.0
        )
        rows.append(
            ProbeMetrics(
                name=name,
                kind=kind,
                layer=layer,
                camera=camera,
                abs_rel=float(values["abs_rel"].nanmean()),
                abs_rel_error=error,
                rmse=float(values["rmse"].nanmean()),
                delta=float(values["delta"].nanmean()),
                abs_rel_changing=None if not bool(keep.any()) else float(changing.nanmean()),
                head=head,
                per_episode=tuple(float(value) for value in per_episode),
            )
        )
    return [*rows, _mean_over_cameras(rows)]


def _mean_over_cameras(rows: Sequence[ProbeMetrics]) -> ProbeMetrics:
    def mean(field: str) -> float:
        return float(np.mean([getattr(r, field) for r in rows]))

    changing = [r.abs_rel_changing for r in rows if r.abs_rel_changing is not None]
    return ProbeMetrics(
        name=rows[0].name,
        kind=rows[0].kind,
        layer=rows[0].layer,
        camera="all",
        abs_rel=mean("abs_rel"),
        # Cameras share the episodes, so their errors do not average out: the mean is an upper bound.
        abs_rel_error=mean("abs_rel_error"),
        rmse=mean("rmse"),
        delta=mean("delta"),
        abs_rel_changing=float(np.mean(changing)) if changing else None,
        head=rows[0].head,
        per_episode=tuple(float(np.mean(each)) for each in zip(*(r.per_episode for r in rows), strict=True)),
    )


def _panels(
    results: Mapping[Key, Mapping[str, Tensor]],
    metrics: Sequence[ProbeMetrics],
    frames: Frames,
    depth: Mapping[str, Tensor],
    *,
    shown: NDArray[np.int64],
    test: Tensor,
) -> list[DepthPanel]:
    """The test frames number `shown`, each name at its layer with the lowest AbsRel over all cameras."""
    best: dict[str, ProbeMetrics] = {}
    for m in metrics:
        if m.camera == "all" and (m.name not in best or m.abs_rel < best[m.name].abs_rel):
            best[m.name] = m
    found = {name: results[m.name, m.kind, m.layer, m.head] for name, m in best.items()}
    return [
        DepthPanel(
            index=int(frames.index[int(test[row])]),
            camera=camera,
            image=frames.images[camera][int(test[row])],
            truth=depth[camera][test[row]].numpy(),
            predictions={name: predicted[camera][row].numpy() for name, predicted in found.items()},
        )
        for row in shown.tolist()
        for camera in frames.cameras
    ]


def _spread(length: int, count: int) -> NDArray[np.int64]:
    """At most `count` positions, evenly spread over 0..length - 1."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(np.int64))


def _check_names(students: Mapping[str, Student], floors: Mapping[str, Student]) -> None:
    if not students:
        raise ConfigError("no student to probe; give at least one.")
    if twice := (set(students) & set(floors)) | ({MEAN_IMAGE, TEACHER} & (set(students) | set(floors))):
        raise ConfigError(f"the names {sorted(twice)} are used twice or reserved; rename the students.")


def _check_episodes(dataset: Dataset, held_out: float) -> None:
    if not 0 < held_out < 1:
        raise ConfigError(f"held_out is {held_out}; expected a fraction between 0 and 1.")
    if len(dataset.episodes) < FEWEST_EPISODES:
        raise ConfigError(
            f"{dataset.root} has {len(dataset.episodes)} episodes; the probe needs at least "
            f"{FEWEST_EPISODES}, to fit, tune and measure on different ones."
        )


def _tests(dataset: Dataset, held_out: float, chosen: Sequence[int] | None, seed: int) -> set[int]:
    """Numbers of the episodes to measure on."""
    count = len(dataset.episodes)
    if chosen is None:
        order = np.random.default_rng(seed).permutation(count)
        return set(order[: min(max(1, round(held_out * count)), count - 2)].tolist())
    tests = set(chosen)
    if not tests or not tests <= set(range(count)) or len(tests) > count - 2:
        raise ConfigError(
            f"test_episodes are {list(chosen)}; expected numbers of 0 to {count - 1}, and two episodes more "
            "to fit and tune on."
        )
    return tests


def _choose(dataset: Dataset, frames: int, tests: set[int], seed: int) -> tuple[list[int], Split]:
    """Frame indices spread evenly over all episodes, and which of them are fitted, tuned and tested on."""
    episodes = dataset.episodes
    order = np.random.default_rng(seed).permutation(len(episodes)).tolist()
    others = [number for number in order if number not in tests]
    tunes = max(1, round(0.2 * len(others)))
    role = np.full(len(episodes), 0)
    role[sorted(tests)], role[others[:tunes]] = 2, 1
    each = max(1, frames // len(episodes))
    index: list[int] = []
    owner: list[int] = []
    for number, episode in enumerate(episodes):
        picked = episode.start + _spread(episode.length, each)
        index += picked.tolist()
        owner += [number] * len(picked)
    who = np.asarray(owner)
    fit, tune, test = (torch.from_numpy(np.flatnonzero(role[who] == r)) for r in range(3))
    return index, Split(fit, tune, test, who[test.numpy()])
