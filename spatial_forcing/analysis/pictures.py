"""Pictures of features and depth: PCA as RGB, depth as colours."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from spatial_forcing.errors import ConfigError, DataError

# A perceptually even ramp, dark blue over green to yellow; near is bright, as with a lamp at the camera.
_RAMP = np.array(
    [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99],
     [170, 220, 50], [253, 231, 37]],
    dtype=np.float64,
)  # fmt: skip


def depth_picture(depth: NDArray[np.float32], near: float, far: float) -> NDArray[np.uint8]:
    """(H, W) metres -> (H, W, 3) uint8, linear in log depth between `near` (bright) and `far` (dark).

    Raises:
        ConfigError: not 0 < near < far.
    """
    if not 0 < near < far:
        raise ConfigError(f"near is {near} and far is {far} metres; expected 0 < near < far.")
    closeness = (np.log(far) - np.log(np.clip(depth, near, far))) / np.log(far / near)
    position = closeness * (len(_RAMP) - 1)
    channels = [np.interp(position, np.arange(len(_RAMP)), _RAMP[:, c]) for c in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def pca_pictures(
    features: Mapping[str, Tensor], reference: str, shown: Sequence[int] | None = None
) -> dict[str, NDArray[np.uint8]]:
    """The first three principal components of every feature set as RGB pictures, on the reference's grid.

    Components are fitted jointly over all pictures of a set, so that a colour means the same in each of them;
    with more pictures than are shown they depend less on which. Sets differ in channels and in the order and
    signs of their components, so those of every set are rotated as a whole (orthogonal Procrustes) to agree
    best with the reference's at the same places: equal structure gets equal colours. Each channel is
    stretched from its 2nd to its 98th percentile.

    Args:
        features: by name, (N, h, w, C) of the same N pictures; h, w and C may differ between sets.
        reference: the name whose colours lead, e.g. the teacher.
        shown: the pictures to return; None: all.

    Returns:
        By name, (shown, H, W, 3) uint8, H x W the reference's grid.

    Raises:
        ConfigError: `reference` is not among the names.
        DataError: sets of different numbers of pictures, fewer than 3 channels, or values not finite.
    """
    if reference not in features:
        raise ConfigError(f"the reference {reference!r} is not among the features {sorted(features)}.")
    counts = {name: len(f) for name, f in features.items()}
    if len(set(counts.values())) != 1:
        raise DataError(f"the feature sets have different numbers of pictures: {counts}.")
    chosen = list(range(counts[reference]) if shown is None else shown)
    lead = _components(reference, features[reference])
    made = {}
    for name, values in features.items():
        own = lead if name == reference else _rotated(_on_grid(_components(name, values), lead), lead)
        made[name] = _stretched(own)[chosen]
    return made


def _components(name: str, features: Tensor) -> Tensor:
    """(N, h, w, C) -> (N, h, w, 3), unit variance."""
    if features.ndim != 4 or features.shape[-1] < 3 or not bool(torch.isfinite(features).all()):
        raise DataError(
            f"the features {name!r} are {tuple(features.shape)}; expected finite (N, h, w, C) with C >= 3."
        )
    flat = features.flatten(0, 2).double()
    flat = flat - flat.mean(0)
    _, vectors = torch.linalg.eigh(flat.T @ flat)
    top = flat @ vectors[:, -3:].flip(-1)
    # An eigenvector's sign is arbitrary: fix it, so that the same features always give the same picture.
    top = top * torch.where(top.pow(3).sum(0) < 0, -1.0, 1.0)
    return (top / top.std(0).clamp(min=1e-12)).view(*features.shape[:3], 3)


def _on_grid(own: Tensor, lead: Tensor) -> Tensor:
    """`own` at the places of `lead`; both grids cover the whole picture."""
    planes = own.permute(0, 3, 1, 2)
    return F.interpolate(planes, lead.shape[1:3], mode="bilinear", align_corners=False).permute(0, 2, 3, 1)


def _rotated(own: Tensor, lead: Tensor) -> Tensor:
    """`own` in the rotation or reflection of its three components that agrees best with `lead`."""
    turn, _ = orthogonal_procrustes(own.flatten(0, 2).numpy(), lead.flatten(0, 2).numpy())
    return own @ torch.from_numpy(turn)


def _stretched(components: Tensor) -> NDArray[np.uint8]:
    values = components.numpy()
    low, high = np.percentile(values.reshape(-1, 3), [2, 98], axis=0)
    scaled = (values - low) / np.maximum(high - low, 1e-12)
    return (np.clip(scaled, 0, 1) * 255).round().astype(np.uint8)


def png_bytes(picture: NDArray[np.uint8]) -> bytes:
    """(H, W, 3) uint8 as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
