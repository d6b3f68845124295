"""The two tasks of gym-aloha: bimanual, 14 absolute joint positions, 50 Hz; the simulated robot of `deploy`.

gym-aloha renders three 480 x 640 views at every step; here the same physics and rewards run through
dm_control, and only the cameras that are read are rendered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.envs.base import episode_start
from spatial_forcing.envs.gl import ensure_gl
from spatial_forcing.envs.simulated import SimulatedEnv
from spatial_forcing.errors import EnvironmentSetupError
from spatial_forcing.protocols import Observation
from spatial_forcing.registry import unknown

INSTRUCTIONS = {
    "aloha-transfer-cube": "pick up the cube with the right arm and transfer it to the left arm",
    "aloha-insertion": "insert the peg into the socket",
}
CAMERAS = ("top", "left_wrist", "right_wrist")
"""Default views, those of the real robot: from above and from both wrists."""
JOINTS = tuple(
    f"{side}_{joint}"
    for side in ("left", "right")
    for joint in ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
)
"""Order of state and action: joint angles in radians, gripper 0 (closed) to 1 (open)."""
CONTROL_HZ = 50
SOLVED = 4
"""Reward that means success."""
MAX_HORIZON = 2000


class AlohaEnv(SimulatedEnv):
    """One simulated ALOHA task; implements `protocols.Env`.

    Observation: `images` (H, W, 3) uint8 by camera, rendered when read; `state` (14,) float32 in the order of
    `JOINTS`; `task`: the instruction. Action: (14,) float32, the absolute joint positions to go to, grippers
    0 to 1; clipped to the robot's limits. 50 steps a second. An episode is truncated after `horizon` steps
    and never terminated: `info["success"]` says when the task is solved. `reset(seed=s)` determines it.

    Args:
        task: "aloha-transfer-cube" or "aloha-insertion".
        cameras: the simulator's camera names.
        image_size: pixels on a side, or (height, width).
        horizon: steps until truncation; gym-aloha's own is 300.

    Raises:
        ConfigError: unknown task or camera, or a value out of range.
        EnvironmentSetupError: gym-aloha or a GL library is not installed.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "render_fps": CONTROL_HZ}

    def __init__(
        self,
        task: str,
        *,
        cameras: Sequence[str] = CAMERAS,
        image_size: int | tuple[int, int] = 224,
        horizon: int = 300,
    ) -> None:
        if task not in INSTRUCTIONS:
            raise unknown("ALOHA task", task, INSTRUCTIONS)
        self._sim, self._place = _make_simulator(task)
        self._joints = np.zeros(len(JOINTS), np.float32)
        super().__init__(
            task,
            INSTRUCTIONS[task],
            cameras=cameras,
            image_size=(image_size, image_size) if isinstance(image_size, int) else image_size,
            horizon=horizon,
            actions=_joint_limits(self._model),
            state_dim=len(JOINTS),
            max_horizon=MAX_HORIZON,
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; `info["seed"]` repeats it.

        Args:
            seed: determines where the objects lie; drawn from the previous seed's stream if None.
            options: `{"init_state": i}` is the same as `seed=EVALUATION_SEEDS[i]`.

        Raises:
            ConfigError: unknown option, or `init_state` out of range.
        """
        seed, _ = episode_start(seed, options)
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self._place(seed)
        self._joints = np.asarray(self._sim.reset().observation["qpos"], np.float32)
        return self._begin_episode(), {"success": False, "seed": seed}

    def close(self) -> None:
        """Free the renderer and the simulator; harmless when repeated."""
        super().close()
        self._sim.close()

    @property
    def _model(self) -> Any:
        return self._sim.physics.model.ptr

    @property
    def _data(self) -> Any:
        return self._sim.physics.data.ptr

    def _apply(self, action: NDArray[np.float32]) -> tuple[float, bool, bool]:
        moved = self._sim.step(action)
        self._joints = np.asarray(moved.observation["qpos"], np.float32)
        return float(moved.reward), moved.reward == SOLVED, False

    def _state(self) -> NDArray[np.float32]:
        return self._joints.copy()


def _make_simulator(task: str) -> tuple[Any, Any]:
    """The dm_control environment without its rendering, and a function that places the objects of a seed."""
    ensure_gl()  # before the import: dm_control and mujoco choose their GL backend when they are imported
    try:
        from dm_control import mujoco
        from dm_control.rl import control
        from gym_aloha.constants import ASSETS_DIR, DT
        from gym_aloha.tasks import sim
        from gym_aloha.utils import sample_box_pose, sample_insertion_pose
    except ImportError as error:
        raise EnvironmentSetupError(
            f'gym-aloha cannot be imported ({error}). Run: pip install "spatial-forcing[aloha]"'
        ) from error

    cube = task == "aloha-transfer-cube"
    base = sim.TransferCubeTask if cube else sim.InsertionTask

    class Task(base):  # type: ignore[valid-type, misc]
        """The task as it is, except for the images."""

        def get_observation(self, physics: Any) -> dict[str, Any]:
            return {"qpos": self.get_qpos(physics)}

    def place(seed: int) -> None:
        # The task reads this global when it resets; gym-aloha hands the scene over in the same way.
        sim.BOX_POSE[0] = sample_box_pose(seed) if cube else np.concatenate(sample_insertion_pose(seed))

    name = "transfer_cube" if cube else "insertion"
    physics = mujoco.Physics.from_xml_path(str(ASSETS_DIR / f"bimanual_viperx_{name}.xml"))
    environment = control.Environment(
        physics, Task(), float("inf"), control_timestep=DT, n_sub_steps=None, flat_observation=False
    )
    return environment, place


def _joint_limits(model: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Lowest and highest action: the actuators' ranges, grippers as 0 to 1."""
    ranges = np.asarray(model.actuator_ctrlrange, np.float32)
    arms = [*ranges[0:6], (0, 1), *ranges[8:14], (0, 1)]  # two actuators a gripper
    limits = np.asarray(arms, np.float32)
    return limits[:, 0], limits[:, 1]
