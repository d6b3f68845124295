"""Errors that a user can act on.

Every message names the value, the place and the remedy. The command line prints a
`SpatialForcingError` without a traceback; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations


class SpatialForcingError(ValueError):
    """Base of every error this package raises on bad input or a bad environment."""


class ConfigError(SpatialForcingError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(SpatialForcingError):
    """A dataset, batch or image is malformed."""


class LayoutError(SpatialForcingError):
    """A token layout does not describe the sequence it is used on."""


class CheckpointError(SpatialForcingError):
    """Files of a checkpoint are missing, unexpected, truncated or of another architecture."""


class EnvironmentSetupError(SpatialForcingError):
    """Something outside Python is missing (a system library, disk space, a device)."""
