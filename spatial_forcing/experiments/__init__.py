"""Matched comparisons: arms x training seeds on one dataset, and what they show. Start reading at `run`."""

from spatial_forcing.experiments.arms import ARMS, ArmSpec, parse_arm
from spatial_forcing.experiments.config import CompareConfig
from spatial_forcing.experiments.run import compare

__all__ = ["ARMS", "ArmSpec", "CompareConfig", "compare", "parse_arm"]
