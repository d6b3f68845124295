"""Install Mesa's software OpenGL with apt when no usable library is found; standard library only.

`make gl` runs it before anything that renders. It never fails the build: where it cannot install, it
prints the line that the user has to run, and the quickstart repeats it if rendering really fails.
"""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess

PACKAGES = ["libegl1", "libgl1"]


def have_gl() -> bool:
    """True when EGL with desktop GL, or OSMesa, can be loaded."""
    find = ctypes.util.find_library
    return bool((find("EGL") and (find("GL") or find("OpenGL"))) or find("OSMesa"))


def apt() -> list[str] | None:
    """The apt-get command this user may run without a password, or None."""
    if shutil.which("apt-get") is None:
        return None
    if os.geteuid() == 0:
        return ["apt-get"]
    sudo = shutil.which("sudo")
    if sudo and subprocess.run([sudo, "-n", "true"], capture_output=True, check=False).returncode == 0:
        return [sudo, "-n", "apt-get"]
    return None


def main() -> None:
    """Report, or install and report."""
    remedy = f"sudo apt-get install -y {' '.join(PACKAGES)}"
    if have_gl():
        print("OpenGL: found, nothing to install.")
        return
    command = apt()
    if command is None:
        print(f"OpenGL: not found, and apt needs a password here. Run: {remedy}")
        return
    print(f"OpenGL: not found; running {' '.join([*command, 'install', '-y', *PACKAGES])}")
    subprocess.run([*command, "update", "-qq"], check=False)
    subprocess.run([*command, "install", "-y", "-qq", *PACKAGES], check=False)
    print("OpenGL: installed." if have_gl() else f"OpenGL: could not be installed. Run: {remedy}")


if __name__ == "__main__":
    main()
