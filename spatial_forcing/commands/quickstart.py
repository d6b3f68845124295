"""`spatial-forcing quickstart`."""

from __future__ import annotations

from pathlib import Path

import tyro

from spatial_forcing.experiments.quickstart import QuickstartConfig, run_quickstart
from spatial_forcing.experiments.quickstart import smoke as smoke_config


def quickstart(config: tyro.conf.OmitArgPrefixes[QuickstartConfig], smoke: bool = False) -> None:
    """Record, cache, train with and without spatial forcing, evaluate, probe, report.

    Args:
        config: settings; the defaults take about ten minutes on two cores.
        smoke: run every stage at toy size (only --output is read); its numbers mean nothing.
    """
    default = QuickstartConfig()
    if smoke:
        output = config.output if config.output != default.output else Path("quickstart-smoke")
        config = smoke_config(output)
    run_quickstart(config)
