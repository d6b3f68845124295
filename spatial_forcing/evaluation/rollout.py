"""Closed-loop evaluation: parallel environment workers, one policy that answers all of them in batches."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor, nn

from spatial_forcing.envs import make_env
from spatial_forcing.envs.base import suite_of, task_marks
from spatial_forcing.errors import ConfigError, EnvironmentSetupError
from spatial_forcing.evaluation.results import (
    EpisodeError,
    EpisodeResult,
    EvaluationResult,
    ResultsFile,
    read_results,
)
from spatial_forcing.evaluation.workers import (
    Ask,
    Done,
    EpisodeSpec,
    Failed,
    MakeEnv,
    Seat,
    WorkerPool,
    check_chunks,
)
from spatial_forcing.progress import ProgressBars, progress_bar
from spatial_forcing.protocols import Observation

HOPELESS = 3
"""Errors before the first result after which an evaluation stops: the environment itself is broken."""


class Policy(Protocol):
    """What evaluation needs of a student."""

    def act(
        self,
        observations: Sequence[Observation],
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Action chunks (B, chunk, action_dim); row i draws its noise from `generator[i]`."""
        ...


def evaluate(
    policy: Policy,
    tasks: Sequence[str],
    *,
    episodes: int,
    seed: int,
    workers: int | WorkerPool = 1,
    env_kwargs: Mapping[str, Any] | None = None,
    execute: int = 8,
    out: Path | None = None,
    videos: int = 0,
    tags: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    make: MakeEnv = make_env,
    progress: bool = True,
) -> EvaluationResult:
    """Roll `policy` out for `episodes` episodes of every task and count successes.

    Episode i of a task starts from `env.reset(seed=seed + i)`; the noise of its n-th policy call comes from
    a generator seeded by (seed + i, task, n). With `batch_size=1`, the default on the CPU, the result is
    bit for bit the same whatever the number of workers. Larger batches round otherwise, by 1e-6, and a
    contact can make another episode of that: their results agree in distribution.

    Args:
        policy: a student; put into eval mode while it runs.
        tasks: registry names of environments.
        episodes: per task.
        seed: first episode seed. Keep the range disjoint from the demonstrations'.
        workers: number of processes, or a pool to reuse (its `env_kwargs` and `make` then apply).
        env_kwargs: passed to `make`, e.g. `image_size=128, cameras=(...)`.
        execute: steps of each chunk that are executed before the policy is asked again.
        out: JSONL file that finished episodes are appended to. Episodes already in it under the same `tags`
            are not run again, so an interrupted evaluation resumes.
        videos: film the first so many episodes of every task, all cameras side by side, into the folder
            `videos` beside `out`.
        tags: what is evaluated, e.g. `{"arm": "sf", "step": 500}`; kept in every row.
        batch_size: most observations in one policy call. Default: 1 for a module on the CPU, where a batch
            saves little, else 64.
        make: environment factory; a pool that is given as `workers` keeps its own.
        progress: show a progress bar.

    Raises:
        ConfigError: a count below 1; videos without `out`; `execute` beyond the policy's chunk; `out` holds
            episodes of the same tags made with other settings.
        DataError: the policy returns wrong shapes or values that are not finite.
        EnvironmentSetupError: no episode could be run at all.
    """
    if videos > 0 and out is None:
        raise ConfigError(f"videos is {videos}, but there is no results file to put them beside; give `out`.")
    batch_size = _default_batch(policy) if batch_size is None else batch_size
    _check_counts(tasks, episodes=episodes, execute=execute, batch_size=batch_size)
    tags = dict(tags or {})
    kwargs = dict(env_kwargs or {})
    if isinstance(workers, WorkerPool):  # the pool was made with both
        make, kwargs = workers.make, workers.env_kwargs
    setup = {"execute": execute, "env": {k: _jsonable(v) for k, v in sorted(kwargs.items())}}
    setup |= task_marks(tasks) if make is make_env else {}
    wanted = {(task, seed + i): i for task in tasks for i in range(episodes)}
    finished = _resumable(out, tags, setup, wanted)
    specs = [
        EpisodeSpec(task, s, execute, _video_path(out, tags, task, s) if out and i < videos else None)
        for (task, s), i in wanted.items()
        if (task, s) not in finished
    ]
    run = _Run(policy, specs, out=out, tags=tags, setup=setup, batch_size=batch_size)
    if specs:
        fresh = make is make_env and any(suite_of(task).fresh for task in tasks)
        with (
            _pool(workers, make, kwargs, len(specs), fresh) as pool,
            _eval_mode(policy),
            progress_bar(progress, console=Console(), note="won") as bar,
        ):
            run.play(pool, bar, finished.values(), label=" ".join(str(v) for v in tags.values()))
    finished |= run.results
    if not finished:
        raise _hopeless(run.errors)
    return EvaluationResult(
        episodes=tuple(finished[key] for key in wanted if key in finished),
        errors=tuple(run.errors),
        seconds=run.seconds,
        steps_run=sum(r.steps for r in run.results.values()),
        busy=run.busy,
    )


