"""robosuite's own tasks (Lift, Stack, PickPlaceCan, NutAssemblySquare, Door) with robomimic's conventions.

State, (9,) float32: hand position in metres, its rotation as a quaternion (x, y, z, w), finger positions (2).
Action, (7,) float32 in [-1, 1]: OSC_POSE's displacement and rotation, gripper (-1 open, +1 close), 20 Hz.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.envs.base import episode_start
from spatial_forcing.envs.gl import ensure_gl
from spatial_forcing.envs.robosuite_expert import RobosuiteExpert
from spatial_forcing.envs.robosuite_sim import CONTROL_HZ, RobosuiteSim, private_random
from spatial_forcing.envs.robosuite_tasks import CAMERAS, TASKS
from spatial_forcing.errors import ConfigError, EnvironmentSetupError
from spatial_forcing.protocols import Observation
from spatial_forcing.registry import unknown

STATE_DIM = 9


class RobosuiteEnv(RobosuiteSim):
    """One task of robosuite with a Panda arm; implements `protocols.Env`.

    `reset(seed=s)` determines the episode, whatever was played before. An episode ends with success, or is
    truncated after the horizon.

    Args:
        task: one of `robosuite_tasks.TASKS`, e.g. "robosuite-lift".
        cameras: the simulator's camera names.
        image_size: pixels on a side; robomimic's data have 84.
        horizon: steps until truncation; None: the task's.

    Raises:
        ConfigError: unknown task or camera, or a value out of range.
        EnvironmentSetupError: robosuite or a GL library is missing.
    """

    def __init__(
        self,
        task: str,
        *,
        cameras: Sequence[str] = CAMERAS,
        image_size: int = 84,
        horizon: int | None = None,
    ) -> None:
        if task not in TASKS:
            raise unknown("robosuite task", task, TASKS)
        with private_random(0):
            sim = _make_simulator(TASKS[task].env)
        super().__init__(
            sim,
            sim,
            task,
            TASKS[task].instruction,
            cameras=cameras,
            image_size=image_size,
            horizon=TASKS[task].horizon if horizon is None else horizon,
            state_dim=STATE_DIM,
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; `info["seed"]` repeats it.

        Args:
            seed: determines robot and objects; drawn from the previous seed's stream if None.
            options: `{"init_state": i}` is the same as `seed=EVALUATION_SEEDS[i]`.

        Raises:
            ConfigError: unknown option, or `init_state` out of range.
        """
        seed, _ = episode_start(seed, options)
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self._begin(seed)
        return self._begin_episode(), {"success": False, "seed": seed}

    def expert(self) -> RobosuiteExpert:
        """A scripted controller on privileged state. Raises `ConfigError` for a task without one."""
        return RobosuiteExpert(self._task)

    def target(self) -> NDArray[np.float64]:
        """Where the can belongs, (3,) in metres: the middle of its bin's floor. Privileged.

        Raises:
            ConfigError: the task has no bins.
        """
        if TASKS[self._task].env != "PickPlaceCan":
            raise ConfigError(f"{self._task} has no bins; only robosuite-can has.")
        return np.array(self._sim.target_bin_placements[self._sim.object_id], np.float64)

    def _state(self) -> NDArray[np.float32]:
        parts = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
        return np.concatenate([self._raw[part] for part in parts]).astype(np.float32)


def _make_simulator(name: str) -> Any:
    ensure_gl()  # before the import: robosuite chooses its GL backend when it is imported
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    try:
        import robosuite
    except ImportError as error:
        raise EnvironmentSetupError(
            f"robosuite cannot be imported ({error}). Run: pip install --no-deps robosuite==1.4.0, then "
            'pip install "spatial-forcing[libero]"'
        ) from error
    return robosuite.make(
        name,
        robots="Panda",
        controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
        control_freq=CONTROL_HZ,
        # Images are ours to render.
        use_camera_obs=False,
        has_renderer=False,
        has_offscreen_renderer=False,
        # A hard reset rebuilds the model, which takes seconds and memory that is not given back.
        hard_reset=False,
        ignore_done=True,
        reward_shaping=False,
    )
