"""Environment workers: spawned processes that simulate, and ask for actions only when they need them.

gymnasium's vector environments step in lockstep and copy every observation; here images are rendered
only when the policy is asked, and no worker waits for another one. A worker plays `slots` episodes in turn:
while one waits for its actions the next one simulates, so the policy's time is hidden.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.errors import ConfigError, DataError, SpatialForcingError
from spatial_forcing.evaluation.video import side_by_side, write_video
from spatial_forcing.protocols import Env, FilmedEnv, Observation

MakeEnv = Callable[..., Env]
"""`make(task, **env_kwargs) -> Env`; a module-level function, so that a spawned process can import it."""

VIDEO_FRAMES = 90
"""Frames a video aims at: long episodes are filmed every n-th step."""
VIDEO_SECONDS = 6.0


@dataclass(frozen=True)
class EpisodeSpec:
    """One episode to play.

    Attributes:
        task, seed: `make(task).reset(seed=seed)` starts it.
        execute: steps of a chunk that are executed before the policy is asked again.
        video: file to film it into, or None.
    """

    task: str
    seed: int
    execute: int
    video: Path | None = None


@dataclass(frozen=True)
class Ask:
    """A worker wants an action chunk: call number `call` of an episode."""

    slot: int
    observation: Observation
    call: int


@dataclass(frozen=True)
class Done:
    """An episode has finished."""

    slot: int
    success: bool
    steps: int
    reward: float
    sim_seconds: float
    video: Path | None


@dataclass(frozen=True)
class Failed:
    """An episode ended without a result.

    Attributes:
        message: traceback, or how the worker died.
        refusal: set when the user has to change something: repeating cannot help.
        bystander: another episode of the same worker broke it; this one is not to blame.
    """

    slot: int
    message: str
    refusal: SpatialForcingError | None = None
    bystander: bool = False


Report = Ask | Done | Failed


class _Slot:
    """Plays one episode at a time; the environment is kept while the task stays the same."""

    def __init__(self, make: MakeEnv, env_kwargs: Mapping[str, Any]) -> None:
        self._make, self._env_kwargs = make, env_kwargs
        self._env: Env | None = None
        self._frames: list[NDArray[np.uint8]] = []

    def begin(self, spec: EpisodeSpec) -> Observation:
        if self._env is None or self._env.task != spec.task:
            self.close()
            self._env = self._make(spec.task, **self._env_kwargs)
        self.spec, self.calls, self.steps, self.reward, self._frames = spec, 0, 0, 0.0, []
        self._stride = max(1, self._env.horizon // VIDEO_FRAMES)
        started = time.perf_counter()
        observation = self._rendered(self._env.reset(seed=spec.seed)[0])
        self._film(observation)
        self.sim_seconds = time.perf_counter() - started
        return observation

    def advance(self, chunk: NDArray[np.float32]) -> tuple[Observation | None, bool]:
        """Execute a chunk: (the next observation, or None at the end; success)."""
        assert self._env is not None
        started = time.perf_counter()
        observation: Observation | None = None
        success = over = False
        for action in chunk[: self.spec.execute]:
            observation, reward, terminated, truncated, info = self._env.step(action)
            self.steps += 1
            self.reward += float(reward)
            success = bool(info["success"])
            over = success or terminated or truncated or self.steps >= self._env.horizon
            if over or self.steps % self._stride == 0:
                self._film(observation)
            if over:
                break
        observation = None if over or observation is None else self._rendered(observation)
        self.sim_seconds += time.perf_counter() - started
        return observation, success

    def finish(self, slot: int, success: bool) -> Done:
        video = None
        if self.spec.video is not None:
            seconds = VIDEO_SECONDS * len(self._frames) / VIDEO_FRAMES
            video = write_video(self._frames, self.spec.video, fps=len(self._frames) / max(seconds, 0.5))
            self._frames = []
        return Done(slot, success, self.steps, self.reward, self.sim_seconds, video)

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None

    def _film(self, observation: Observation) -> None:
        if self.spec.video is not None:
            sharp = self._env.film() if isinstance(self._env, FilmedEnv) else observation["images"]
            self._frames.append(side_by_side(sharp))

    @staticmethod
    def _rendered(observation: Observation) -> Observation:
        images = {camera: np.asarray(image) for camera, image in observation["images"].items()}
        return {"images": images, "state": observation["state"], "task": observation["task"]}


def _worker_main(pipe: Connection, make: MakeEnv, env_kwargs: Mapping[str, Any], slots: int) -> None:
    """The worker's loop: orders in, reports out, until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes the pipe
    os.environ.setdefault("LP_NUM_THREADS", "1")  # one core a worker: software GL would take them all
    players = [_Slot(make, env_kwargs) for _ in range(slots)]
    orders: deque[tuple[int, EpisodeSpec | NDArray[np.float32]]] = deque()
    try:
        with suppress(EOFError, BrokenPipeError, ConnectionResetError):
            while True:
                while not orders or pipe.poll():
                    orders.append(pipe.recv())
                slot, order = orders.popleft()
                pipe.send(_obey(players[slot], slot, order))
    finally:
        for player in players:
            player.close()