class _Run:
    """One pass over the episodes that are still to be played."""

    def __init__(
        self,
        policy: Policy,
        specs: Sequence[EpisodeSpec],
        *,
        out: Path | None,
        tags: Mapping[str, Any],
        setup: Mapping[str, Any],
        batch_size: int,
    ) -> None:
        self.policy, self.tags, self.setup, self.batch_size = policy, tags, setup, batch_size
        self.queue = deque(specs)
        self.folder = out.parent if out else Path()
        self.file = ResultsFile(out) if out else None
        self.results: dict[tuple[str, int], EpisodeResult] = {}
        self.errors: list[EpisodeError] = []
        self.repeated: set[EpisodeSpec] = set()
        self.seconds = self.busy = 0.0

    def play(
        self, pool: WorkerPool, bar: ProgressBars, finished: Iterable[EpisodeResult], label: str
    ) -> None:
        """Play what is queued; `finished` episodes of an earlier call are counted in the display."""
        earlier = [r.success for r in finished]
        already, earlier_won = len(earlier), sum(earlier)
        total = already + len(self.queue)
        line = bar.add_task(f"evaluate {label}", total=total, completed=already, won="")
        open_episodes = len(self.queue)
        started = time.perf_counter()
        try:
            while open_episodes:
                for seat in pool.free_seats()[: len(self.queue)]:
                    pool.start(seat, self.queue.popleft())
                asked: list[tuple[Seat, EpisodeSpec, Ask]] = []
                for seat, spec, report in pool.receive():
                    if isinstance(report, Ask):
                        asked.append((seat, spec, report))
                    elif isinstance(report, Done):
                        self._done(spec, report)
                        open_episodes -= 1
                    else:
                        open_episodes -= self._failed(spec, report)
                self._answer(pool, asked)
                won = earlier_won + sum(r.success for r in self.results.values())
                done = already + len(self.results)
                bar.update(line, completed=done + len(self.errors), won=f"{won} of {done} succeed")
        except BaseException:
            pool.abandon()
            raise
        self.seconds = time.perf_counter() - started
        self.busy = sum(r.sim_seconds for r in self.results.values()) / (self.seconds * len(pool))

    def _answer(self, pool: WorkerPool, asked: Sequence[tuple[Seat, EpisodeSpec, Ask]]) -> None:
        for first in range(0, len(asked), self.batch_size):
            batch = asked[first : first + self.batch_size]
            noise = [_generator(spec, ask.call) for _, spec, ask in batch]
            with torch.inference_mode():
                chunks = self.policy.act([ask.observation for _, _, ask in batch], noise)
            actions = chunks.float().cpu().numpy()
            check_chunks(actions, len(batch), batch[0][1].execute)
            for (seat, _, _), chunk in zip(batch, actions, strict=True):
                pool.act(seat, chunk)

    def _done(self, spec: EpisodeSpec, report: Done) -> None:
        video = None if report.video is None else str(report.video.relative_to(self.folder))
        result = EpisodeResult(
            task=spec.task,
            seed=spec.seed,
            success=report.success,
            steps=report.steps,
            reward=report.reward,
            sim_seconds=report.sim_seconds,
            video=video,
            tags=self.tags,
            setup=self.setup,
            threads=torch.get_num_threads(),
        )
        self.results[spec.task, spec.seed] = result
        if self.file is not None:
            self.file.append(result)

    def _failed(self, spec: EpisodeSpec, report: Failed) -> bool:
        """Repeat the episode once; True when it is given up."""
        if report.refusal is not None:
            raise report.refusal
        if report.bystander or spec not in self.repeated:
            if not report.bystander:
                self.repeated.add(spec)
            self.queue.append(spec)
            return False
        self.errors.append(EpisodeError(spec.task, spec.seed, report.message))
        if not self.results and len(self.errors) == HOPELESS:
            raise _hopeless(self.errors)
        return True


