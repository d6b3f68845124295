"""What LIBERO and robosuite's own tasks share: robosuite behind `SimulatedEnv`, repeatable by a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.envs.renderer import FastRenderer
from spatial_forcing.envs.simulated import SimulatedEnv

ACTION_DIM = 7
CONTROL_HZ = 20


class RobosuiteSim(SimulatedEnv):
    """A task of robosuite's; the action is OSC_POSE's: displacement, rotation, gripper (-1 open, +1 close).

    Args:
        sim: robosuite's environment, or a wrapper with its `reset`, `step`, `robots` and `sim`.
        scene: robosuite's environment itself, whose `model` is the scene's description.
        state_dim: numbers of the state.
        task, instruction, cameras, image_size, horizon: see `SimulatedEnv`.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "render_fps": CONTROL_HZ}

    def __init__(
        self,
        sim: Any,
        scene: Any,
        task: str,
        instruction: str,
        *,
        cameras: Sequence[str],
        image_size: int,
        horizon: int,
        state_dim: int,
    ) -> None:
        self._sim = sim
        self._raw: dict[str, Any] = {}
        super().__init__(
            task,
            instruction,
            cameras=cameras,
            image_size=(image_size, image_size),
            horizon=horizon,
            actions=(-np.ones(ACTION_DIM, np.float32), np.ones(ACTION_DIM, np.float32)),
            state_dim=state_dim,
        )
        self._unplaced = _unplaced(scene)

    def close(self) -> None:
        """Free the renderer and the simulator; harmless when repeated."""
        super().close()
        if self._sim is not None:
            self._sim.close()
            self._sim = None

    def objects(self) -> dict[str, NDArray[np.float64]]:
        """Positions (3,) in metres of all objects by name. Privileged."""
        suffix = "_pos"
        return {
            key.removesuffix(suffix): np.array(value, np.float64)
            for key, value in self._raw.items()
            if key.endswith(suffix) and not key.startswith("robot0") and "_to_" not in key
        }

    def hand(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Hand position (3,) in metres and finger positions (2,)."""
        return np.array(self._raw["robot0_eef_pos"]), np.array(self._raw["robot0_gripper_qpos"])

    # ---- for suites

    @property
    def _model(self) -> Any:
        return self._sim.sim.model._model

    @property
    def _data(self) -> Any:
        return self._sim.sim.data._data

    def _begin(self, placement: int) -> None:
        """Soft reset with robot and objects placed as by the seed `placement`."""
        # What the simulator's own soft reset forgets: where fixtures were before they were placed (objects on
        # them are placed relative to that), and the gripper's last command.
        self._model.body_pos[:], self._model.body_quat[:] = self._unplaced
        for robot in self._sim.robots:
            robot.gripper.current_action = np.zeros_like(robot.gripper.current_action)
        with private_random(placement):
            self._raw = self._sim.reset()

    def _apply(self, action: NDArray[np.float32]) -> tuple[float, bool, bool]:
        self._raw, reward, _, _ = self._sim.step(action)
        success = bool(self._sim._check_success())
        return float(reward), success, success

    def _new_renderer(self, size: tuple[int, int]) -> FastRenderer:
        renderer = super()._new_renderer(size)
        renderer.option.geomgroup[0] = 0  # collision shapes
        renderer.option.sitegroup[:] = 0
        return renderer


@contextmanager
def private_random(seed: int) -> Iterator[None]:
    """The simulator draws from numpy's global stream; ours is put back afterwards."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


def _unplaced(scene: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions and orientations of all bodies as the scene's description has them, before any placement."""
    import mujoco

    model = mujoco.MjModel.from_xml_string(scene.model.get_xml())
    return model.body_pos.copy(), model.body_quat.copy()
