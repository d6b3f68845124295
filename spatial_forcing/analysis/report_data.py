"""What a report shows: plain dataclasses, and the functions that fill them from runs.

Everything here survives `json.dumps(dataclasses.asdict(data))`.
"""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.analysis.pictures import depth_picture, png_bytes
from spatial_forcing.analysis.probe import ProbeMetrics, ProbeResult
from spatial_forcing.errors import DataError
from spatial_forcing.evaluation.results import (
    CurvePoint,
    EpisodeResult,
    rates_by_task,
    remarks,
    success_curve,
)
from spatial_forcing.evaluation.statistics import Rate, difference, macro_mean


@dataclass(frozen=True)
class Media:
    """A picture or a video inside the page: `uri` is a data URI, `caption` also its alternative text."""

    uri: str
    caption: str
    kind: str

    @classmethod
    def picture(cls, pixels: NDArray[np.uint8], caption: str) -> Media:
        """From (H, W, 3) uint8."""
        return cls(_data_uri(png_bytes(pixels), "image/png"), caption, "image")

    @classmethod
    def file(cls, path: Path, caption: str) -> Media:
        """From a PNG, JPEG, MP4 or WebM file.

        Raises:
            DataError: the file is missing or of another type.
        """
        kind = mimetypes.guess_type(path.name)[0] or ""
        if kind not in ("image/png", "image/jpeg", "video/mp4", "video/webm") or not path.is_file():
            raise DataError(f"{path} is no existing PNG, JPEG, MP4 or WebM file; the report cannot show it.")
        return cls(_data_uri(path.read_bytes(), kind), caption, kind.split("/")[0])


@dataclass(frozen=True)
class Curve:
    """A training metric: `y[i]` at step `x[i]`."""

    x: tuple[float, ...]
    y: tuple[float, ...]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, float]], key: str) -> Curve:
        """`key` over `step` from lines of metrics.jsonl; lines without it are left out."""
        pairs = [(float(r["step"]), float(r[key])) for r in rows if key in r]
        return cls(tuple(x for x, _ in pairs), tuple(y for _, y in pairs))


@dataclass(frozen=True)
class Arm:
    """One of the compared policies.

    Attributes:
        name: short, e.g. "SF"; `description`: one line.
        per_task: final success by task; `success`: its macro mean.
        evaluations: success at every checkpoint evaluated, the last one included.
        curves: training metrics by name, e.g. `action_loss`, `align_loss`, `cosine`.
        remarks: what must stand beside the figures, e.g. that assets were stand-ins.
    """

    name: str
    description: str
    per_task: Mapping[str, Rate]
    success: Rate
    evaluations: tuple[CurvePoint, ...] = ()
    curves: Mapping[str, Curve] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        name: str,
        description: str,
        episodes: Sequence[EpisodeResult],
        metrics: Sequence[Mapping[str, float]] = (),
        curves: Sequence[str] = ("action_loss", "align_loss", "cosine"),
    ) -> Arm:
        """From evaluated episodes (tagged with `step`; the last step counts) and lines of metrics.jsonl.

        Raises:
            DataError: no episode, or one without the tag.
        """
        evaluations = success_curve(episodes)
        if not evaluations:
            raise DataError(f"arm {name!r} has no evaluated episode; evaluate it before the report is made.")
        final = [e for e in episodes if int(e.tags["step"]) == evaluations[-1].step]
        per_task = rates_by_task(final)
        found = {key: Curve.of(metrics, key) for key in curves}
        return cls(
            name=name,
            description=description,
            per_task=per_task,
            success=macro_mean(list(per_task.values())),
            evaluations=tuple(evaluations),
            curves={key: curve for key, curve in found.items() if curve.x},
            remarks=remarks(episodes),
        )


@dataclass(frozen=True)
class PictureRow:
    """Pictures side by side, under a heading."""

    heading: str
    pictures: tuple[Media, ...]


@dataclass(frozen=True)
class ProbeReport:
    """The depth probe: metrics, panels, and what was done in a sentence."""

    description: str
    metrics: tuple[ProbeMetrics, ...]
    rows: tuple[PictureRow, ...]
    near: float
    far: float

    @classmethod
    def of(cls, result: ProbeResult, names: Mapping[str, str] | None = None) -> ProbeReport:
        """From `probe_depth`. `names` renames readouts in the captions, and orders and selects them."""
        depths = np.concatenate(
            [p.truth[p.truth > 0].ravel() for p in result.panels] or [np.array([0.1, 1.0])]
        )
        near, far = float(np.percentile(depths, 1)), float(np.percentile(depths, 99))
        far = max(far, near * 1.05)
        return cls(
            description=(
                f"{_readouts(result)} from frozen tokens to log depth, fitted on {result.train_frames} "
                f"frames and measured on {result.test_frames} frames of {result.test_episodes} held-out "
                f"episodes; depth clipped at {result.clip:g} m."
            ),
            metrics=result.metrics,
            rows=tuple(_panel_row(p, near, far, names) for p in result.panels),
            near=near,
            far=far,
        )