def _hopeless(errors: Sequence[EpisodeError]) -> EnvironmentSetupError:
    first = errors[0]
    return EnvironmentSetupError(
        f"no episode could be run. {first.task} seed {first.seed} failed twice: {first.message}\n"
        "Fix the cause, then run the same command again; finished episodes are kept."
    )


def _generator(spec: EpisodeSpec, call: int) -> torch.Generator:
    key = f"{spec.seed}/{spec.task}/{call}".encode()
    number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little", signed=True)
    return torch.Generator().manual_seed(number)


def _default_batch(policy: Policy) -> int:
    parameter = next(policy.parameters(), None) if isinstance(policy, nn.Module) else None
    return 1 if parameter is not None and parameter.device.type == "cpu" else 64


def _check_counts(tasks: Sequence[str], **counts: int) -> None:
    if not tasks or len(set(tasks)) != len(tasks):
        raise ConfigError(f"tasks is {list(tasks)}; name at least one task, each once.")
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be 1 or more.")


def _resumable(
    out: Path | None,
    tags: Mapping[str, Any],
    setup: Mapping[str, Any],
    wanted: Mapping[tuple[str, int], int],
) -> dict[tuple[str, int], EpisodeResult]:
    if out is None:
        return {}
    same = [r for r in read_results(out) if dict(r.tags) == dict(tags) and (r.task, r.seed) in wanted]
    for row in same:
        if dict(row.setup) != setup:
            raise ConfigError(
                f"{out} holds episodes of {dict(tags) or 'the same policy'} made with {dict(row.setup)}; "
                f"now it is {dict(setup)}. Choose another results file, other tags, or the old settings."
            )
    return {(r.task, r.seed): r for r in same}


def _jsonable(value: Any) -> Any:
    return [_jsonable(v) for v in value] if isinstance(value, (tuple, list)) else value


def _video_path(out: Path, tags: Mapping[str, Any], task: str, seed: int) -> Path:
    return (
        out.parent / "videos" / ("-".join([*(f"{k}={v}" for k, v in tags.items()), task, str(seed)]) + ".mp4")
    )


@contextmanager
def _pool(
    workers: int | WorkerPool, make: MakeEnv, env_kwargs: Mapping[str, Any], episodes: int, fresh: bool
) -> Iterator[WorkerPool]:
    if isinstance(workers, WorkerPool):
        yield workers
    else:
        slots = 1 if fresh else 2
        with WorkerPool(min(workers, episodes), make, env_kwargs, slots=slots, fresh=fresh) as pool:
            yield pool


@contextmanager
def _eval_mode(policy: Policy) -> Iterator[None]:
    if not isinstance(policy, nn.Module):
        yield
        return
    training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(training)
