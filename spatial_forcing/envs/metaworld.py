"""Meta-World 3.1.1 tasks with images, and the scripted experts that solve them.

The observation holds what a robot could know: images, hand position, gripper and the instruction. The
simulator's object and goal positions are reachable through methods for experts and probes only.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.envs.base import episode_start
from spatial_forcing.envs.camera import extrinsics
from spatial_forcing.envs.gl import ensure_gl
from spatial_forcing.envs.metaworld_tasks import INSTRUCTIONS
from spatial_forcing.envs.simulated import Frame, SimulatedEnv
from spatial_forcing.errors import EnvironmentSetupError
from spatial_forcing.protocols import Observation
from spatial_forcing.registry import unknown

CAMERAS = ("corner2", "gripperPOV")
"""Default views: over the table's corner, and from the wrist."""
STATE_DIM = 4
ACTION_DIM = 4
MAX_HORIZON = 500
CORNER2_POSITION = (0.75, 0.075, 0.7)
"""Closer to the table than the benchmark's own, as LeRobot places it."""
ROTATED_CAMERAS = frozenset({"corner", "corner2", "corner3", "corner4"})
"""Mounted upside down in the simulator; their images are turned by 180 degrees."""


class MetaWorldEnv(SimulatedEnv):
    """One Meta-World task; implements `protocols.Env`.

    Observation: `images` (image_size, image_size, 3) uint8 by camera, upright, rendered when read; `state`
    (4,) float32: hand position in metres and gripper opening in [0, 1]; `task`: the instruction.
    Action: (4,) float32 in [-1, 1]: hand displacement (1 = 1 cm a step) and gripper effort; clipped.
    An episode is truncated after `horizon` steps and never terminated: `info["success"]` says when the task
    is solved.

    `reset(seed=s)` fully determines the episode, whatever was played before.

    Args:
        task: a name like "reach-v3".
        cameras: the simulator's camera names.
        image_size: pixels on a side.
        horizon: steps until truncation, at most 500. Experts need 45 to 145.

    Raises:
        ConfigError: unknown task or camera, or a value out of range.
        EnvironmentSetupError: Meta-World or a GL library is not installed.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "render_fps": 80}

    def __init__(
        self, task: str, *, cameras: Sequence[str] = CAMERAS, image_size: int = 128, horizon: int = 200
    ) -> None:
        if task not in INSTRUCTIONS:
            raise unknown("Meta-World task", task, INSTRUCTIONS)
        self._sim = _make_simulator(task)
        self._full = np.zeros(0)
        super().__init__(
            task,
            INSTRUCTIONS[task],
            cameras=cameras,
            image_size=(image_size, image_size),
            horizon=horizon,
            actions=(-np.ones(ACTION_DIM, np.float32), np.ones(ACTION_DIM, np.float32)),
            state_dim=STATE_DIM,
            max_horizon=MAX_HORIZON,
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; `info["seed"]` repeats it.

        Args:
            seed: determines object and goal positions; drawn from the previous seed's stream if None.
            options: `{"init_state": i}` is the same as `seed=EVALUATION_SEEDS[i]`.

        Raises:
            ConfigError: unknown option, or `init_state` out of range.
        """
        scene, _ = episode_start(seed, options)
        super().reset(seed=scene)
        if scene is None:
            scene = int(self.np_random.integers(2**31))
        self._full = _start_episode(self._sim, scene)
        return self._begin_episode(), {"success": False, "seed": scene}

    def close(self) -> None:
        """Free the renderer and the simulator; harmless when repeated."""
        super().close()
        self._sim.close()

    def expert(self) -> MetaWorldExpert:
        """The benchmark's scripted expert for this task (privileged: it sees object and goal positions)."""
        return MetaWorldExpert(self._task)

    def privileged_state(self) -> NDArray[np.float64]:
        """Copy of the simulator's (39,) observation, with object and goal positions. Not for policies."""
        return self._full.copy()

    def goal_position(self) -> NDArray[np.float64]:
        """(3,) metres, world frame. Privileged."""
        return np.array(self._sim._target_pos, np.float64)

    def camera_parameters(self, camera: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """See `SimulatedEnv`; of an image that is turned, too."""
        K, _ = super().camera_parameters(camera)
        return K, extrinsics(self._data, camera, rotated=camera in ROTATED_CAMERAS)

    @property
    def _model(self) -> Any:
        return self._sim.model

    @property
    def _data(self) -> Any:
        return self._sim.data

    def _apply(self, action: NDArray[np.float32]) -> tuple[float, bool, bool]:
        self._full, reward, _, _, info = self._sim.step(action)
        return float(reward), bool(info["success"]), False

    def _state(self) -> NDArray[np.float32]:
        return self._full[:STATE_DIM].astype(np.float32)

    def _deliver(self, camera: str, frame: Frame, steps: int) -> Frame:
        rgb, depth = frame
        return (_turned(rgb), _turned(depth)) if camera in ROTATED_CAMERAS else frame


class MetaWorldExpert:
    """A scripted policy on privileged state.

    Args:
        task: a name like "reach-v3".
    """

    def __init__(self, task: str) -> None:
        from metaworld.policies import ENV_POLICY_MAP

        self._policy = ENV_POLICY_MAP[task]()

    def action(self, env: MetaWorldEnv) -> NDArray[np.float32]:
        """(4,) float32 in [-1, 1] for the environment's present state."""
        with warnings.catch_warnings():
            # It warns that its actions leave [-1, 1]; they are clipped here.
            warnings.simplefilter("ignore")
            action = self._policy.get_action(env.privileged_state())
        return np.clip(np.asarray(action, np.float32), -1, 1)


def _make_simulator(task: str) -> Any:
    # Before the import: mujoco chooses its GL backend when it is imported.
    ensure_gl()
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    except ImportError as error:
        raise EnvironmentSetupError(
            f'Meta-World cannot be imported ({error}). Run: pip install "spatial-forcing[metaworld]"'
        ) from error
    sim = ALL_V3_ENVIRONMENTS[task]()
    # Draw positions from the seeded generator, and put the goal into the full observation, for the expert.
    sim._set_task_called, sim._freeze_rand_vec, sim.seeded_rand_vec = True, False, True
    sim._partially_observable = False
    sim.__dict__.pop("sawyer_observation_space", None)  # cached with the goal masked to zero
    corner2 = sim.model.camera("corner2").id
    sim.model.cam_pos[corner2] = CORNER2_POSITION
    return sim


def _start_episode(sim: Any, seed: int) -> NDArray[np.float64]:
    """Reset the simulator to the scene of `seed`; returns the full (39,) observation."""
    import mujoco

    sim.seed(seed)
    # Places everything twice, from two draws, so that nothing of the episode before survives.
    sim.reset()
    for name, position in sim._target_site_config:
        site = sim.model.site(name)
        # Free markers; the others move with their object. Meta-World's own placing is lost at the next step.
        if site.bodyid[0] == 0:
            site.pos = position
            # A site compiled at its body's origin is taken to stay there: MuJoCo ignores its position.
            sim.model.site_sameframe[site.id] = mujoco.mjtSameFrame.mjSAMEFRAME_NONE
    # Some tasks place objects after the last forward pass, so that their own first observation is stale.
    mujoco.mj_forward(sim.model, sim.data)
    sim._prev_obs = sim._get_curr_obs_combined_no_goal()
    full: NDArray[np.float64] = np.asarray(sim._get_obs(), np.float64)
    return full


def _turned(image: NDArray[Any]) -> NDArray[Any]:
    return image[::-1, ::-1].copy()
