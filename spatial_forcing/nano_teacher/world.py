"""A Meta-World scene without its task: random robot, objects, clutter and looks, seen by any camera."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.envs.camera import extrinsics
from spatial_forcing.envs.renderer import FastRenderer
from spatial_forcing.nano_teacher.cameras import Camera
from spatial_forcing.nano_teacher.tasks import scene_file

CLUTTER = 18
"""Primitive geoms that each scene has in store."""
TEXTURES = 10
WORKSPACE_LOW = np.array([-0.35, 0.4, 0.0])
WORKSPACE_HIGH = np.array([0.35, 0.95, 0.0])
CORNER_CAMERA = "corner4"
"""The usual corner view; it hangs upside down."""
WRIST_CAMERA = "gripperPOV"
OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0])


class TabletopWorld:
    """One compiled scene and its renderer. `close` it (or use `with`) to free the GL context.

    Args:
        task: a Meta-World task; only its scene file is used.
        size: pixels on a side of an image.
    """

    def __init__(self, task: str, size: int) -> None:
        import mujoco

        self.size = size
        spec = mujoco.MjSpec.from_file(str(scene_file(task)))
        _add_clutter(spec)
        self.model: Any = spec.compile()
        self.data: Any = mujoco.MjData(self.model)
        self._renderer = FastRenderer(self.model, size, size)
        m = self.model
        self._clutter = np.array([m.geom(f"clutter{i}").id for i in range(CLUTTER)])
        self._textures = np.array([m.texture(f"clutter{i}").id for i in range(TEXTURES)])
        self._materials = np.array([m.material(f"clutter{i}").id for i in range(TEXTURES)])
        self._hand = m.body("hand").id
        self._camera = m.camera("topview").id
        fixed = {"base", "tablelink", "RetainingWall", "mocap", "world"}
        self._objects = [
            i
            for i in range(1, m.nbody)
            if m.body_parentid[i] == 0 and m.body(i).name not in fixed and m.body_dofnum[i] != 6
        ]
        self._free = [m.jnt_qposadr[j] for j in range(m.njnt) if m.jnt_type[j] == mujoco.mjtJoint.mjJNT_FREE]
        self._hinges = [
            j
            for j in range(m.njnt)
            if m.jnt_type[j] != mujoco.mjtJoint.mjJNT_FREE
            and m.jnt_limited[j]
            and not m.joint(j).name.startswith(("right_j", "r_close", "l_close"))
        ]
        weld = m.eq_type == mujoco.mjtEq.mjEQ_WELD
        # Meta-World's own setting: the hand's pads, not its frame, follow the mocap body.
        m.eq_data[weld] = np.array([0.0, 0, 0, 0, 0, 0, -1.0, 0, 0, 0, 5.0])
        self._original = {name: getattr(m, name).copy() for name in _MUTABLE}
        self._headlight = m.vis.headlight.ambient.copy()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the GL context."""
        self._renderer.close()

    def reset(self, rng: np.random.Generator) -> None:
        """Everything as the scene file has it, but objects moved and the robot's hand at a random place."""
        import mujoco

        self._restore(self._original)
        mujoco.mj_resetData(self.model, self.data)
        for body in self._objects:
            self.model.body_pos[body, :2] += rng.normal(0, 0.06, 2)
            turn = np.zeros(4)
            mujoco.mju_axisAngle2Quat(turn, np.array([0.0, 0, 1]), rng.normal(0, 0.25))
            mujoco.mju_mulQuat(self.model.body_quat[body], turn, self._original["body_quat"][body])
        for start in self._free:
            self.data.qpos[start : start + 2] += rng.normal(0, 0.06, 2)
        self._drive(rng, steps=200)

    def advance(self, rng: np.random.Generator, *, plain: bool = False) -> None:
        """Move hand, gripper and the objects' joints to a new random state.

        Unless `plain`, colours, materials and lights are randomised and clutter is added.
        """
        import mujoco

        for joint in self._hinges:
            if rng.random() < 0.3:
                low, high = self.model.jnt_range[joint]
                self.data.qpos[self.model.jnt_qposadr[joint]] = rng.uniform(low, high)
        self._drive(rng, steps=60)
        self._restore(_APPEARANCE)
        self.model.geom_rgba[self._clutter, 3] = 0
        if not plain:
            self._appearance(rng)
            self._clutter_geoms(rng)
        mujoco.mj_camlight(self.model, self.data)

    def wrist_camera(self) -> Camera:
        """The simulator's own wrist camera, as it is now."""
        return self._fixed_camera(WRIST_CAMERA)

    def corner_camera(self) -> Camera:
        """The corner camera that policies of this benchmark use, turned upright."""
        camera = self._fixed_camera(CORNER_CAMERA)
        return Camera(camera.pose @ np.diag([-1.0, -1.0, 1.0, 1.0]), camera.fovy)

    def _fixed_camera(self, name: str) -> Camera:
        camera = self.model.camera(name).id
        return Camera(extrinsics(self.data, name), float(self.model.cam_fovy[camera]))

    def render(self, camera: Camera) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """RGB (size, size, 3) uint8 and depth along the optical axis (size, size) in metres."""
        self.data.cam_xpos[self._camera] = camera.pose[:3, 3]
        self.data.cam_xmat[self._camera] = (camera.pose[:3, :3] @ OPENGL_TO_OPENCV).ravel()
        self.model.cam_fovy[self._camera] = camera.fovy
        return self._renderer.rgbd(self.data, self._camera)

    def _restore(self, names: Iterable[str]) -> None:
        for name in names:
            getattr(self.model, name)[:] = self._original[name]
        self.model.vis.headlight.ambient[:] = self._headlight

    def _drive(self, rng: np.random.Generator, steps: int) -> None:
        import mujoco

        self.data.mocap_pos[0] = rng.uniform([-0.35, 0.42, 0.05], [0.35, 0.9, 0.4])
        self.data.mocap_quat[0] = [1, 0, 1, 0]
        opening = rng.uniform(-1, 1)
        self.data.ctrl[:2] = [opening, -opening]
        mujoco.mj_step(self.model, self.data, nstep=steps)
        if not (np.isfinite(self.data.qpos).all() and np.abs(self.data.qvel).max() < 1e3):
            mujoco.mj_resetData(self.model, self.data)
        mujoco.mj_forward(self.model, self.data)

    def _appearance(self, rng: np.random.Generator) -> None:
        m = self.model
        if rng.random() < 0.4:  # as the benchmark looks
            return
        m.light_diffuse[:] *= rng.uniform(0.4, 1.6, (m.nlight, 1))
        m.light_dir[:, :2] += rng.normal(0, 0.3, (m.nlight, 2))
        m.vis.headlight.ambient[:] *= rng.uniform(0.6, 1.4)
        if rng.random() < 0.4:
            return
        repaint = rng.random(m.ngeom) < rng.choice([0.15, 0.6])
        m.geom_matid[repaint] = rng.choice(self._materials, int(repaint.sum()))
        tint = repaint & (rng.random(m.ngeom) < 0.7) & (self._original["geom_rgba"][:, 3] > 0)
        m.geom_rgba[tint, :3] = rng.uniform(0.05, 1, (int(tint.sum()), 3))

    def _clutter_geoms(self, rng: np.random.Generator) -> None:
        """Group the stored primitives into random objects: on the table, above it, or in the gripper."""
        m, d = self.model, self.data
        ids = self._clutter
        used = 0
        objects = 0 if rng.random() < 0.15 else rng.integers(1, 8)
        for _ in range(objects):
            parts = int(rng.choice([1, 1, 2, 3, 5]))
            yaw = rng.uniform(-np.pi, np.pi)
            rotation = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
            scale = np.exp(rng.uniform(np.log(0.02), np.log(0.13)))
            origin = rng.uniform(WORKSPACE_LOW, WORKSPACE_HIGH)
            in_hand = rng.random() < 0.15
            if in_hand:
                origin = d.xpos[self._hand] - [0, 0, rng.uniform(0.08, 0.16)]
                scale = min(scale, 0.04)
            base = rng.integers(3)
            color = rng.uniform(0.05, 1, 3)
            for part in range(parts):
                if used == CLUTTER:
                    return
                geom = ids[used]
                used += 1
                size = scale * np.exp(rng.uniform(-1.3, 0.3, 3))
                kind = _KINDS[rng.integers(len(_KINDS))]
                m.geom_type[geom], m.geom_size[geom] = kind, size
                m.geom_rbound[geom] = np.linalg.norm(size) * 1.5
                offset = rotation @ (rng.uniform(-1, 1, 3) * scale) if part else np.zeros(3)
                height = 0.0 if in_hand else size[2 if kind in (6, 4) else (1 if kind == 5 else 0)]
                d.geom_xpos[geom] = origin + offset + [0, 0, height + (scale if part and not in_hand else 0)]
                turned = rotation if base or part else rotation @ _TIPPED
                d.geom_xmat[geom] = turned.ravel()
                m.geom_matid[geom] = rng.choice(self._materials) if rng.random() < 0.4 else -1
                m.geom_rgba[geom] = [*(color if rng.random() < 0.6 else rng.uniform(0.05, 1, 3)), 1]


