"""A comparison from configuration to page: caches, training, evaluation, statistics. All of it resumes."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from spatial_forcing.analysis.features import Frames
from spatial_forcing.data import Dataset, DecodedStore
from spatial_forcing.envs import make_env
from spatial_forcing.envs.base import suite_of
from spatial_forcing.errors import ConfigError
from spatial_forcing.evaluation import evaluate, read_results
from spatial_forcing.evaluation.open_loop import open_loop_errors
from spatial_forcing.evaluation.paired import outcomes
from spatial_forcing.evaluation.results import EpisodeResult, remarks
from spatial_forcing.evaluation.workers import MakeEnv, WorkerPool
from spatial_forcing.experiments.audits import AuditRecord, AuditRow, audit_csv, audit_rows
from spatial_forcing.experiments.checks import CONFIG, EPISODES, check_folder, check_runs, untrained_tasks
from spatial_forcing.experiments.config import (
    Cell,
    CompareConfig,
    cells,
    evaluated_steps,
    teacher_layers,
    train_config,
)
from spatial_forcing.experiments.statistics import (
    Comparison,
    RunRecord,
    analyse,
    analyse_errors,
    without_rollouts,
)
from spatial_forcing.experiments.train import train_arms
from spatial_forcing.protocols import Student
from spatial_forcing.storage import replace_file, write_json
from spatial_forcing.students import FusionVLA, NanoConfig, load_student
from spatial_forcing.students.base import POLICY
from spatial_forcing.teachers import load_teacher
from spatial_forcing.teachers.cache.build import build_cache
from spatial_forcing.teachers.cache.source import dataset_source
from spatial_forcing.training import TrainConfig, read_metrics
from spatial_forcing.training.checkpoint import checkpoint_name
from spatial_forcing.training.parts import hold_out, open_dataset, select_episodes
from spatial_forcing.training.run import CHECKPOINTS, open_run, read_result

RESULT = "comparison.json"
SUCCESS_TABLE, ERROR_TABLE, AUDIT_TABLE = "comparison.csv", "held-out.csv", "audit.csv"
ACT_TIME, ERRORS = "act_ms.json", "held_out_errors.json"
ACT_CALLS = 12
CACHE_BATCH = 16


@dataclass(frozen=True)
class Run:
    """A cell of the comparison and how it is trained; its episodes lie in the training's own folder."""

    cell: Cell
    train: TrainConfig

    @property
    def episodes(self) -> Path:
        """Evaluated episodes of all checkpoints."""
        return self.train.output / EPISODES

    def policy(self, step: int) -> Path:
        """Folder of the policy after `step` steps."""
        return self.train.output / CHECKPOINTS / checkpoint_name(step) / POLICY