def _obey(player: _Slot, slot: int, order: EpisodeSpec | NDArray[np.float32]) -> Report:
    try:
        if isinstance(order, EpisodeSpec):
            return Ask(slot, player.begin(order), 0)
        observation, success = player.advance(order)
        if observation is None:
            return player.finish(slot, success)
        player.calls += 1
        return Ask(slot, observation, player.calls)
    except SpatialForcingError as error:
        return Failed(slot, str(error), refusal=error)
    except Exception:
        player.close()
        return Failed(slot, traceback.format_exc())


class _Worker:
    """A process, its pipe, the episodes it plays and its unanswered orders, oldest first."""

    def __init__(self, target: Callable[..., None], *args: object) -> None:
        # spawn, not fork: a forked GL context or a forked torch thread pool deadlocks.
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()
        self.playing: dict[int, EpisodeSpec] = {}
        self.orders: deque[int] = deque()
        self.task: str | None = None

    def send(self, slot: int, order: EpisodeSpec | NDArray[np.float32]) -> None:
        self.orders.append(slot)
        # A worker that has died is found by `receive`, which reports its episodes.
        with suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send((slot, order))

    def receive(self) -> tuple[EpisodeSpec, Report]:
        report: Report = self.pipe.recv()
        self.orders.remove(report.slot)
        spec = self.playing[report.slot]
        if not isinstance(report, Ask):
            del self.playing[report.slot]
        return spec, report

    def autopsy(self) -> list[tuple[EpisodeSpec, Failed]]:
        """After its death: orders are obeyed one by one, so the oldest unanswered one was the last.

        With no order unanswered it died while it waited, and any of its episodes may be to blame.
        """
        self.stop()
        message = f"its worker process died (exit code {self.process.exitcode})"
        fatal = self.orders[0] if self.orders else None
        return [
            (spec, Failed(s, message, bystander=fatal is not None and s != fatal))
            for s, spec in self.playing.items()
        ]

    def stop(self) -> None:
        self.pipe.close()
        self.process.join(timeout=2)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


@dataclass(frozen=True)
class Seat:
    """Where an episode is played: a slot of a worker."""

    worker: int
    slot: int


