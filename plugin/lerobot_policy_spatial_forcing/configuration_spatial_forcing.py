"""One configuration class a family: the stock policy's, with `forcing` added, registered as `<type>_sf`.

The classes are made from the table in `families.py`. LeRobot finds policy and processors by the names of
class and module (`configuration_*`, `modeling_*`, `processor_*`).
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass, field
from typing import Any

from lerobot.configs import PreTrainedConfig

from lerobot_policy_spatial_forcing.families import FAMILIES, Family
from lerobot_policy_spatial_forcing.settings import ForcingSettings

logger = logging.getLogger(__name__)

SUFFIX = "_sf"
UNAVAILABLE: dict[str, str] = {}
"""Families whose stock policy this LeRobot cannot import, with the reason."""


class ForcedConfig:
    """Mixed into every `<type>_sf` configuration."""

    forcing: ForcingSettings
    family: Family

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        if isinstance(self.forcing, dict):
            self.forcing = ForcingSettings(**self.forcing)


def make_config_class(family: Family) -> type[PreTrainedConfig]:
    """The configuration class of `<family.base>_sf`. Raises `ImportError` where the stock one is missing."""
    module = importlib.import_module(family.module("configuration"))
    stock = getattr(module, family.config_class)
    name = family.config_class.removesuffix("Config") + "SFConfig"
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"LeRobot's {family.config_class} with `forcing`.",
        "__annotations__": {"forcing": ForcingSettings},
        "forcing": field(default_factory=ForcingSettings),
        "family": family,
    }
    return dataclass(type(name, (ForcedConfig, stock), namespace))


def register_families() -> None:
    """Register every family of the table; what cannot be imported is noted in `UNAVAILABLE`."""
    for family in FAMILIES.values():
        kind = family.base + SUFFIX
        if kind in PreTrainedConfig.get_known_choices():
            continue
        try:
            config = make_config_class(family)
        except (ImportError, AttributeError) as error:
            UNAVAILABLE[family.base] = f"{type(error).__name__}: {error}"
            logger.warning("%s is not available: %s", kind, UNAVAILABLE[family.base])
            continue
        PreTrainedConfig.register_subclass(kind)(config)
        globals()[config.__name__] = config