def _readouts(result: ProbeResult) -> str:
    heads = {m.head for m in result.metrics}
    if heads == {"linear", "dpt"}:
        return "A linear and a DPT readout"
    return "A DPT readout" if heads == {"dpt"} else "A linear readout"


@dataclass(frozen=True)
class ReportData:
    """Everything on the page.

    Attributes:
        title, subtitle: heading and one line below it (preset, date).
        arms: compared policies, in order.
        control, treated, blind: names of the arms that the verdict compares; "" where there is none.
        notes: what this run does and does not show, in sentences (limits, deviations, seeds).
        probe: the depth probe, or None.
        sections: further sections (`sections.Section`), in order.
        pca: rows of feature pictures; `videos`: rollouts.
        config: full settings by arm or part; `environment`: packages, machine, git state.
        commands: what to type to repeat it.
    """

    title: str
    subtitle: str
    arms: tuple[Arm, ...]
    control: str = ""
    treated: str = ""
    blind: str = ""
    notes: tuple[str, ...] = ()
    probe: ProbeReport | None = None
    sections: tuple[Any, ...] = ()
    pca: tuple[PictureRow, ...] = ()
    videos: tuple[Media, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    commands: tuple[str, ...] = ()

    def arm(self, name: str) -> Arm:
        """The arm of that name. Raises `DataError` when there is none."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise DataError(f"the report has no arm {name!r}; it has {[a.name for a in self.arms]}.")


def verdict(data: ReportData) -> list[str]:
    """In words, what the success rates show; generated, so that no report claims more than its numbers."""
    sentences = []
    if data.control and data.treated:
        control, treated = data.arm(data.control), data.arm(data.treated)
        sentences.append(_comparison(treated, control) + " " + _consequence(treated, control))
    if data.blind and data.control:
        blind, control = data.arm(data.blind), data.arm(data.control)
        clear = difference(control.success, blind.success)[1] > 0
        consequence = (
            "The policies clearly use their cameras."
            if clear
            else "The blind arm is not clearly worse: this run says little about vision."
        )
        sentences.append(f"{_comparison(blind, control)} {consequence}")
    return sentences


def _comparison(first: Arm, second: Arm) -> str:
    value, low, high = (100 * v for v in difference(first.success, second.success))
    return (
        f"{first.name} succeeds in {100 * first.success.value:.1f} % of episodes, {second.name} in "
        f"{100 * second.success.value:.1f} %: a difference of {value:+.1f} points "
        f"(95 % interval {low:+.1f} to {high:+.1f})."
    )


def _consequence(treated: Arm, control: Arm) -> str:
    _, low, high = difference(treated.success, control.success)
    episodes = f"{treated.success.trials} and {control.success.trials} episodes"
    if low <= 0 <= high:
        return f"The interval includes zero: {episodes} do not show that {treated.name} changes success."
    return (
        f"{treated.name} is {'better' if low > 0 else 'worse'} on these tasks ({episodes}); the interval "
        "covers the choice of episodes, not that of training seeds."
    )


def _panel_row(panel: Any, near: float, far: float, names: Mapping[str, str] | None) -> PictureRow:
    shown = names or {name: name for name in panel.predictions}
    pictures = [
        Media.picture(panel.image, f"image, camera {panel.camera}, frame {panel.index}"),
        Media.picture(depth_picture(panel.truth, near, far), "true depth"),
        *(
            Media.picture(depth_picture(panel.predictions[name], near, far), caption)
            for name, caption in shown.items()
        ),
    ]
    return PictureRow(f"{panel.camera}, frame {panel.index}", tuple(pictures))


def pca_rows(
    images: Mapping[str, NDArray[np.uint8]], pictures: Mapping[str, NDArray[np.uint8]]
) -> tuple[PictureRow, ...]:
    """Rows of (image, PCA of each feature set); `images`: (H, W, 3) by heading, in their order."""
    return tuple(
        PictureRow(
            heading,
            (
                Media.picture(image, f"image, {heading}"),
                *(Media.picture(stack[number], f"{name}") for name, stack in pictures.items()),
            ),
        )
        for number, (heading, image) in enumerate(images.items())
    )


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
