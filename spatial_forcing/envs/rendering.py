"""Fast offscreen rendering of MuJoCo scenes without a display, and the cameras' geometry.

Conventions: metres; OpenCV camera axes (x right, y down, z forward); the centre of pixel (row i, column j)
is at (x, y) = (j + 0.5, i + 0.5), so that the principal point of an H x W image is (W / 2, H / 2).
"""

from __future__ import annotations

import atexit
import ctypes
import ctypes.util
import functools
import importlib
import os
import sys
import weakref
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.errors import ConfigError, EnvironmentSetupError
from spatial_forcing.registry import unknown

APT_LINE = "sudo apt-get install -y libegl1 libgl1"
"""Installs Mesa's software OpenGL on Debian and Ubuntu."""

Camera = str | int | Any
"""A camera's name, its id, or a `mujoco.MjvCamera`."""

_OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0])
_EGL_PLATFORM_DEVICE = 0x313F
_UNSET = {"", "1", "on", "true", "enable", "enabled"}
_OFF = {"0", "off", "false", "disable", "disabled"}


def ensure_gl() -> str:
    """Choose a GL backend that works without a display: "egl" or "osmesa". Fast after the first call.

    Sets the environment variable MUJOCO_GL when it is unset; honours it otherwise.

    Raises:
        EnvironmentSetupError: no backend works (the message has the apt line), or the one that
            MUJOCO_GL names does not.
    """
    wanted = os.environ.get("MUJOCO_GL", "").lower().strip()
    if sys.platform != "linux":
        return wanted or "native"
    if wanted in _OFF:
        raise EnvironmentSetupError(f"MUJOCO_GL={wanted} switches rendering off; run `unset MUJOCO_GL`.")
    if wanted in _UNSET:
        backend = next((name for name, works in _BACKENDS.items() if works()), None)
        if backend is None:
            raise EnvironmentSetupError(
                f"no OpenGL library for rendering was found (neither EGL nor OSMesa). Run: {APT_LINE}"
            )
        os.environ["MUJOCO_GL"] = backend
        return backend
    if wanted in _BACKENDS and not _BACKENDS[wanted]():
        raise EnvironmentSetupError(
            f"MUJOCO_GL={wanted}, but that library cannot be used here. "
            f"Run `unset MUJOCO_GL` to have one chosen, or: {APT_LINE}"
        )
    if wanted not in {*_BACKENDS, "glfw", "glx"}:
        raise unknown("MUJOCO_GL backend", wanted, {*_BACKENDS, "glfw"})
    return wanted


def _load(name: str, soname: str) -> ctypes.CDLL | None:
    for candidate in (soname, ctypes.util.find_library(name)):
        if candidate:
            try:
                return ctypes.CDLL(candidate)
            except OSError:
                continue
    return None


@functools.cache
def _egl_works() -> bool:
    """True when EGL has a device that can be initialised and desktop OpenGL is there."""
    egl = _load("EGL", "libEGL.so.1")
    if egl is None or (_load("OpenGL", "libOpenGL.so.0") or _load("GL", "libGL.so.1")) is None:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    query, display_of = (
        egl.eglGetProcAddress(name) for name in (b"eglQueryDevicesEXT", b"eglGetPlatformDisplayEXT")
    )
    if not (query and display_of):
        return False
    pointer = ctypes.c_void_p
    devices, count = (pointer * 16)(), ctypes.c_int(0)
    prototype = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.POINTER(pointer), pointer)
    if not prototype(query)(16, devices, ctypes.cast(ctypes.byref(count), pointer)):
        return False
    get_display = ctypes.CFUNCTYPE(pointer, ctypes.c_uint, pointer, pointer)(display_of)
    for device in devices[: count.value]:
        display = get_display(_EGL_PLATFORM_DEVICE, device, None)
        if display and egl.eglInitialize(pointer(display), None, None):
            return True
    return False


@functools.cache
def _osmesa_works() -> bool:
    return _load("OSMesa", "libOSMesa.so.8") is not None


_BACKENDS = {"egl": _egl_works, "osmesa": _osmesa_works}


