"""How much memory a call needs at its peak."""

from __future__ import annotations

import ctypes
import gc
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def peak_over(run: Callable[[], object]) -> float:
    """Bytes of resident memory that `run` needs at its peak, over what the process holds before it (Linux).

    What was freed earlier is first given back to the system: otherwise `run` fills it again, and a process
    that had peaked while loading (weights read in float32, then lowered) would seem to need nothing. The
    kernel's high-water mark is reset where it lets us, else the resident set is sampled every millisecond.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    if not _reset_mark():
        return _sampled(run)
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """Bytes of a line of /proc/self/status: `VmRSS` now, `VmHWM` the high-water mark."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024.0 * int(found[1])


def _reset_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    # Some sandboxes take the command and do nothing.
    return resident("VmHWM") - resident("VmRSS") < 2**24


def _sampled(run: Callable[[], object]) -> float:
    before = highest = resident("VmRSS")
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, resident("VmRSS"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return max(highest, resident("VmRSS")) - before
