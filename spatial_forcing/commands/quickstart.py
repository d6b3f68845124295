"""`spatial-forcing quickstart`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tyro

from spatial_forcing.experiments.quickstart import QuickstartConfig, run_quickstart
from spatial_forcing.experiments.quickstart import long as long_config
from spatial_forcing.experiments.quickstart import smoke as smoke_config


def quickstart(
    config: tyro.conf.OmitArgPrefixes[QuickstartConfig], long: bool = False, smoke: bool = False
) -> None:
    """Record, cache, train with and without spatial forcing, evaluate, probe, report.

    Where LIBERO's assets are not found, plain ones are made in the user's cache folder.

    Args:
        config: settings; the defaults take ten minutes on two cores.
        long: more demonstrations, steps and seeds, and a third arm: about three quarters of an hour.
        smoke: run every stage at toy size (only --output is read); its numbers mean nothing.
    """
    default = QuickstartConfig().output
    if config.output == default and (long or smoke):
        config = replace(config, output=Path(f"quickstart-{'smoke' if smoke else 'long'}"))
    if smoke:
        config = smoke_config(config.output)
    run_quickstart(long_config(config) if long else config)
