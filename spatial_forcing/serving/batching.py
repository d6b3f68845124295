"""Answers all waiting requests in one call of the policy, in a thread of its own.

While one batch is computed the next one gathers. Clients that were answered together ask again together, a
little apart: the first of them would go alone and make the others wait for a whole call, so a batch is held
back for a small part of a call's time until those of the last batch are in it. Clients that were answered
alone, as robots out of step are, wait for nobody. A lone
client of a fast policy is answered in the network's own thread, because waking another one and being woken
by it can cost more than the answer.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from spatial_forcing.serving.metrics import Counters
from spatial_forcing.serving.request import Request

INLINE_SECONDS = 0.1
"""A policy this fast may hold up the network's thread (health checks, new clients) for one call."""
GATHER_PART, GATHER_SECONDS = 0.1, 0.02
"""A batch is held back for this part of the last call's time, and never longer than these seconds."""

Act = Callable[[Sequence[Request]], Sequence[NDArray[np.float32]]]


@dataclass(frozen=True)
class Answer:
    """Actions (chunk, action_dim), and how long they took.

    Attributes:
        infer_ms: the policy call that computed them.
        queue_ms: waiting before it.
    """

    actions: NDArray[np.float32]
    infer_ms: float
    queue_ms: float


@dataclass
class _Job:
    request: Request
    future: asyncio.Future[Answer]
    since: float
    client: object


class Batcher:
    """Answers requests in batches, in a thread of its own.

    Args:
        act: the policy: requests -> one chunk each.
        counters: what is counted.
        max_batch: most requests in one call; 1 keeps every answer bit-identical to in-process `act`.
    """

    def __init__(self, act: Act, counters: Counters, max_batch: int = 16) -> None:
        self._act, self._counters, self._max_batch = act, counters, max_batch
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._threads = torch.get_num_threads()
        self._calling = threading.Lock()  # one call of the policy at a time
        self._last_seconds = float("inf")
        self._together: set[object] = set()  # who was in the last batch, if it held several
        self._thread = threading.Thread(target=self._work, name="policy", daemon=True)
        self._thread.start()

    def at_once(self, request: Request) -> Answer | None:
        """The answer to the only client's request here and now; None if the policy is slow or at work.

        Whatever the policy raises is raised.
        """
        if self._last_seconds >= INLINE_SECONDS or not self._calling.acquire(blocking=False):
            return None
        try:
            return self._call([request], [time.perf_counter()])[0]
        finally:
            self._calling.release()

    def submit(self, request: Request, client: object = None) -> asyncio.Future[Answer]:
        """The coming answer to `request`, or what the policy raises; cancelling it takes it off the queue.

        Args:
            request: what is asked.
            client: who asks (hashable), so that those who ask together are answered together.
        """
        job = _Job(request, self._loop.create_future(), time.perf_counter(), client)
        self._jobs.put(job)
        return job.future

    def close(self, seconds: float | None = None) -> None:
        """End the thread after what is queued; wait for it at most `seconds`."""
        self._jobs.put(None)
        self._thread.join(seconds)

    def _work(self) -> None:
        torch.set_num_threads(self._threads)  # OpenMP's count is a thread's own
        while (job := self._jobs.get()) is not None:
            batch, last = self._gather(job)
            if batch:
                self._answer(batch)
            if last:
                return

    def _gather(self, first: _Job) -> tuple[list[_Job], bool]:
        """The waiting requests and those expected soon, up to a batch, without those of clients that left."""
        batch = [first]
        last = self._take(batch)
        deadline = time.perf_counter() + min(GATHER_PART * self._last_seconds, GATHER_SECONDS)
        while not last and self._missing(batch) and (left := deadline - time.perf_counter()) > 0:
            last = self._take(batch, left)
        clients = {job.client for job in batch}
        self._together = clients if len(clients) > 1 else set()
        return [job for job in batch if not job.future.cancelled()], last

    def _take(self, batch: list[_Job], seconds: float = 0.0) -> bool:
        """Add what is queued, waiting `seconds` at most for the first of it; whether the end was reached."""
        while len(batch) < self._max_batch:
            try:
                job = self._jobs.get(timeout=seconds) if seconds > 0 else self._jobs.get_nowait()
            except queue.Empty:
                return False
            if job is None:
                return True
            batch.append(job)
            seconds = 0.0
        return False

    def _missing(self, batch: list[_Job]) -> bool:
        """Whether `batch` has room, and a client of the last batch is not in it."""
        return len(batch) < self._max_batch and not self._together <= {job.client for job in batch}

    def _answer(self, batch: list[_Job]) -> None:
        try:
            with self._calling:
                answers = self._call([job.request for job in batch], [job.since for job in batch])
        except Exception as error:
            if len(batch) > 1:  # one bad request must not spoil its neighbours'
                for job in batch:
                    self._answer([job])
            else:
                self._post(_fail, batch[0].future, error)
            return
        self._post(_deliver, [(job.future, answer) for job, answer in zip(batch, answers, strict=True)])

    def _call(self, requests: list[Request], since: list[float]) -> list[Answer]:
        started = time.perf_counter()
        chunks = self._act(requests)
        seconds = time.perf_counter() - started
        self._last_seconds = seconds
        self._counters.batch(len(requests), seconds)
        return [
            Answer(chunk, seconds * 1000, (started - asked) * 1000)
            for chunk, asked in zip(chunks, since, strict=True)
        ]

    def _post(self, callback: Callable[..., None], *content: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server gave up waiting, so nobody listens
            self._loop.call_soon_threadsafe(callback, *content)


def _deliver(answers: list[tuple[asyncio.Future[Answer], Answer]]) -> None:
    for future, answer in answers:
        if not future.done():
            future.set_result(answer)


def _fail(future: asyncio.Future[Answer], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