def compare(config: CompareConfig, console: Console | None = None, make: MakeEnv = make_env) -> Comparison:
    """Train, evaluate and compare; the same call resumes an earlier one.

    More arms, seeds, parts or controls may be added later; finished runs and episodes are not repeated.

    Args:
        config: what is compared.
        console: where progress is printed.
        make: environment factory.

    Raises:
        ConfigError: a setting is wrong, or `config.output` holds a comparison with other settings.
        ArmFailed: a training process failed; the message holds the end of its log.
    """
    console = console or Console()
    check_folder(config)
    dataset = open_dataset(config)
    runs = prepare(config, dataset, make)
    for run in runs:
        finished(run.train)  # refuses a folder that holds another run
    write_json(config.output / CONFIG, config.to_file())  # not before: a failed start claims no folder
    foreign = untrained_tasks(config, dataset)
    for remark in foreign:
        console.print(f"[yellow]{remark}[/]")
    console.print(
        f"{len(runs)} runs: {len(config.arms)} arms x {len(config.fractions)} parts of the data x "
        f"{len(config.seeds)} training seeds"
    )
    # Seeds are finished one after the other (several at a time where there are cores), so that an
    # interrupted comparison still compares like with like.
    simulators = _simulators(config, runs[0], make) if config.tasks else nullcontext()
    with simulators as pool:
        for batch in batches(config, runs):
            if waiting := {r.cell.name: r.train for r in batch if not finished(r.train)}:
                torch.cuda.empty_cache()  # what policies and teachers held here, the arms may need
                train_arms(waiting, parallel=config.parallel, console=console)
            examine(config, batch, pool)
    found = read_comparison(config, runs)
    found = replace(found, audits=_audits(runs), remarks=(*foreign, *found.remarks))
    written = write(found, config.output)
    for table in found.tables():
        console.print(table)
    for sentence in found.sentences():
        console.print(f"- {sentence}", highlight=False)
    console.print(f"written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
    return found


def reread(config: CompareConfig) -> Comparison:
    """The comparison of what lies in `config.output`: nothing is trained, evaluated or written.

    Raises:
        ConfigError: the folder holds no result of a comparison.
    """
    result = config.output / RESULT
    if not result.exists():
        raise ConfigError(f"{result} does not exist; the comparison is not finished: run it again.")
    runs = [Run(cell, train_config(config, cell)) for cell in cells(config)]
    remarks = tuple(json.loads(result.read_text())["remarks"])
    return replace(read_comparison(config, runs), audits=_audits(runs), remarks=remarks)


def prepare(config: CompareConfig, dataset: Dataset, make: MakeEnv = make_env) -> list[Run]:
    """Check every run, then build the caches and initial students that they need."""
    plan = cells(config)
    kept = hold_out(dataset, config.held_out)[0] if config.held_out else None
    # Wrong settings stop here, before any work.
    drafts = [train_config(config, cell, episodes=kept) for cell in plan]
    check_runs(config, dataset, drafts, make)
    caches = {
        teacher: _cache(config, dataset, teacher, layers, drafts)
        for teacher, layers in teacher_layers(drafts).items()
    }
    return [
        Run(cell, train_config(config, cell, caches, _initial(config, cell, draft, dataset), kept))
        for cell, draft in zip(plan, drafts, strict=True)
    ]


def _cache(
    config: CompareConfig,
    dataset: Dataset,
    teacher: str,
    layers: Sequence[int],
    runs: Sequence[TrainConfig],
) -> Path:
    """The cache that the runs of a teacher share: of the episodes that one of them is trained on."""
    run = runs[0]
    episodes = sorted({number for each in runs for number in select_episodes(dataset, each)})
    folder = config.output / "features" / re.sub(r"[^\w.-]", "-", teacher.replace("/", "--"))
    cameras = run.student.cameras
    images = DecodedStore.build(dataset, cameras, episodes=episodes).images
    source = dataset_source(dataset, cameras, images, episodes)
    loaded = load_teacher(teacher, device=_device(run), dataset=dataset)
    build_cache(loaded, source, folder, layers=layers, cameras=cameras, batch_size=CACHE_BATCH)
    return folder


def _initial(config: CompareConfig, cell: Cell, draft: TrainConfig, dataset: Dataset) -> Path | None:
    """The initial student of a fused arm: the preset's of the same seed, with the teacher in its input."""
    if not cell.arm.fused:
        return None
    folder = config.output / "initial" / cell.name
    if not (folder / "config.json").exists():
        assert isinstance(draft.student, NanoConfig)  # see check_runs
        statistics = dataset.statistics(select_episodes(dataset, draft))
        student = FusionVLA.create(draft.student, statistics, seed=cell.seed, teacher=config.target)
        student.save_pretrained(folder)
    return folder


def batches(config: CompareConfig, runs: Sequence[Run]) -> Iterator[Sequence[Run]]:
    """Runs that are trained, then evaluated, together: whole seeds, as few as keep all processes busy."""
    each = len(config.arms) * len(config.fractions)
    size = each * max(1, -(-config.parallel // each))
    return (runs[i : i + size] for i in range(0, len(runs), size))


def finished(run: TrainConfig) -> bool:
    """Whether this very run is trained; raises `ConfigError` when its folder holds another one."""
    open_run(run, writes=False)
    return read_result(run.output) is not None


def _simulators(config: CompareConfig, run: Run, make: MakeEnv) -> WorkerPool:
    """As many simulators as training processes; on a machine with GPUs one for each core."""
    workers = max(config.parallel, os.cpu_count() or 1) if torch.cuda.is_available() else config.parallel
    fresh = make is make_env and any(suite_of(task).fresh for task in config.tasks)
    env = environment_settings(config, run)
    return WorkerPool(workers, make, env, slots=1 if fresh else 2, fresh=fresh)


def environment_settings(config: CompareConfig, run: Run) -> dict[str, Any]:
    """The settings that `make_env` gets."""
    student = run.train.student
    env: dict[str, Any] = {"cameras": student.cameras, "image_size": config.image_size or student.image_size}
    if config.horizon is not None:
        env["horizon"] = config.horizon
    return env


def examine(config: CompareConfig, runs: Sequence[Run], pool: WorkerPool | None) -> None:
    """Evaluate every checkpoint of these runs on the same episodes, and time one call of each policy.

    Args:
        config: what is compared.
        runs: trained.
        pool: simulators; None: held-out errors alone.
    """
    with one_thread():  # the simulators need the cores
        for run in runs:
            for step in evaluated_steps(run.train.steps, config.checkpoints):
                if pool is not None:
                    _evaluate(config, run, step, pool)
                if config.held_out:
                    _measure_errors(config, run, step)
            _time_policy(run)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes with one thread here; the number from before is restored."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _evaluate(config: CompareConfig, run: Run, step: int, pool: WorkerPool) -> None:
    episodes = config.episodes_at(step, run.train.steps)
    if len(read_results(run.episodes, {"step": step})) >= episodes * len(config.tasks):
        return
    evaluate(
        _policy(run, step),
        config.tasks,
        episodes=episodes,
        seed=config.first_episode,
        workers=pool,
        execute=config.execute,
        out=run.episodes,
        # One seed is enough to look at; filming takes as long as half an episode.
        videos=config.videos if step == run.train.steps and run.cell.seed == config.seeds[0] else 0,
        tags=run.cell.tags | {"step": step},
    )


def _measure_errors(config: CompareConfig, run: Run, step: int) -> None:
    path = run.train.output / ERRORS
    known = json.loads(path.read_text()) if path.exists() else {}
    if str(step) in known:
        return
    dataset = open_dataset(config)
    found = open_loop_errors(
        _policy(run, step),
        dataset,
        hold_out(dataset, config.held_out)[1],
        cameras=run.train.student.cameras,
        execute=config.execute,
    )
    rows = [[task, episode, error] for (task, episode), error in found.items()]
    write_json(path, {**known, str(step): rows})


def _device(run: TrainConfig) -> str:
    return "cuda" if torch.cuda.is_available() and not run.cpu else "cpu"


def _policy(run: Run, step: int) -> Any:
    """The policy of a run, on the GPU where there is one."""
    policy = load_student(run.policy(step))
    return policy.to(_device(run.train)) if isinstance(policy, torch.nn.Module) else policy


def _time_policy(run: Run) -> None:
    """Median milliseconds of one call with one observation: the cost at inference, on this kind of device."""
    path, device = run.train.output / ACT_TIME, _device(run.train)
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get("device", "cpu") != device or not known:
        frames = Frames.read(open_dataset(run.train), [0], run.train.student.cameras)
        taken = act_milliseconds(_policy(run, run.train.steps), frames)
        write_json(path, {"act_ms": taken, "device": device})


def act_milliseconds(student: Student, frames: Frames, calls: int = ACT_CALLS) -> float:
    """Median wall-clock milliseconds of `student.act` on the first frame, after two calls to warm up."""
    seen = frames.observations(slice(0, 1))
    times = []
    for number in range(calls + 2):
        started = time.perf_counter()
        student.act(seen, torch.Generator().manual_seed(0))
        if number >= 2:
            times.append(1000 * (time.perf_counter() - started))
    return sorted(times)[len(times) // 2]


def read_comparison(config: CompareConfig, runs: Sequence[Run]) -> Comparison:
    """The statistics of every finished run; those without a result or with missing episodes are named."""
    errors = None
    missing: list[str] = []
    if config.held_out:
        by_name = {run.cell.name: _errors(config, run) for run in runs}
        measured = [record for record in by_name.values() if record is not None]
        errors = analyse_errors(measured, controls=config.control_titles)
        missing = [name for name, record in by_name.items() if record is None]
        if not config.tasks:
            return without_rollouts(sorted({record.seed for record in measured}), missing, errors)
    records = {run.cell.name: _record(config, run) for run in runs}
    found = analyse(
        [record for record in records.values() if record is not None],
        controls=config.control_titles,
        threshold=config.threshold,
        missing=[name for name, record in records.items() if record is None or name in missing],
    )
    return replace(found, held_out=errors)


def _errors(config: CompareConfig, run: Run) -> RunRecord | None:
    path = run.train.output / ERRORS
    known = json.loads(path.read_text()) if path.exists() else {}
    result = read_result(run.train.output)
    steps = evaluated_steps(run.train.steps, config.checkpoints)
    if result is None or any(str(step) not in known for step in steps):
        return None
    return RunRecord(
        arm=run.cell.arm.title,
        fraction=run.cell.fraction,
        seed=run.cell.seed,
        outcomes={step: {(task, int(n)): float(e) for task, n, e in known[str(step)]} for step in steps},
        seconds=result.seconds,
        peak_memory=result.peak_memory,
        act_ms=_call_milliseconds(run),
    )


def _record(config: CompareConfig, run: Run) -> RunRecord | None:
    result = read_result(run.train.output)
    evaluated: dict[int, list[EpisodeResult]] = {}
    for episode in read_results(run.episodes):
        evaluated.setdefault(int(episode.tags["step"]), []).append(episode)
    wanted = {
        step: config.episodes_at(step, run.train.steps) * len(config.tasks)
        for step in evaluated_steps(run.train.steps, config.checkpoints)
    }
    if result is None or any(len(evaluated.get(step, ())) < number for step, number in wanted.items()):
        return None
    return RunRecord(
        arm=run.cell.arm.title,
        fraction=run.cell.fraction,
        seed=run.cell.seed,
        outcomes={step: outcomes(evaluated[step]) for step in wanted},
        seconds=result.seconds,
        peak_memory=result.peak_memory,
        act_ms=_call_milliseconds(run),
        remarks=remarks(episode for rows in evaluated.values() for episode in rows),
    )


def _call_milliseconds(run: Run) -> float | None:
    timed = run.train.output / ACT_TIME
    return float(json.loads(timed.read_text())["act_ms"]) if timed.exists() else None


def _audits(runs: Sequence[Run]) -> tuple[AuditRow, ...]:
    """The gradient audits that finished runs logged."""
    return audit_rows(
        [
            AuditRecord(run.cell.arm.title, run.cell.fraction, read_metrics(run.train.output))
            for run in runs
            if read_result(run.train.output) is not None
        ]
    )


def write(found: Comparison, folder: Path) -> list[Path]:
    """Write comparison.json, and a CSV of success, held-out errors and audits as far as there are any."""
    written = [folder / RESULT]
    write_json(folder / RESULT, found.to_json())
    tables = {
        SUCCESS_TABLE: found.csv() if found.rows else "",
        ERROR_TABLE: found.held_out.csv() if found.held_out is not None else "",
        AUDIT_TABLE: audit_csv(found.audits) if found.audits else "",
    }
    for name, text in tables.items():
        if text:
            written.append(folder / name)
            _write_text(written[-1], text)
    return written


def _write_text(path: Path, text: str) -> None:
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))
