"""A plausible report made of synthetic numbers and pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from spatial_forcing.analysis.pictures import pca_pictures
from spatial_forcing.analysis.probe import DepthPanel, ProbeMetrics, ProbeResult
from spatial_forcing.analysis.probe_page import probe_section
from spatial_forcing.analysis.report import Media, ReportData, Section, VideoRow, pca_rows
from spatial_forcing.evaluation.video import write_video
from spatial_forcing.experiments.arms import parse_arm
from spatial_forcing.experiments.sections import comparison_section, training_section
from spatial_forcing.experiments.statistics import Comparison, RunRecord, analyse

TASKS = ("reach-v3", "push-v3", "drawer-open-v3", "button-press-topdown-v3", "window-open-v3")
ARM_NAMES = ("alpha0", "sf", "blind")
RATES = {
    "base": (0.55, 0.12, 0.5, 0.35, 0.4),
    "SF": (0.66, 0.2, 0.58, 0.4, 0.5),
    "blind": (0.06, 0.0, 0.2, 0.1, 0.06),
}


def records(arm: str, rng: np.random.Generator, count: int = 50) -> list[RunRecord]:
    return [
        RunRecord(
            arm,
            1.0,
            training_seed,
            {
                step: {
                    (task, seed): bool(rng.random() < rate * growth)
                    for task, rate in zip(TASKS, RATES[arm], strict=True)
                    for seed in range(count)
                }
                for step, growth in ((250, 0.45), (500, 0.7), (1000, 0.9), (1500, 1.0))
            },
            seconds=100.0,
            peak_memory=2**30,
        )
        for training_seed in range(3)
    ]


def compared() -> Comparison:
    rng = np.random.default_rng(0)
    return analyse([r for arm in RATES for r in records(arm, rng)], controls=["base"])


def losses(arm: str, rng: np.random.Generator) -> list[dict[str, float]]:
    rows = []
    for step in range(5, 1501, 5):
        row = {"step": step, "action_loss": 0.7 * np.exp(-step / 350) + 0.09 + 0.03 * rng.random()}
        if arm == "SF":
            cosine = 0.93 * (1 - np.exp(-step / 120)) + 0.01 * rng.random()
            row |= {"align_loss": 1 - cosine, "cosine": cosine}
        rows.append(row)
    return rows


def scene(rng: np.random.Generator, size: int = 96) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:size, :size] / size
    depth = 1.6 - 0.9 * y
    image = np.stack([120 + 60 * y, 110 + 50 * y, 95 + 40 * y], -1)
    for _ in range(4):
        cx, cy, r = rng.uniform(0.2, 0.8), rng.uniform(0.35, 0.85), rng.uniform(0.06, 0.16)
        inside = (x - cx) ** 2 + (y - cy) ** 2 < r * r
        depth = np.where(inside, depth - 0.25, depth)
        image[inside] = rng.uniform(40, 240, 3)
    return image.astype(np.uint8), depth.astype(np.float32)


def probe(rng: np.random.Generator) -> ProbeResult:
    values = {
        ("mean depth image", "floor", None): 0.161,
        ("random init", "floor", 0): 0.124,
        ("random init", "floor", 2): 0.118,
        ("base", "student", 0): 0.092,
        ("base", "student", 2): 0.081,
        ("SF", "student", 0): 0.09,
        ("SF", "student", 2): 0.064,
        ("teacher", "ceiling", None): 0.047,
    }
    metrics = [
        ProbeMetrics(name, kind, layer, camera, v * f, 0.004, 2 * v * f, 1 - 1.4 * v * f, 1.5 * v * f)
        for (name, kind, layer), v in values.items()
        for camera, f in (("corner", 0.8), ("wrist", 1.2), ("all", 1.0))
    ]
    panels = []
    for number in range(3):
        image, depth = scene(rng)
        truth = depth[::2, ::2]
        predictions = {
            name: truth * np.exp(v * rng.standard_normal((6, 6)).repeat(8, 0).repeat(8, 1)).astype(np.float32)
            for (name, _, _), v in values.items()
        }
        panels.append(DepthPanel(100 * number, "corner", image, truth, predictions))
    return ProbeResult(tuple(metrics), tuple(panels), 1500, 500, 25, 3.0, 21.5)


def sample_report(folder: Path) -> ReportData:
    rng = np.random.default_rng(0)
    described = {arm: parse_arm(f"{arm}={name}") for arm, name in zip(RATES, ARM_NAMES, strict=True)}
    scenes = [scene(rng)[0] for _ in range(3)]
    small = torch.from_numpy(np.stack([s[8::16, 8::16] for s in scenes])).double()
    mixed = {
        name: small @ torch.from_numpy(rng.standard_normal((3, 8))) + noise * torch.randn(3, 6, 6, 8)
        for name, noise in (("base tokens", 60.0), ("SF tokens", 15.0), ("teacher", 0.0))
    }
    frames = [np.roll(scenes[0], 3 * i, axis=1) for i in range(30)]
    video = write_video(frames, folder / "clip.mp4", fps=15)
    return ReportData(
        title="Spatial Forcing: quickstart",
        subtitle="Meta-World, 5 tasks, 20 demonstrations each · 21 November 2026",
        sections=(
            comparison_section(
                compared(),
                described,
                ("Five simulated tasks with scripted demonstrations; nothing is said about real robots.",),
            ),
            training_section({arm: [losses(arm, rng)] for arm in RATES}),
            probe_section(
                probe(rng),
                names={
                    "mean depth image": "mean image (floor)",
                    "base": "base",
                    "SF": "SF",
                    "teacher": "teacher",
                },
            ),
            Section(
                "features",
                "Features",
                pictures=pca_rows(
                    {f"scene {i}": s for i, s in enumerate(scenes)}, pca_pictures(mixed, "teacher")
                ),
            ),
            Section(
                "videos",
                "Videos",
                videos=tuple(
                    VideoRow(task, tuple(Media.file(video, f"{arm}: success") for arm in RATES))
                    for task in TASKS[:2]
                ),
            ),
        ),
        config={
            "SF": {"alpha": 0.5, "pairs": [[2, -1]], "steps": 1500},
            "base": {"alpha": 0.0, "steps": 1500},
        },
        environment={
            "python": "3.11",
            "packages": {"torch": "2.13.0", "numpy": "2.4.6"},
            "git": "0123abc (clean)",
        },
        commands=("spatial-forcing quickstart --seed 0", "spatial-forcing report runs/quickstart"),
    )
