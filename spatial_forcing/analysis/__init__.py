"""Evidence: depth probe, feature pictures, the HTML report."""

from spatial_forcing.analysis.pictures import depth_picture, pca_pictures
from spatial_forcing.analysis.probe import ProbeMetrics, ProbeResult, probe_depth

__all__ = ["ProbeMetrics", "ProbeResult", "depth_picture", "pca_pictures", "probe_depth"]