def _new_context(height: int, width: int) -> Any:
    """A GL context of the backend that `ensure_gl` chose, even if mujoco was imported before the choice."""
    backend = ensure_gl()
    try:
        import mujoco  # noqa: F401
    except ImportError as error:
        raise EnvironmentSetupError(
            f"MuJoCo cannot be imported ({error}). Run: pip install mujoco"
        ) from error
    module = f"mujoco.{backend}" if backend in _BACKENDS else "mujoco.gl_context"
    try:
        return importlib.import_module(module).GLContext(width, height)
    except Exception as error:  # PyOpenGL and the drivers raise many types here
        raise EnvironmentSetupError(
            f"the {backend} renderer could not be started ({error}). Run: {APT_LINE}"
        ) from error


@functools.cache
def _close_at_exit() -> weakref.WeakSet[FastRenderer]:
    """Renderers to close at the interpreter's exit. Called after the first context is made, so that it runs
    before the GL library's own exit handler, after which contexts can no longer be freed.
    """
    renderers: weakref.WeakSet[FastRenderer] = weakref.WeakSet()

    def close_all() -> None:
        for renderer in list(renderers):
            renderer.close()

    atexit.register(close_all)
    return renderers


class FastRenderer:
    """Colour and depth without multisampling, shadows and reflections: about 14 times faster in software.

    A context manager; `close` frees the GL context. Not for several threads.

    Args:
        model: a `mujoco.MjModel`; its offscreen size and samples are changed.
        height, width: pixels.
        max_geom: geoms that a scene may hold.

    Attributes:
        option: the `mujoco.MjvOption` that says which groups of geoms and sites are drawn.

    Raises:
        ConfigError: `height` or `width` below 1.
        EnvironmentSetupError: no usable OpenGL library; see `ensure_gl`.
    """

    def __init__(self, model: Any, height: int, width: int, *, max_geom: int = 2000) -> None:
        if height < 1 or width < 1:
            raise ConfigError(f"an image of {height} x {width} pixels was asked for; both must be 1 or more.")
        self._gl = _new_context(height, width)
        import mujoco

        self.height, self.width = height, width
        # Must be set before the context is made: it allocates its buffers from them.
        model.vis.quality.offsamples = 0
        model.vis.global_.offheight = max(height, model.vis.global_.offheight)
        model.vis.global_.offwidth = max(width, model.vis.global_.offwidth)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        # Far away is 0, where floats are dense: precise depth at any distance.
        self._context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
        _close_at_exit().add(self)
        self._model = model
        self._scene = mujoco.MjvScene(model, maxgeom=max_geom)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._rect = mujoco.MjrRect(0, 0, width, height)
        self.option = mujoco.MjvOption()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def rgb(self, data: Any, camera: Camera) -> NDArray[np.uint8]:
        """(H, W, 3) uint8. Raises `ConfigError` for an unknown camera."""
        pixels = np.empty((self.height, self.width, 3), np.uint8)
        self._draw(data, camera, pixels, None)
        return pixels[::-1].copy()

    def depth(self, data: Any, camera: Camera) -> NDArray[np.float32]:
        """(H, W) float32, metres along the optical axis; pixels without a surface read the far plane."""
        buffer = np.empty((self.height, self.width), np.float32)
        self._draw(data, camera, None, buffer)
        return self._metres(buffer)

    def rgbd(self, data: Any, camera: Camera) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """`rgb` and `depth` from one drawing pass."""
        pixels = np.empty((self.height, self.width, 3), np.uint8)
        buffer = np.empty((self.height, self.width), np.float32)
        self._draw(data, camera, pixels, buffer)
        return pixels[::-1].copy(), self._metres(buffer)

    def close(self) -> None:
        """Free the GL context; harmless when repeated."""
        if self._gl is not None:
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._gl = None

    def _draw(
        self,
        data: Any,
        camera: Camera,
        pixels: NDArray[np.uint8] | None,
        depth: NDArray[np.float32] | None,
    ) -> None:
        import mujoco

        if self._gl is None:
            raise ConfigError("this renderer is closed; make a new FastRenderer.")
        self._gl.make_current()
        view = _view(self._model, camera)
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, data, self.option, None, view, everything, self._scene)
        mujoco.mjr_render(self._rect, self._scene, self._context)
        mujoco.mjr_readPixels(pixels, depth, self._rect, self._context)

    def _metres(self, buffer: NDArray[np.float32]) -> NDArray[np.float32]:
        """Reversed depth buffer (1 at the near plane, 0 at the far one, linear in 1 / z) to metres."""
        extent = self._model.stat.extent
        near, far = self._model.vis.map.znear * extent, self._model.vis.map.zfar * extent
        inverse = 1 / far + buffer[::-1].astype(np.float64) * (1 / near - 1 / far)
        return (1 / inverse).astype(np.float32)


