"""Pretraining of `vggt-nano`: render scenes, train depth, points and cameras, evaluate on held-out tasks.

Every part resumes: scenes by shard, training by an atomically replaced checkpoint. A batch depends
only on (seed, step), so a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from spatial_forcing.errors import CheckpointError, DataError
from spatial_forcing.nano_teacher.evaluate import evaluate_teacher, metrics_table
from spatial_forcing.nano_teacher.losses import make_targets, teacher_loss
from spatial_forcing.nano_teacher.optim import make_optimizers
from spatial_forcing.nano_teacher.recipe import PretrainConfig
from spatial_forcing.nano_teacher.scenes import (
    SHARD,
    SceneBatch,
    SceneDataset,
    SceneSpec,
    missing_shards,
    render_scenes,
)
from spatial_forcing.progress import progress_bar
from spatial_forcing.storage import disk_full_explained, replace_file, write_json
from spatial_forcing.teachers.vggt.loading import find_local, load_vggt, save_vggt
from spatial_forcing.teachers.vggt.model import VGGT

LICENCE = "Apache-2.0"


def pretrain(config: PretrainConfig) -> Path:
    """Run (or continue) everything in `config.out`; prints metrics and where the results are.

    Returns:
        The folder of the weights, in the layout that `load_teacher` reads.

    Raises:
        CheckpointError: the folder holds a run with other settings.
        DataError: the loss is not finite, or the folder holds other scenes.
        EnvironmentSetupError: no disk space, no GL library, or no Meta-World.
    """
    console = Console()
    folder = config.scenes or config.out / "scenes"
    specs = {"train": config.train_spec, "test": config.test_spec, "policy_test": config.policy_test_spec}
    if config.policy_share > 0:
        specs["near"] = config.policy_spec
    with progress_bar() as progress:
        for name, spec in specs.items():
            render_with_progress(folder / name, spec, progress, f"{name} scenes")
        run = PretrainRun(config)
        task = progress.add_task("training", total=config.steps, completed=run.step)
        near = SceneDataset(folder / "near") if config.policy_share > 0 else None
        for loss in run.train(SceneDataset(folder / "train"), near):
            progress.update(task, completed=run.step, description=f"training (loss {loss:.3f})")
        progress.update(task, total=run.step)
    metrics: dict[str, dict[str, float]] = {
        "random cameras": evaluate_teacher(run.average, SceneDataset(folder / "test")),
        "policy cameras": evaluate_teacher(run.average, SceneDataset(folder / "policy_test")),
    }
    facts = {
        "steps": run.step,
        "train_minutes": run.seconds / 60,
        "views_seen": run.step * config.views_per_step,
    }
    write_json(config.out / "test_metrics.json", {**metrics, "run": facts})
    for title, values in metrics.items():
        console.print(metrics_table(values, title))
    console.print(f"weights: {run.weights}\nmetrics: {config.out / 'test_metrics.json'}")
    return run.weights


def render_with_progress(folder: Path, spec: SceneSpec, progress: Progress, title: str) -> None:
    """Render what is missing of `spec`, after saying how much disk it takes."""
    missing = len(missing_shards(folder, spec))
    if not missing:
        return
    size = spec.bytes * missing / spec.shards / 1e9
    task = progress.add_task(f"rendering {title} ({size:.1f} GB)", total=spec.shards * SHARD)
    progress.advance(task, (spec.shards - missing) * SHARD)
    for _ in render_scenes(folder, spec):
        progress.advance(task, SHARD)


class PretrainRun:
    """The training state of one folder, restored from its checkpoint if there is one.

    A class that overrides `build` and `export` trains another architecture in the same way.

    Attributes:
        model, average: the network and its exponential moving average.
        step: steps done.
        seconds: training time so far, over all resumptions.
    """

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.out = config.out
        self.weights = config.out / "weights"
        torch.set_num_threads(config.threads)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = self.build()
        if config.init_from is not None:
            self._start_from(config.init_from)
        self.device = torch.device("cuda" if torch.cuda.is_available() and not config.cpu else "cpu")
        self.model.to(self.device)
        if config.refine_depth:
            self.model.requires_grad_(False)
            cast(nn.Module, self.model.depth_head).requires_grad_(True)
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizers = make_optimizers(
            self.model, config.learning_rate, config.muon_learning_rate, config.weight_decay
        )
        self.step = 0
        self.seconds = 0.0
        self._restore()

    def build(self) -> nn.Module:
        """The network at step 0. It takes (images (B, V, 3, H, W) in [0, 1], names of heads) and returns what
        `VGGT.forward` does.
        """
        return VGGT(self.config.model)

    def export(self) -> None:
        """Write the averaged weights to `weights`, in the layout that `load_teacher` reads."""
        save_vggt(cast(VGGT, self.average), self.weights, licence=LICENCE, dtype=torch.float16)

    @property
    def finished(self) -> bool:
        """Whether the steps or the minutes are used up."""
        return self.progress >= 1

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end: the share of the steps or of the minutes, whichever is more."""
        by_steps = self.step / self.config.steps
        return (
            by_steps
            if self.config.minutes is None
            else max(by_steps, self.seconds / 60 / self.config.minutes)
        )

    def train(self, scenes: SceneDataset, near: SceneDataset | None = None) -> Iterator[float]:
        """Train to the end; yields the loss every `log_every` steps. Saves as it goes and at the end.

        Args:
            scenes: cameras anywhere.
            near: cameras near a policy's, for `policy_share` of the batches.
        """
        saved_at = self.seconds
        losses: dict[str, Tensor] = {}
        while not self.finished:
            started = time.monotonic()
            parts = self._step(scenes, near)
            self.seconds += time.monotonic() - started
            losses |= {k: v if k not in losses else losses[k].lerp(v, 0.05) for k, v in parts.items()}
            if self.step % self.config.log_every == 0:
                self._log(losses)
                yield float(parts["depth"])
            if self.seconds - saved_at > 60 * self.config.checkpoint_minutes:
                self.save()
                saved_at = self.seconds
        self.save()

    def save(self) -> None:
        """Write the checkpoint and the averaged weights, each under a temporary name that is then renamed."""
        state = {
            "config": self.config.comparable(),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        with disk_full_explained(self.out, "the checkpoint before this one is kept"):
            replace_file(self.out / "checkpoint.pt", functools.partial(torch.save, state))
        self.export()

    def _start_from(self, folder: Path) -> None:
        source = find_local(folder)
        if source.config != self.config.model:
            raise CheckpointError(
                f"the weights in {folder} are of another architecture than the model to train; "
                "set the model's sizes to those in its config.json, or train from scratch."
            )
        self.model.load_state_dict(load_vggt(source).state_dict())

    def _restore(self) -> None:
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True, map_location=self.device)
        wanted = self.config.comparable()
        # A setting that is newer than the checkpoint had its default there.
        there = PretrainConfig().comparable() | state["config"]
        different = sorted(k for k in wanted if there[k] != wanted[k])
        if different:
            raise CheckpointError(
                f"{path} was trained with other {', '.join(different)} "
                f"({ {k: there[k] for k in different} }); use these or another --out."
            )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            peaks = [group["peak"] for group in optimizer.param_groups]
            optimizer.load_state_dict(values)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["peak"] = peak  # as configured now
        self.step, self.seconds = state["step"], state["seconds"]

    def _step(self, scenes: SceneDataset, near: SceneDataset | None) -> dict[str, Tensor]:
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        if near is not None and float(torch.rand((), generator=generator)) < config.policy_share:
            scenes = near
        batch, indices = _draw(scenes, config.views_per_step, generator)
        batch = batch.to(self.device)
        warmup = min(1.0, (self.step + 1) / config.warmup_steps)
        decay = 0.5 * (1 + math.cos(math.pi * min(self.progress, 1)))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * warmup * decay
        output = self.model(augment(batch.images, generator), self._heads())
        loss, parts = teacher_loss(
            output,
            make_targets(batch, tuple(output["depth"].shape[2:4])),
            relative=config.refine_depth,
        )
        self.model.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):  # before the weights are touched
            raise DataError(
                f"the loss is {float(loss.detach())} and its gradient's norm {float(norm)} at step "
                f"{self.step} (scenes {indices.tolist()} of {scenes.folder}); lower learning_rate or "
                "muon_learning_rate and run again: it continues from the last checkpoint."
            )
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        # A young average follows quickly, else it would remember the random start.
        keep = min(config.ema_decay, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - keep)
        return parts

    def _heads(self) -> tuple[str, ...]:
        if self.config.refine_depth:
            return ("depth",)
        return (
            ("camera", "depth", "point") if self.step % self.config.point_every == 0 else ("camera", "depth")
        )

    def _log(self, losses: dict[str, Tensor]) -> None:
        row: dict[str, Any] = {"step": self.step, "seconds": round(self.seconds, 1)}
        row |= {"lr": self.optimizers[0].param_groups[0]["lr"]} | {
            k: round(float(v), 5) for k, v in losses.items()
        }
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def _draw(scenes: SceneDataset, views: int, generator: torch.Generator) -> tuple[SceneBatch, Tensor]:
    """Random scenes with 1, 2 or 3 random views in random order (any view may be the reference)."""
    count = int(torch.randint(1, 4, (), generator=generator))
    indices = torch.randint(len(scenes), (views // count,), generator=generator)
    order = torch.rand(len(indices), 3, generator=generator).argsort(dim=1)
    return scenes.batch(indices).select(order[:, :count]), indices


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 -> float in [0, 1] with random brightness, contrast and tint of each scene."""
    scenes = len(images)
    gain = 1 + 0.15 * torch.randn(scenes, 1, 1, 1, 1, generator=generator)
    tint = 1 + 0.05 * torch.randn(scenes, 1, 3, 1, 1, generator=generator)
    shift = 0.05 * torch.randn(scenes, 1, 1, 1, 1, generator=generator)
    gain, tint, shift = (change.to(images.device) for change in (gain, tint, shift))
    return (images.float() / 255 * gain * tint + shift).clamp(0, 1)
