"""LIBERO tasks with images rendered only when they are read, the official initial states, and an expert.

State, (8,) float32: hand position in metres, its rotation as axis times angle, both finger positions.
Action, (7,) float32 in [-1, 1]: displacement, rotation, gripper (-1 open, +1 close), 20 Hz.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.envs.base import EVALUATION_SEEDS, episode_start
from spatial_forcing.envs.libero_conventions import (
    NO_OP,
    Orientation,
    Rotation,
    check_conventions,
    oriented,
    oriented_intrinsics,
    quat_to_axis_angle,
)
from spatial_forcing.envs.libero_expert import LiberoExpert
from spatial_forcing.envs.libero_plus import NONE, Perturbation
from spatial_forcing.envs.libero_setup import (
    bddl_file,
    init_states,
    instruction_of,
    libero,
    require_suite,
    task_entry,
    uses_stand_ins,
)
from spatial_forcing.envs.libero_tasks import HORIZONS, INIT_STATES, Horizons, parse_task
from spatial_forcing.envs.robosuite_sim import RobosuiteSim, private_random
from spatial_forcing.envs.robosuite_tasks import CAMERAS
from spatial_forcing.envs.simulated import Frame
from spatial_forcing.protocols import Observation
from spatial_forcing.registry import unknown

STATE_DIM = 8
SETTLE_STEPS = 10
"""Steps without motion after every reset, while objects come to rest; not counted in the horizon."""


class LiberoEnv(RobosuiteSim):
    """One LIBERO task; implements `protocols.Env`.

    `reset(seed=EVALUATION_SEEDS[i])`, or `options={"init_state": i}`, starts from official state i (modulo
    50), with fixtures placed as by seed 0; every other seed draws the placement of all objects from the
    task's own distribution. Either fully determines the episode, whatever was played before. An episode
    ends with success, or is truncated after the horizon.

    Args:
        task: a name like "libero_spatial-3".
        cameras: the simulator's camera names.
        image_size: pixels on a side.
        horizon: steps until truncation; None: the suite's, by `horizons`.
        horizons: whose numbers: "openvla" or "lerobot".
        orientation: of the images: "openvla" (as in all published data: mirrored) or "upright".
        rotation: of the state: "openvla" or "canonical" (angles up to pi).
        perturbation: camera, light and noise changes; see `libero_plus`.

    Raises:
        ConfigError: unknown task, camera or convention, or a value out of range.
        EnvironmentSetupError: LIBERO, its assets or a GL library are missing.
    """

    def __init__(
        self,
        task: str,
        *,
        cameras: Sequence[str] = CAMERAS,
        image_size: int = 256,
        horizon: int | None = None,
        horizons: Horizons = "openvla",
        orientation: Orientation = "openvla",
        rotation: Rotation = "openvla",
        perturbation: str = NONE,
    ) -> None:
        suite, _ = parse_task(task)
        check_conventions(orientation, rotation)
        require_suite(task)
        if horizons not in HORIZONS:
            raise unknown("horizons", horizons, HORIZONS)
        self._orientation, self._rotation = orientation, rotation
        self._perturbation = Perturbation.parse(perturbation)
        self._inits = init_states(task)
        with private_random(0):
            sim = _make_simulator(task)
        super().__init__(
            sim,
            sim.env,
            task,
            instruction_of(task_entry(task)),
            cameras=cameras,
            image_size=image_size,
            horizon=HORIZONS[horizons][suite] if horizon is None else horizon,
            state_dim=STATE_DIM,
        )
        self._perturbation.apply(self._model, self._cameras)

    @property
    def stand_ins(self) -> bool:
        """Whether stand-in assets are shown: success rates are then not comparable with published ones."""
        return uses_stand_ins()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode and let objects settle; see the class for what `seed` means.

        Raises:
            ConfigError: unknown option, or `init_state` out of range.
        """
        seed, init = _start_of(seed, options)
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(len(EVALUATION_SEEDS)))
        self._begin(0 if init is not None else seed)
        if init is not None:
            self._sim.set_init_state(self._inits[init % len(self._inits)])
        return self._settle(seed), {"success": False, "seed": seed, "init_state": init}

    def expert(self) -> LiberoExpert:
        """A scripted controller on privileged state, for tasks of the form "pick up A and place it on B"."""
        return LiberoExpert(self._task)

    def simulator_state(self) -> NDArray[np.float64]:
        """The flattened simulator state, as the official initial states have it. Privileged."""
        return np.asarray(self._sim.get_sim_state(), np.float64)

    def replay_from(self, state: NDArray[np.float64]) -> Observation:
        """Start an episode at a recorded simulator state, let objects settle, and observe."""
        self._begin(0)
        self._sim.set_init_state(state)
        return self._settle(0)

    def objects_of_interest(self) -> tuple[str, ...]:
        """The objects that the goal names, in its order."""
        return tuple(self._sim.env.obj_of_interest)

    def camera_parameters(self, camera: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """See `SimulatedEnv`; of the oriented image."""
        K, pose = super().camera_parameters(camera)
        return oriented_intrinsics(K, self._size[0], self._orientation), pose

    def _settle(self, seed: int) -> Observation:
        self._perturbation.begin(seed)
        for _ in range(SETTLE_STEPS):
            self._raw, _, _, _ = self._sim.step(NO_OP)
        return self._begin_episode()

    def _apply(self, action: NDArray[np.float32]) -> tuple[float, bool, bool]:
        self._raw, reward, done, _ = self._sim.step(action)  # LIBERO's `done` is its success
        return float(reward), bool(done), bool(done)

    def _state(self) -> NDArray[np.float32]:
        raw = self._raw
        turn = quat_to_axis_angle(raw["robot0_eef_quat"], self._rotation)
        return np.concatenate([raw["robot0_eef_pos"], turn, raw["robot0_gripper_qpos"]]).astype(np.float32)

    def _deliver(self, camera: str, frame: Frame, steps: int) -> Frame:
        rgb = self._perturbation.noise(frame[0], steps, camera)
        return oriented(rgb, self._orientation), oriented(frame[1], self._orientation)


def _make_simulator(task: str) -> Any:
    return libero().ControlEnv(
        bddl_file_name=str(bddl_file(task)),
        # Images are ours to render; its own would cost four fifths of an episode.
        use_camera_obs=False,
        has_offscreen_renderer=False,
        # A hard reset rebuilds the model, which takes seconds and memory that is not given back.
        hard_reset=False,
        ignore_done=True,
    )


def _start_of(seed: int | None, options: dict[str, Any] | None) -> tuple[int | None, int | None]:
    """The episode's seed, and the official initial state, where it has one."""
    seed, init = episode_start(seed, options, INIT_STATES)
    if init is not None:
        return seed, init
    if seed is not None and seed in EVALUATION_SEEDS:
        return seed, (seed - EVALUATION_SEEDS[0]) % INIT_STATES
    return seed, None
