"""The method: tap, layout, target, projector, loss, and the module that joins them (arXiv 2510.12276).

Read in this order: `loss`, `projector`, `target`, `layout`, `tap`, `module`.
"""

from spatial_forcing.alignment import TokenLayout
from spatial_forcing.forcing.adapter import Alignable, ModuleStudent, as_student
from spatial_forcing.forcing.audit import gradient_audit
from spatial_forcing.forcing.config import ForcingConfig, resolve_pairs
from spatial_forcing.forcing.layout import layout_from_input_ids, layout_from_offset, tokens_valid
from spatial_forcing.forcing.module import SpatialForcing
from spatial_forcing.forcing.projector import Projector
from spatial_forcing.forcing.qwen import layout_from_qwen, views_from_qwen
from spatial_forcing.forcing.schedule import AlphaSchedule
from spatial_forcing.forcing.sharding import shard

__all__ = [
    "Alignable",
    "AlphaSchedule",
    "ForcingConfig",
    "ModuleStudent",
    "Projector",
    "SpatialForcing",
    "TokenLayout",
    "as_student",
    "gradient_audit",
    "layout_from_input_ids",
    "layout_from_offset",
    "layout_from_qwen",
    "resolve_pairs",
    "shard",
    "tokens_valid",
    "views_from_qwen",
]