def _camera_id(model: Any, camera: str | int) -> int:
    names = [model.camera(i).name for i in range(model.ncam)]
    if isinstance(camera, str):
        if camera not in names:
            raise unknown("camera", camera, names)
        return names.index(camera)
    if not 0 <= camera < model.ncam:
        raise ConfigError(f"camera id {camera} is out of range; the model has {model.ncam} cameras: {names}.")
    return int(camera)


def _view(model: Any, camera: Camera) -> Any:
    import mujoco

    if isinstance(camera, mujoco.MjvCamera):
        return camera
    view = mujoco.MjvCamera()
    view.type = mujoco.mjtCamera.mjCAMERA_FIXED
    view.fixedcamid = _camera_id(model, camera)
    return view


def intrinsics(model: Any, camera: Camera, height: int, width: int) -> NDArray[np.float64]:
    """(3, 3) pinhole matrix of an image of `height` x `width` pixels, also if it is turned by 180 degrees.

    Raises:
        ConfigError: unknown camera.
    """
    import mujoco

    view = _view(model, camera)
    fixed = view.type == mujoco.mjtCamera.mjCAMERA_FIXED
    fovy = model.cam_fovy[view.fixedcamid] if fixed else model.vis.global_.fovy
    focal = 0.5 * height / np.tan(np.deg2rad(fovy) / 2)
    return np.array([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])


def extrinsics(data: Any, camera: Camera, *, rotated: bool = False) -> NDArray[np.float64]:
    """(4, 4) world-from-camera, OpenCV axes, metres.

    Args:
        data: a `mujoco.MjData` after `mj_forward`.
        camera: name, id, or a fixed or free `mujoco.MjvCamera`.
        rotated: the image was turned by 180 degrees (`image[::-1, ::-1]`) after rendering.

    Raises:
        ConfigError: unknown camera, or an MjvCamera that tracks a body.
    """
    import mujoco

    view = _view(data.model, camera)
    pose = np.eye(4)
    if view.type == mujoco.mjtCamera.mjCAMERA_FIXED:
        pose[:3, :3] = data.cam_xmat[view.fixedcamid].reshape(3, 3) @ _OPENGL_TO_OPENCV
        pose[:3, 3] = data.cam_xpos[view.fixedcamid]
    elif view.type == mujoco.mjtCamera.mjCAMERA_FREE:
        azimuth, elevation = np.deg2rad(view.azimuth), np.deg2rad(view.elevation)
        level = np.array([np.cos(azimuth), np.sin(azimuth), 0.0])
        forward = np.cos(elevation) * level + [0.0, 0.0, np.sin(elevation)]
        right = np.array([np.sin(azimuth), -np.cos(azimuth), 0.0])
        pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
        pose[:3, 3] = view.lookat - view.distance * forward
    else:
        raise ConfigError("extrinsics are known for fixed and free cameras only, not for tracking ones.")
    if rotated:
        pose[:3, :2] *= -1
    return pose


def backproject(
    depth: NDArray[np.floating[Any]], K: NDArray[np.float64], world_from_camera: NDArray[np.float64]
) -> NDArray[np.float64]:
    """World point of every pixel's centre: (H, W) metres -> (H, W, 3) metres."""
    height, width = depth.shape
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    rays = np.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], np.ones_like(x)], axis=-1)
    points: NDArray[np.float64] = (rays * depth[..., None]) @ world_from_camera[:3, :3].T + world_from_camera[
        :3, 3
    ]
    return points


def project(
    points: NDArray[np.float64], K: NDArray[np.float64], world_from_camera: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """World points (..., 3) -> pixels (x, y) (..., 2) and depth (...,) in metres, negative when behind."""
    local = (points - world_from_camera[:3, 3]) @ world_from_camera[:3, :3]
    image = local @ K.T
    return image[..., :2] / image[..., 2:], local[..., 2]
