"""The training loop: one file, one loop, the same command for one process or many.

    spatial-forcing train --preset nano-metaworld ...                       one process
    accelerate launch -m spatial_forcing.cli train --preset ...             several (or torchrun)
    ... --shard                                                             parameters in shards (FSDP2)

Accelerate prepares the `SpatialForcing` module and nothing else calls the student's loss, so both losses
pass its gradient synchronisation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, nullcontext
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    GradientAccumulationPlugin,
    broadcast_object_list,
    gather_object,
    send_to_device,
    set_seed,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from spatial_forcing.errors import CheckpointError, ConfigError, EnvironmentSetupError
from spatial_forcing.forcing import SpatialForcing, gradient_audit
from spatial_forcing.forcing.distributed import gather
from spatial_forcing.protocols import Batch
from spatial_forcing.storage import replace_file, require_disk
from spatial_forcing.students.base import POLICY
from spatial_forcing.training import checkpoint as files
from spatial_forcing.training.card import card_of
from spatial_forcing.training.checkpoint import Checkpoint, TrainState
from spatial_forcing.training.config import TrainConfig
from spatial_forcing.training.interrupt import StopRequest
from spatial_forcing.training.memory import estimate_memory
from spatial_forcing.training.metrics import Meter, MetricLog, Row, read_metrics
from spatial_forcing.training.optim import lr_factor, make_optimizer, make_scheduler
from spatial_forcing.training.parts import Parts, build_parts
from spatial_forcing.training.placement import Placement, Replicated, Sharded
from spatial_forcing.training.progress import TrainingProgress
from spatial_forcing.training.run import (
    CHECKPOINTS,
    METRICS,
    RunResult,
    export_policy,
    open_run,
    peak_memory,
    read_result,
    refuse_changes,
    write_result,
)
from spatial_forcing.training.trackers import Trackers

OnCheckpoint = Callable[[Checkpoint], None]
AUDIT_SAMPLES = 8
"""Samples of a batch that a gradient audit uses."""
WAIT = timedelta(hours=6)
"""How long other processes wait while the first one runs `on_checkpoint`."""


def train(
    config: TrainConfig, *, parts: Parts | None = None, on_checkpoint: OnCheckpoint | None = None
) -> RunResult:
    """Train as configured, or go on where an earlier call with this configuration stopped.

    Args:
        config: what to train; a finished run of the same configuration is not repeated.
        parts: student, teacher and batches, where they do not come from the configuration.
        on_checkpoint: called on the main process after every `callback_every` steps, with the complete
            checkpoint (`.policy` is the student's folder). It may be called again for the same step after
            an interruption, and cannot disturb the training's random streams.

    Raises:
        ConfigError: see `TrainConfig`; or `config.output` holds a run with another configuration.
        DivergedError: NaN or infinite loss or gradient; the last complete checkpoint is kept.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when the checkpoint is saved.
    """
    config.check_paths(data=parts is None)
    state = PartialState(cpu=config.cpu, timeout=WAIT)
    open_run(config, writes=state.is_main_process)
    state.wait_for_everyone()
    finished = read_result(config.output)
    if finished is not None and finished.steps >= config.steps:  # else the run is extended
        return finished
    if parts is None:
        set_seed(config.seed)
        parts = build_parts(config)
    return Trainer(config, parts).run(on_checkpoint)


class Trainer:
    """The state of a run and its steps. `train` is the entry point."""

    def __init__(self, config: TrainConfig, parts: Parts) -> None:
        self.config, self.batches = config, parts.batches
        self.root = config.output / CHECKPOINTS
        # Arms of a comparison run one after the other in one process and may differ in precision.
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            cpu=config.cpu,
            # The loop below accumulates itself: its batches come from no DataLoader.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
        kind = self.accelerator.distributed_type.value
        if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
            raise ConfigError(
                f"distributed type {kind} is not supported; start with `accelerate launch --multi_gpu` or "
                "torchrun. `shard` of the configuration puts student and projector under FSDP."
            )
        if config.shard and kind == "NO":
            raise ConfigError("shard is for several processes; start with torchrun or `accelerate launch`.")
        set_seed(config.seed)  # of the projector, whatever was drawn before
        self.forcing = SpatialForcing(parts.student, parts.teacher, config.forcing)
        self.card = card_of(config, parts.teacher if self.forcing.active else None)
        self._say_memory(parts.student)  # while all is still on the CPU
        self.meter = Meter(lambda tensor: self.accelerator.reduce(tensor, "mean"), gather_object)
        self.step = 0
        self.seconds = 0.0
        self.lr = 0.0

    @property
    def _main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def _policy(self) -> Any:
        """The bare student, which can `save_pretrained` and `from_pretrained`."""
        return self.forcing.policy

    def run(self, on_checkpoint: OnCheckpoint | None = None) -> RunResult:
        """Resume, train to the last step, export."""
        shown = self.config.progress and self._main
        with StopRequest() as stop:
            # Rank r draws its own noise; batches do not depend on these streams at all.
            set_seed(self.config.seed + self.accelerator.process_index)
            found = self._find()
            if found is not None:
                self._load_weights(found)
            self._prepare()
            if found is not None:
                self._load_state(found)
            title = f"train {self.config.output.name}"
            self.log = MetricLog(self.config.output / METRICS, self.step) if self._main else None
            with (
                TrainingProgress(title, self.step, self.config.steps, shown) as bar,
                Trackers(self.config, self.step, enabled=self._main) as self.trackers,
            ):
                self.bar = bar
                if found is not None:
                    bar.say(f"resuming {self.config.output} after step {self.step} of {self.config.steps}")
                    self._restate_schedule(files.read_state(found.folder).config["steps"])
                    self._call(on_checkpoint, found, stop)
                self._loop(stop, on_checkpoint)
        return self._finish()

    def _prepare(self) -> None:
        """Place the weights, and make what belongs to parameters where they are."""
        config, accelerator = self.config, self.accelerator
        self.forcing.train()
        self.placement: Placement
        if config.shard:
            self.placement = Sharded(self.forcing.to(accelerator.device), self._main)
            self.model, optimizer = self.forcing, make_optimizer(self.forcing, config.optim)
            self.optimizer = accelerator.prepare(optimizer)
        else:
            self.placement = Replicated(self.forcing)
            optimizer = make_optimizer(self.forcing, config.optim)
            self.model, self.optimizer = accelerator.prepare(self.forcing, optimizer)
        self.scheduler = make_scheduler(optimizer, config.optim, config.steps)
        self.parameters = [p for p in self.forcing.parameters() if p.requires_grad]

    def _say_memory(self, student: nn.Module) -> None:
        config, processes = self.config, self.accelerator.num_processes
        samples = config.batch_size // config.gradient_accumulation // processes
        shards = processes if config.shard else 1
        estimate = estimate_memory(student, samples, self.forcing.projector, shards)
        if estimate.activations is not None:  # a student that is large enough to be asked
            self.accelerator.print(estimate)

    # ---- one step

    def _loop(self, stop: StopRequest, on_checkpoint: OnCheckpoint | None) -> None:
        accumulate, steps = self.config.gradient_accumulation, self.config.steps
        stream = self._stream(self.step * accumulate, steps * accumulate)
        with closing(stream):
            while self.step < steps:
                started = time.perf_counter()
                self._train_step(list(islice(stream, accumulate)))
                self.step += 1
                saves = self.step % self.config.checkpoint_interval == 0 or self.step == steps
                interrupted = self._read_metrics(saves, stop.asked)
                self.seconds += time.perf_counter() - started
                if saves or interrupted:
                    saved = self._save()
                    if interrupted:
                        self._say_interrupted()
                        raise KeyboardInterrupt
                    self._call(on_checkpoint, saved, stop)

    def _stream(self, start: int, end: int) -> Any:
        """Micro-batches `start` to `end` on the device."""
        batches = (
            self.batches.iterate(start, end)
            if self.config.prefetch
            else (self.batches.batch(index) for index in range(start, end))
        )
        return self._on_device(batches)

    def _on_device(self, batches: Generator[Batch]) -> Iterator[Batch]:
        device = self.accelerator.device
        with closing(batches):  # ends a prefetching thread at once
            for batch in batches:
                yield batch if device.type == "cpu" else send_to_device(batch, device, non_blocking=True)

    def _train_step(self, window: list[Batch]) -> None:
        self.forcing.set_progress(self.step, self.config.steps)
        if len(window) > 1:  # a single batch finds its denominator itself, and views are made only once
            self.forcing.begin_accumulation(window)
        losses: list[Tensor] = []
        metrics: list[Mapping[str, Tensor]] = []
        for number, batch in enumerate(window, 1):
            # Gradients are exchanged once, after the window's last micro-batch.
            with nullcontext() if number == len(window) else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    loss, found = self.model(batch)
                self.accelerator.backward(loss / len(window))
            losses.append(loss)
            metrics.append(found)
        self.audited = window[0]
        norm = self._clip()
        self.lr = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.meter.add(self.step, losses, metrics, norm, [batch.get("index") for batch in window])

    def _clip(self) -> Tensor:
        """Clip student and projector together; the norm before clipping."""
        limit = self.config.optim.clip_norm
        if limit is not None:
            return gather(cast(Tensor, self.accelerator.clip_grad_norm_(self.parameters, limit)))
        return gather(nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))

    def _read_metrics(self, saves: bool, asked: bool) -> bool:
        """Synchronise with device and ranks where it is due; whether training should stop."""
        accelerator, due = self.accelerator, self.step % self.config.log_every == 0
        alone = accelerator.num_processes == 1
        # On a CPU reading a number costs nothing; elsewhere the device is only waited for when it must be.
        if not (due or saves or (alone and (asked or accelerator.device.type == "cpu"))):
            self.bar.update(self.step)
            return False
        interrupted = self.meter.sync(asked) and self.step < self.config.steps
        self.bar.update(self.step, self.meter.rows[-1])
        if due or self.step == self.config.steps:
            self._write_line()
        return interrupted

    def _write_line(self) -> None:
        line: Row = {"step": self.step, **self.meter.line(), "lr": self.lr, "seconds": round(self.seconds, 3)}
        if self.log is not None:
            line |= self._audit()
            self.log.write(line)
            self.trackers.write(line, self.step)

    def _audit(self) -> Row:
        """The gradient audit where it is due, on a part of the last batch: two more backward passes."""
        every = self.config.audit_every
        if every is None or self.step % every or not self.forcing.active or self.forcing.alpha == 0:
            return {}
        few = {key: value[:AUDIT_SAMPLES] for key, value in self.audited.items()}
        audit = gradient_audit(self.forcing, few)
        return {f"audit/{k if '/' in k else k + '/all'}": v for k, v in audit.items() if math.isfinite(v)}

    # ---- checkpoints

    def _save(self) -> Checkpoint:
        """Write the checkpoint of the present step, then remove the ones beyond `keep`."""
        try:
            if self._main:
                files.begin(self.root, self.step)
            self.accelerator.wait_for_everyone()
            folder = files.partial_folder(self.root, self.step)
            files.save_tensors(folder / self._rng_file, files.rng_state())
            beside = self.forcing.projector_state_dict()
            moments = self.placement.optimizer_state(self._bare_optimizer)
            with self.placement.policy() as policy:
                if self._main:
                    self._write_shared(folder, policy, beside, moments)
            self.accelerator.wait_for_everyone()
            if self._main:
                files.commit(self.root, self.step)
                files.prune(self.root, self.config.keep)
            self.accelerator.wait_for_everyone()
        except (OSError, SafetensorError) as error:
            raise EnvironmentSetupError(
                f"the checkpoint of step {self.step} could not be written below {self.root} ({error}). "
                "Earlier checkpoints are intact: free some disk space and run the same command to resume."
            ) from error
        return Checkpoint(self.step, self.root / files.checkpoint_name(self.step))

    @property
    def _rng_file(self) -> str:
        return f"rng-{self.accelerator.process_index}.pt"

    @property
    def _bare_optimizer(self) -> Optimizer:
        """The optimizer without Accelerate's wrapper."""
        return cast(Optimizer, self.optimizer.optimizer)

    def _write_shared(
        self, folder: Path, policy: Any, beside: Mapping[str, Tensor], moments: Mapping[str, Any]
    ) -> None:
        policy.save_pretrained(folder / POLICY)
        if beside:
            content = {name: value.detach().contiguous().cpu() for name, value in beside.items()}
            replace_file(folder / files.PROJECTOR, lambda path: save_file(content, path))
        states = {"optimizer": moments, "scheduler": self.scheduler.state_dict()}
        files.save_tensors(folder / files.OPTIMIZER, states)
        processes, plain = self.accelerator.num_processes, self.config.to_file()
        files.write_state(folder, TrainState(self.step, processes, self.seconds, plain, self.meter.rows))

    def _find(self) -> Checkpoint | None:
        """The newest complete checkpoint, if there is one, of this configuration and as many processes."""
        newest: list[Checkpoint | None] = [None]
        if self._main:  # alone reads every byte of it; the others compare sizes
            self.root.mkdir(parents=True, exist_ok=True)
            newest[0], faults = files.latest_checkpoint(self.root)
            for fault in faults:
                self.accelerator.print(fault)
            files.set_aside_newer(self.root, newest[0].step if newest[0] else -1)
            require_disk(
                self.root, self._checkpoint_bytes(), "saving checkpoints", "lower `keep` or change `output`"
            )
        broadcast_object_list(newest)
        (found,) = newest
        if found is None:
            return None
        if not self._main and (fault_here := files.damage(found.folder, contents=False)):
            raise CheckpointError(
                f"process {self.accelerator.process_index} does not see {found.folder} as the first process "
                f"does ({fault_here}); put `output` on a file system that all processes share."
            )
        state = files.read_state(found.folder)
        refuse_changes(state.config, self.config, found.folder)
        if state.processes != self.accelerator.num_processes:
            raise ConfigError(
                f"{found.folder} was written by {state.processes} processes and this run has "
                f"{self.accelerator.num_processes}; resume with as many, or choose another output."
            )
        return found

    def _load_weights(self, found: Checkpoint) -> None:
        """Before they are placed: each process reads all of them."""
        self._policy.restore(found.policy)
        beside = found.folder / files.PROJECTOR
        self.forcing.load_projector_state_dict(load_file(beside) if beside.exists() else {})

    def _load_state(self, found: Checkpoint) -> None:
        """Load the rest of the checkpoint: optimizer, scheduler, random states."""
        state = files.read_state(found.folder)
        self.step, self.seconds, self.meter.rows = state.step, state.seconds, list(state.rows)
        states = files.load_tensors(found.folder / files.OPTIMIZER)
        try:
            self.placement.load_optimizer(self._bare_optimizer, states["optimizer"])
            self.scheduler.load_state_dict(states["scheduler"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{found.folder / files.OPTIMIZER} does not fit these parameters ({error}); "
                "resume with the student and version it was written by."
            ) from error
        files.set_rng_state(files.load_tensors(found.folder / self._rng_file))

    def _restate_schedule(self, before: int) -> None:
        """After a checkpoint of a run of `before` steps: go on with the present schedule, and say so."""
        if before == self.config.steps:
            return
        optim = self.config.optim
        old, new = (optim.lr * lr_factor(optim, self.step, steps) for steps in (before, self.config.steps))
        self.scheduler = make_scheduler(self._bare_optimizer, optim, self.config.steps, done=self.step)
        self.bar.say(
            f"extended from {before} to {self.config.steps} steps: the {optim.decay} schedule is that of "
            f"{self.config.steps} steps, so the learning rate of the next step is {new:.3g} instead of "
            f"{old:.3g}"
        )

    def _checkpoint_bytes(self) -> int:
        """Upper estimate of what the run will write: weights and two moments, for each kept checkpoint."""
        beside = self.forcing.projector_state_dict().values()
        weights = self._policy.checkpoint_bytes + sum(t.numel() * t.element_size() for t in beside)
        moments = 2 * sum(p.numel() * p.element_size() for p in self.forcing.parameters() if p.requires_grad)
        there = sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())
        # One more than is kept lies there while it is written; the exported policy comes on top.
        return (self.config.keep + 1) * (weights + moments) + weights - there

    # ---- around the loop

    def _call(self, on_checkpoint: OnCheckpoint | None, saved: Checkpoint, stop: StopRequest) -> None:
        every = self.config.callback_every
        if saved.step == self.config.steps or every is None or saved.step % every == 0:
            if on_checkpoint is not None and self._main:
                streams = files.rng_state()
                # All is saved, so Ctrl-C may break off a long evaluation.
                with stop.released():
                    on_checkpoint(saved)
                files.set_rng_state(streams)
            self.accelerator.wait_for_everyone()

    def _say_interrupted(self) -> None:
        if self._main:
            self.bar.say(
                f"interrupted after step {self.step} of {self.config.steps}; saved in {self.root}. "
                "Run the same command to resume."
            )

    def _finish(self) -> RunResult:
        """Export the bare policy and write result.json, the mark of a finished run."""
        metrics = read_metrics(self.config.output / METRICS)
        result = RunResult(self.config.output, self.step, metrics[-1], self.seconds, peak_memory())
        with self.placement.policy() as policy:
            if self._main:
                export_policy(policy, self.config.output / POLICY, self.card)
                write_result(result)
        self.accelerator.wait_for_everyone()
        return result
