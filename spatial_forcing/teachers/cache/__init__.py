"""Teacher features on disk: built once, read in every epoch.

folder = build_cache(teacher, dataset_source(dataset), "features")
teacher = CachedTeacher(folder)         # a `protocols.Teacher`
"""

from spatial_forcing.teachers.cache.build import build_cache
from spatial_forcing.teachers.cache.prune import Pruned, prune_cache
from spatial_forcing.teachers.cache.read import CachedTeacher, CacheInfo, cache_info, verify_cache
from spatial_forcing.teachers.cache.source import FrameSource, SourceEpisode, dataset_source

__all__ = [
    "CacheInfo",
    "CachedTeacher",
    "FrameSource",
    "Pruned",
    "SourceEpisode",
    "build_cache",
    "cache_info",
    "dataset_source",
    "prune_cache",
    "verify_cache",
]