class WorkerPool:
    """`workers` processes with `slots` episodes each. A context manager; reusable by many evaluations.

    Args:
        workers: processes; one a core is right for software rendering.
        make: `make(task, **env_kwargs) -> Env`, importable by a spawned process.
        env_kwargs: e.g. `image_size`, `cameras`.
        slots: episodes a process plays in turn. 2 hide the policy's time; 1 halves the memory.
        fresh: a process plays one task only and is replaced for the next; needs `slots=1`. For simulators
            that do not give memory back.

    Raises:
        ConfigError: `workers` or `slots` below 1, or `fresh` with several slots.
    """

    def __init__(
        self,
        workers: int,
        make: MakeEnv,
        env_kwargs: Mapping[str, Any] | None = None,
        *,
        slots: int = 2,
        fresh: bool = False,
    ) -> None:
        if fresh and slots != 1:
            raise ConfigError(f"fresh processes play one episode at a time; give slots=1, not {slots}.")
        if workers < 1 or slots < 1:
            raise ConfigError(f"workers is {workers} and slots is {slots}; both must be 1 or more.")
        self.slots, self.env_kwargs, self.fresh = slots, dict(env_kwargs or {}), fresh
        self.make = make
        self._workers: list[_Worker | None] = [None] * workers  # started when first needed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._workers)

    def free_seats(self) -> list[Seat]:
        """Slots without an episode, those of the least busy workers first."""
        load = [len(w.playing) if w else 0 for w in self._workers]
        seats = [
            Seat(i, slot)
            for i, worker in enumerate(self._workers)
            for slot in range(self.slots)
            if worker is None or slot not in worker.playing
        ]
        return sorted(seats, key=lambda seat: seat.slot if not load[seat.worker] else load[seat.worker])

    def start(self, seat: Seat, spec: EpisodeSpec) -> None:
        """Begin an episode on a free seat."""
        worker = self._workers[seat.worker]
        if worker is not None and self.fresh and worker.task not in (None, spec.task):
            worker.stop()
            worker = None
        if worker is None:
            worker = _Worker(_worker_main, self.make, self.env_kwargs, self.slots)
            self._workers[seat.worker] = worker
        worker.task = spec.task
        worker.playing[seat.slot] = spec
        worker.send(seat.slot, spec)

    def act(self, seat: Seat, chunk: NDArray[np.float32]) -> None:
        """Answer an `Ask` with an action chunk (chunk, action_dim)."""
        worker = self._workers[seat.worker]
        assert worker is not None
        worker.send(seat.slot, chunk)

    def receive(self) -> list[tuple[Seat, EpisodeSpec, Report]]:
        """Wait for reports; a dead worker is replaced and its episodes are reported as failed."""
        ready = set(wait([w.pipe for w in self._workers if w]))
        reports: list[tuple[Seat, EpisodeSpec, Report]] = []
        for index, worker in enumerate(self._workers):
            if worker and worker.pipe in ready:
                reports += [(Seat(index, r.slot), spec, r) for spec, r in self._drain(index, worker)]
        return reports

    def abandon(self) -> None:
        """Stop workers that still play: after an interruption the next run finds a clean pool."""
        for index, worker in enumerate(self._workers):
            if worker and worker.playing:
                worker.stop()
                self._workers[index] = None

    def close(self) -> None:
        """Stop all workers."""
        for index, worker in enumerate(self._workers):
            if worker:
                worker.stop()
                self._workers[index] = None

    def _drain(self, index: int, worker: _Worker) -> list[tuple[EpisodeSpec, Report]]:
        reports: list[tuple[EpisodeSpec, Report]] = []
        try:
            while worker.pipe.poll():
                reports.append(worker.receive())
        except (EOFError, ConnectionResetError):
            self._workers[index] = None
            # The answer to a dead worker's question would reach its successor: drop the question.
            return [r for r in reports if not isinstance(r[1], Ask)] + list(worker.autopsy())
        return reports


def check_chunks(chunks: NDArray[np.float32], asked: int, execute: int) -> None:
    """Refuse what an environment must not be given.

    Raises:
        ConfigError: the policy's chunks are shorter than `execute`.
        DataError: wrong number of chunks, or a value that is not finite.
    """
    if chunks.ndim != 3 or len(chunks) != asked:
        raise DataError(
            f"the policy returned actions of shape {chunks.shape} for {asked} observations; expected "
            "(B, chunk, action_dim)."
        )
    if chunks.shape[1] < execute:
        raise ConfigError(
            f"execute is {execute}, but the policy predicts chunks of {chunks.shape[1]} actions; choose "
            f"execute <= {chunks.shape[1]}."
        )
    if not np.isfinite(chunks).all():
        raise DataError("the policy returned an action that is not finite; its weights have diverged.")
