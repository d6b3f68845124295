"""What the simulated environments share: cameras, spaces, images rendered when read, steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from spatial_forcing.envs.base import LazyImages, check_step
from spatial_forcing.envs.camera import extrinsics, intrinsics
from spatial_forcing.envs.renderer import FastRenderer
from spatial_forcing.errors import ConfigError
from spatial_forcing.protocols import Observation
from spatial_forcing.registry import unknown

FILM_SIZE = 160
"""Pixels on the shorter side of a filmed view, at least: what a small policy sees is too coarse to watch."""
Frame = tuple[NDArray[np.uint8], NDArray[np.float32]]
"""Image (H, W, 3) and depth (H, W) in metres along the optical axis, as delivered."""


DRAWN_DATA = (
    "geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "xpos", "xmat", "xipos", "ximat", "cam_xpos",
    "cam_xmat", "light_xpos", "light_xdir",
)  # fmt: skip
"""What a renderer reads of a simulator's state."""
DRAWN_MODEL = ("geom_rgba", "site_rgba")
"""And what tasks change of their model within an episode, e.g. a stove that glows."""


@dataclass(frozen=True)
class Moment:
    """A moment of an episode, to be drawn later.

    Attributes:
        data, model: copies of the arrays `DRAWN_DATA` and `DRAWN_MODEL`.
        steps: of the episode before it.
    """

    data: dict[str, NDArray[np.float64]]
    model: dict[str, NDArray[np.float32]]
    steps: int


