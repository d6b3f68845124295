"""LeRobot v3.0 datasets: write, read, check, decode once, batch, augment, record."""

from spatial_forcing.data.info import DatasetInfo
from spatial_forcing.data.reader import Dataset, Episode
from spatial_forcing.data.store import DecodedStore
from spatial_forcing.data.writer import DatasetWriter

__all__ = ["Dataset", "DatasetInfo", "DatasetWriter", "DecodedStore", "Episode"]
