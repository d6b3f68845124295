"""The control side: one action a step out of a policy that answers with chunks. Needs numpy only.

Every controller takes observations and gives actions:

    ActionChunkBroker   executes so many actions of each chunk, then asks again
    TemporalEnsemble    asks at every step and averages what all chunks say about it (ACT)
    RealTimeChunker     asks while it executes, so that the robot never waits (arXiv 2506.07339)

`policy` is anything with openpi's `infer`: our `PolicyClient`, openpi's client, a policy in this process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.serving.codec import plain

Action = NDArray[np.float32]
Observation = Mapping[str, Any]
DELAYS_KEPT = 10
"""Recent inference delays whose maximum is the forecast of the next one."""


class Inference(Protocol):
    """What controllers need of a policy."""

    def infer(self, observation: Observation) -> Mapping[str, Any]:
        """`actions` (chunk, action_dim), among others."""
        ...


class Controller(Protocol):
    """One action a step."""

    def act(self, observation: Observation) -> Action:
        """The action (action_dim,) of this step."""
        ...

    def reset(self) -> None:
        """Forget the episode."""
        ...

    def close(self) -> None:
        """End its threads."""
        ...


class ActionChunkBroker:
    """Executes the first `execute` actions of each chunk, then asks again; the robot waits meanwhile.

    Args:
        policy: answers with chunks.
        execute: actions of a chunk that are executed, at most its length.

    Raises:
        ConfigError: `execute` is below 1, or (at the first answer) beyond the chunk.
    """

    def __init__(self, policy: Inference, execute: int) -> None:
        if execute < 1:
            raise ConfigError(f"execute is {execute}; expected 1 or more.")
        self._policy, self._execute = policy, execute
        self._step, self._chunk = execute, np.zeros((0, 0), np.float32)

    def act(self, observation: Observation) -> Action:
        """The next action; asks the policy when the chunk is used up."""
        if self._step >= self._execute:
            self._chunk = chunk_of(self._policy.infer(plain(observation)))
            if len(self._chunk) < self._execute:
                raise ConfigError(
                    f"execute is {self._execute}, but the policy's chunks hold {len(self._chunk)} actions."
                )
            self._step = 0
        self._step += 1
        return self._chunk[self._step - 1]

    def reset(self) -> None:
        """Ask for a new chunk at the next step."""
        self._step = self._execute

    def close(self) -> None:
        """Nothing to end."""


class TemporalEnsemble:
    """Asks for a chunk at every step; the action is the weighted mean of all chunks that cover this step.

    The i-th oldest chunk weighs exp(-decay * i), as in ACT: the oldest counts most.

    Args:
        policy: answers with chunks.
        decay: 0 is the plain mean; the larger, the less new chunks count.
    """

    def __init__(self, policy: Inference, decay: float = 0.01) -> None:
        if decay < 0:
            raise ConfigError(f"decay is {decay}; expected 0 or more.")
        self._policy, self._decay = policy, decay
        self._chunks: deque[tuple[int, Action]] = deque()
        self._step = 0

    def act(self, observation: Observation) -> Action:
        """The mean action of this step."""
        self._chunks.append((self._step, chunk_of(self._policy.infer(plain(observation)))))
        while self._step - self._chunks[0][0] >= len(self._chunks[0][1]):
            self._chunks.popleft()
        actions = np.stack([chunk[self._step - since] for since, chunk in self._chunks])
        weights = np.exp(-self._decay * np.arange(len(actions)))
        self._step += 1
        mean: Action = ((weights / weights.sum()) @ actions).astype(np.float32)
        return mean

    def reset(self) -> None:
        """Forget all chunks."""
        self._chunks.clear()
        self._step = 0

    def close(self) -> None:
        """Nothing to end."""


class RealTimeChunker:
    """Computes the next chunk while the running one is executed; a flow policy makes them agree.

    Row 0 of a new chunk belongs to the step at which its observation was taken, so after an inference that
    lasted n steps it is entered at row n. The request's `rtc` says what is left of the running chunk and how
    long the inference will take (the longest of recent ones). Policies without a flow head can be used too:
    their chunks are entered at row n without being made to agree.

    Args:
        policy: answers with chunks; called from another thread.
        execute: least actions of a chunk that are executed before the next is begun.
        delay: forecast of the first inference's duration, in steps.
        guide: send `rtc`; False for policies that do not take it.
        submit: runs a function elsewhere and returns its `Future`; replaced in tests.

    Attributes:
        starved: steps at which the robot had to wait, because the chunk was used up.
        delays: durations of recent inferences, in steps.
    """

    def __init__(
        self,
        policy: Inference,
        execute: int,
        *,
        delay: int = 0,
        guide: bool = True,
        submit: Callable[..., Future[Mapping[str, Any]]] | None = None,
    ) -> None:
        if execute < 1 or delay < 0:
            raise ConfigError(f"execute is {execute} and delay is {delay}; expected at least 1 and 0.")
        self._policy, self._execute, self._guide = policy, execute, guide
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="chunk") if submit is None else None
        self._submit = submit or self._pool.submit  # type: ignore[union-attr]
        self.delays: deque[int] = deque([delay], maxlen=DELAYS_KEPT)
        self.starved = 0
        self._pending: Future[Mapping[str, Any]] | None = None
        self._chunk: Action | None = None
        self._next = self._since = 0

    def act(self, observation: Observation) -> Action:
        """The action of this step; never waits unless the chunk is used up."""
        if self._chunk is None:
            self._chunk, self._next = chunk_of(self._policy.infer(plain(observation))), 0
        self._collect()
        if self._pending is None and self._next >= self._execute:
            self._begin(observation)
        if self._next >= len(self._chunk):  # execute is the whole chunk: nothing left to bridge the wait
            self._collect(wait=True)
        action: Action = self._chunk[self._next]
        self._next += 1
        self._since += 1
        return action

    def reset(self) -> None:
        """Forget the episode; an inference under way is waited for and dropped."""
        if self._pending is not None:
            self._pending.exception()
        self._pending, self._chunk = None, None
        self._next = self._since = 0

    def close(self) -> None:
        """End the thread."""
        self.reset()
        if self._pool is not None:
            self._pool.shutdown()

    def _begin(self, observation: Observation) -> None:
        assert self._chunk is not None
        left = self._chunk[self._next :]
        request = plain(observation)
        if self._guide and len(left):
            request["rtc"] = {"previous": left, "delay": min(max(self.delays), len(left))}
        self._pending, self._since = self._submit(self._policy.infer, request), 0

    def _collect(self, wait: bool = False) -> None:
        """Enter the new chunk if it is there; wait for it when the running one is used up."""
        assert self._chunk is not None
        if self._pending is None:
            return
        used_up = wait or self._next >= len(self._chunk)
        if not (self._pending.done() or used_up):
            return
        self.starved += not self._pending.done()
        pending, self._pending = self._pending, None
        self._chunk = chunk_of(pending.result())
        self._next = min(self._since, len(self._chunk) - 1)
        self.delays.append(self._since)


class SafetyGate:
    """Lets through only actions that a robot may be given; put it around any controller.

    Args:
        controller: whose actions are checked.
        low, high: (action_dim,) limits, e.g. of the joints; actions are clipped to them.
        max_change: (action_dim,) or one number: the largest change from one action to the next.

    Attributes:
        limited: actions that had to be changed.

    Raises:
        DataError: (from `act`) an action of another size or not finite: the episode must stop.
    """

    def __init__(
        self, controller: Controller, low: Action, high: Action, max_change: Action | float = np.inf
    ) -> None:
        self._controller, self._low, self._high, self._max_change = controller, low, high, max_change
        if low.shape != high.shape or (low > high).any():
            raise ConfigError(f"limits {low.tolist()} to {high.tolist()} are not ranges; give low <= high.")
        self.limited = 0
        self._last: Action | None = None

    def act(self, observation: Observation) -> Action:
        """The controller's action, limited."""
        action = self._controller.act(observation)
        if action.shape != self._low.shape or not np.isfinite(action).all():
            raise DataError(
                f"the policy gave action {action.tolist()}; expected {self._low.size} finite numbers. Stop."
            )
        allowed = action
        if self._last is not None:
            allowed = np.clip(allowed, self._last - self._max_change, self._last + self._max_change)
        allowed = np.clip(allowed, self._low, self._high).astype(np.float32)
        self.limited += not np.array_equal(allowed, action)
        self._last = allowed
        return allowed

    def reset(self) -> None:
        """Begin an episode."""
        self._last = None
        self._controller.reset()

    def close(self) -> None:
        """End the controller."""
        self._controller.close()


def chunk_of(answer: Mapping[str, Any]) -> Action:
    """The action chunk (chunk, action_dim) of an answer. Raises `DataError` when there is none."""
    actions = np.asarray(answer.get("actions"))
    if actions.dtype.kind not in "fiu" or actions.ndim != 2 or not len(actions):
        raise DataError(f"the answer has actions of shape {actions.shape}; expected (chunk, action_dim).")
    return actions.astype(np.float32)