class SimulatedEnv(gymnasium.Env[Observation, NDArray[np.float32]]):
    """A task in MuJoCo; implements `protocols.Env`. A suite says how episodes start and what actions do.

    Args:
        task, instruction: the task's registry name, and the task in words.
        cameras: the simulator's camera names.
        image_size: (height, width) in pixels.
        horizon: steps until an episode is truncated, 1 to `max_horizon`.
        actions: lowest and highest action, (action_dim,) each; actions are clipped to them.
        state_dim: numbers of the observation's state.
        max_horizon: the simulator's own limit; None: there is none.

    Raises:
        ConfigError: an unknown camera, or a value out of range.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(
        self,
        task: str,
        instruction: str,
        *,
        cameras: Sequence[str],
        image_size: tuple[int, int],
        horizon: int,
        actions: tuple[NDArray[np.float32], NDArray[np.float32]],
        state_dim: int,
        max_horizon: int | None = None,
    ) -> None:
        if horizon < 1 or (max_horizon is not None and horizon > max_horizon):
            raise ConfigError(f"horizon is {horizon}; expected 1 or more{_at_most(max_horizon)}.")
        if min(image_size) < 1:
            raise ConfigError(f"image_size is {image_size}; expected 1 or more pixels on each side.")
        known = [self._model.camera(i).name for i in range(self._model.ncam)]
        for camera in cameras:
            if camera not in known:
                raise unknown(f"camera of {task}", camera, known)
        if not cameras or len(set(cameras)) != len(tuple(cameras)):
            raise ConfigError(f"cameras are {tuple(cameras)}; expected one or more different names.")
        self._task, self._instruction, self._cameras = task, instruction, tuple(cameras)
        self._size, self._horizon = image_size, horizon
        self._renderer: FastRenderer | None = None
        self._film_renderer: FastRenderer | None = None
        self._scratch: Any = None
        self._steps: int | None = None
        self._moment = 0
        self._frames: dict[str, Frame] = {}
        low, high = actions
        self.action_space = spaces.Box(low, high, dtype=np.float32)
        image = spaces.Box(0, 255, (*image_size, 3), np.uint8)
        self.observation_space: Any = spaces.Dict(
            images=spaces.Dict(dict.fromkeys(self._cameras, image)),
            state=spaces.Box(-np.inf, np.inf, (state_dim,), np.float32),
            task=spaces.Text(max_length=200, charset=frozenset(instruction)),
        )

    # ---- what a suite says

    @property
    @abstractmethod
    def _model(self) -> Any:
        """The `mujoco.MjModel`; there before this class's constructor runs."""

    @property
    @abstractmethod
    def _data(self) -> Any:
        """The `mujoco.MjData`."""

    @abstractmethod
    def _apply(self, action: NDArray[np.float32]) -> tuple[float, bool, bool]:
        """One step of the simulator with a clipped action: (reward, success, terminated)."""

    @abstractmethod
    def _state(self) -> NDArray[np.float32]:
        """The observation's state now, (state_dim,)."""

    def _deliver(self, camera: str, frame: Frame, steps: int) -> Frame:
        """A rendered frame as it is delivered after some steps of the episode, e.g. turned."""
        return frame

    def _new_renderer(self, size: tuple[int, int]) -> FastRenderer:
        """A renderer of (height, width) pixels."""
        return FastRenderer(self._model, *size)

    # ---- the environment

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras in the observation."""
        return self._cameras

    @property
    def task(self) -> str:
        """The task's name."""
        return self._task

    @property
    def instruction(self) -> str:
        """The task in words."""
        return self._instruction

    @property
    def horizon(self) -> int:
        """Steps after which an episode is truncated."""
        return self._horizon

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Apply one action; (observation, reward, terminated, truncated, {"success": bool}).

        Raises:
            DataError: the action has another shape, or a value is not finite.
            ConfigError: the episode has not begun or is over.
        """
        low, high = self.action_space.low, self.action_space.high
        action = check_step(action, low, high, self, self._steps)
        assert self._steps is not None
        reward, success, terminated = self._apply(np.clip(action, low, high))
        self._steps += 1
        return self._observe(), reward, terminated, self._steps >= self._horizon, {"success": success}

    def close(self) -> None:
        """Free the renderer; harmless when repeated."""
        for renderer in (self._renderer, self._film_renderer):
            if renderer is not None:
                renderer.close()
        self._renderer = self._film_renderer = None

    def film(self) -> dict[str, NDArray[np.uint8]]:
        """Every camera now, for people to watch: (H, W, 3) uint8, no side below `FILM_SIZE` pixels."""
        scale = FILM_SIZE / min(self._size)
        if scale <= 1:
            return {camera: self._frame(camera)[0] for camera in self._cameras}
        if self._film_renderer is None:
            height, width = (round(scale * side) for side in self._size)
            self._film_renderer = self._new_renderer((height, width))
        drawn = {camera: self._film_renderer.rgbd(self._data, camera) for camera in self._cameras}
        return {camera: self._deliver(camera, frame, self._steps or 0)[0] for camera, frame in drawn.items()}

    def moment(self) -> Moment:
        """What `draw` needs to show this moment later; about 0.1 ms and 50 kB."""
        data = {name: getattr(self._data, name).copy() for name in DRAWN_DATA}
        model = {name: getattr(self._model, name).copy() for name in DRAWN_MODEL}
        return Moment(data, model, self._steps or 0)

    def draw(self, moment: Moment) -> dict[str, Frame]:
        """Every camera as it was at a moment of this environment, whatever happened since."""
        import mujoco

        if self._scratch is None:
            self._scratch = mujoco.MjData(self._model)
        for name, values in moment.data.items():
            getattr(self._scratch, name)[:] = values
        now = {name: getattr(self._model, name).copy() for name in DRAWN_MODEL}
        try:
            for name, colours in moment.model.items():
                getattr(self._model, name)[:] = colours
            return {camera: self._rendered(camera, self._scratch, moment.steps) for camera in self._cameras}
        finally:
            for name, colours in now.items():
                getattr(self._model, name)[:] = colours

    def depth(self, camera: str) -> NDArray[np.float32]:
        """(H, W) float32 metres along the optical axis, now, aligned with the image.

        Costs nothing when the image has been read, and the other way round. The sky reads over 100 m.
        """
        return self._frame(self._check(camera))[1].copy()

    def camera_parameters(self, camera: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """K (3, 3) in pixels and world_from_camera (4, 4) of the image as delivered, at this moment.

        OpenCV axes; pixel (row i, column j) is centred at (j + 0.5, i + 0.5).
        """
        name = self._check(camera)
        return intrinsics(self._model, name, *self._size), extrinsics(self._data, name)

    # ---- for suites

    def _begin_episode(self) -> Observation:
        """The first observation of an episode that the simulator has just started."""
        self._steps = 0
        return self._observe()

    def _observe(self) -> Observation:
        self._moment += 1
        self._frames = {}
        moment = self._moment
        images = LazyImages(
            self._cameras, lambda camera: self._frame(camera)[0], lambda: moment == self._moment
        )
        return {"images": images, "state": self._state(), "task": self._instruction}

    def _frame(self, camera: str) -> Frame:
        """Image and depth of this moment, as delivered."""
        if camera not in self._frames:
            self._frames[camera] = self._rendered(camera, self._data, self._steps or 0)
        return self._frames[camera]

    def _rendered(self, camera: str, data: Any, steps: int) -> Frame:
        if self._renderer is None:  # physics alone (an expert's success rate) needs no GL context
            self._renderer = self._new_renderer(self._size)
        return self._deliver(camera, self._renderer.rgbd(data, camera), steps)

    def _check(self, camera: str) -> str:
        if camera not in self._cameras:
            raise unknown(f"camera of this {self._task}", camera, self._cameras)
        return camera


def _at_most(limit: int | None) -> str:
    return "" if limit is None else f", at most {limit}"
