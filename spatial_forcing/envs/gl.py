"""The OpenGL library that renders without a display, and contexts of it."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib
import os
import sys
from typing import Any

from spatial_forcing.errors import EnvironmentSetupError
from spatial_forcing.registry import unknown

APT_LINE = "sudo apt-get install -y libegl1 libgl1"
"""Installs Mesa's software OpenGL on Debian and Ubuntu."""

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


def new_context(height: int, width: int) -> Any:
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
