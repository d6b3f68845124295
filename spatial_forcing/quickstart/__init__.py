"""The main job end to end, in small: `spatial-forcing quickstart`."""

from spatial_forcing.quickstart.config import QuickstartConfig, smoke
from spatial_forcing.quickstart.run import QuickstartResult, rebuild_report, run_quickstart

__all__ = ["QuickstartConfig", "QuickstartResult", "rebuild_report", "run_quickstart", "smoke"]