_TIPPED = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
_KINDS = (6, 6, 6, 5, 5, 2, 3, 4)  # box, cylinder, sphere, capsule, ellipsoid as numbered by mjtGeom
_APPEARANCE = ("geom_matid", "geom_rgba", "light_diffuse", "light_dir")
_MUTABLE = (*_APPEARANCE, "body_pos", "body_quat", "cam_fovy")


def _add_clutter(spec: Any) -> None:
    """Spare primitives (no contacts) and procedural materials, to be placed and painted at run time."""
    import mujoco

    patterns = (mujoco.mjtBuiltin.mjBUILTIN_CHECKER, mujoco.mjtBuiltin.mjBUILTIN_GRADIENT)
    marks = (mujoco.mjtMark.mjMARK_NONE, mujoco.mjtMark.mjMARK_CROSS, mujoco.mjtMark.mjMARK_RANDOM)
    rng = np.random.default_rng(0)
    for i in range(TEXTURES):
        spec.add_texture(
            name=f"clutter{i}",
            type=mujoco.mjtTexture.mjTEXTURE_CUBE,
            builtin=patterns[i % 2],
            mark=marks[i % 3],
            width=32,
            height=32 * 6,
            rgb1=rng.uniform(0.1, 1, 3),
            rgb2=rng.uniform(0.1, 1, 3),
            markrgb=rng.uniform(0, 1, 3),
            random=0.1,
        )
        material = spec.add_material(name=f"clutter{i}", texrepeat=rng.uniform(1, 6, 2), texuniform=True)
        textures = list(material.textures)
        textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = f"clutter{i}"
        material.textures = textures
    for i in range(CLUTTER):
        spec.worldbody.add_geom(
            name=f"clutter{i}",
            type=mujoco.mjtGeom.mjGEOM_BOX,
            size=[0.02] * 3,
            pos=[0, 0, -0.5],
            contype=0,
            conaffinity=0,
            rgba=[1, 1, 1, 0],
        )
