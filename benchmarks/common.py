"""How every benchmark prints a figure: median, range, and the machine."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime

import torch


def show(what: str, values: Sequence[float], note: str = "") -> None:
    """Print median and range of repeated measurements."""
    middle = statistics.median(values)
    spread = f"min {min(values):,.4g}, max {max(values):,.4g}, n {len(values)}"
    print(f"{what}: median {middle:,.4g} ({spread}) {note}")
    load = os.getloadavg()[0]
    now = datetime.now(UTC).strftime("%Y-%m-%d")
    print(f"  {now}, {os.cpu_count()} cores {platform.machine()}, torch {torch.__version__}, load {load:.1f}")
