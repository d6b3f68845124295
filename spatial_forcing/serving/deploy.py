"""A robot loop at a fixed rate, with misses counted. Needs numpy only."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from spatial_forcing.errors import ConfigError
from spatial_forcing.serving.control import Action, Controller, Observation


class RateKeeper:
    """Keeps commands `1 / hz` seconds apart: call `wait` just before each one.

    Commands are due at fixed times, so small delays do not add up. One that is ready too late is a miss: it
    goes out at once, and the schedule starts again from there, so commands are never closer than a period.

    Args:
        hz: commands a second.
        clock, sleep: replaced in tests.

    Attributes:
        steps, misses: counts since `start`.
        worst: largest lateness, seconds.
    """

    def __init__(
        self,
        hz: float,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if hz <= 0:
            raise ConfigError(f"the rate is {hz} Hz; expected a positive number.")
        self._period, self._clock, self._sleep = 1 / hz, clock, sleep
        self.start()

    def start(self) -> None:
        """Start the schedule again, with the next command."""
        self.steps = self.misses = 0
        self.worst = 0.0
        self._due: float | None = None

    def wait(self) -> bool:
        """Sleep until the command is due; False when it is late."""
        now = self._clock()
        self.steps += 1
        late = 0.0 if self._due is None else now - self._due
        if self._due is None or late > 0:
            self.misses += late > 0
            self.worst = max(self.worst, late)
            self._due = now + self._period
            return late <= 0
        self._sleep(-late)
        self._due += self._period
        return True


class Robot(Protocol):
    """What is controlled: a `protocols.Env`, or a driver of a real robot with the same two methods."""

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        """(first observation, info)."""
        ...

    def step(self, action: Action) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """(observation, reward, terminated, truncated, info)."""
        ...


@dataclass(frozen=True)
class Deployment:
    """How an episode went.

    Attributes:
        steps: actions that were executed.
        misses: steps that came too late.
        worst_ms: largest lateness.
        reward: sum.
        success: what the robot's `info["success"]` said last; None when it says nothing.
    """

    steps: int
    misses: int
    worst_ms: float
    reward: float
    success: bool | None


def run_episode(
    robot: Robot,
    controller: Controller,
    rate: RateKeeper,
    *,
    max_steps: int,
    seed: int | None = None,
    on_step: Callable[[Observation, Action], None] | None = None,
) -> Deployment:
    """Control `robot` until it says that the episode is over, or for `max_steps`.

    Args:
        robot: what is controlled.
        controller: gives the actions.
        rate: keeps the time.
        max_steps: of the episode.
        seed: of the robot's `reset`.
        on_step: is shown every observation and the action that answers it.
    """
    controller.reset()
    observation, _ = robot.reset(seed=seed)
    reward, success = 0.0, None
    rate.start()
    for _ in range(max_steps):
        action = controller.act(observation)
        if on_step:
            on_step(observation, action)
        rate.wait()
        observation, gained, terminated, truncated, info = robot.step(action)
        reward += float(gained)
        success = bool(info["success"]) if "success" in info else success
        if terminated or truncated or success:
            break
    return Deployment(rate.steps, rate.misses, rate.worst * 1000, reward, success)
