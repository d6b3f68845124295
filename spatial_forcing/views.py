"""Views: what the teacher sees, and how the student's framing maps to it.

Shapes: B batch, V view, H x W pixels.

Coordinates are corner-to-corner: (-1, -1) is the centre of the top-left pixel (or token) of a
grid and (1, 1) the centre of the bottom-right one (`align_corners=True`), x first, y second.
An affine map is a (2, 3) matrix `M`; it takes a point `(x, y)` to `M @ (x, y, 1)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spatial_forcing.errors import DataError

RANGE_TOLERANCE = 1 / 256
"""How far pixels may leave [0, 1] (resampling overshoot) before they are refused."""

IMAGE_PREFIX = "observation.images."
FRAME_PREFIX = "frame."
FRAME_VALID_SUFFIX = ".valid"
"""`frame.<camera>.valid` (B, H, W) bool marks the picture in a stored frame that was letterboxed."""
GEOMETRY_PREFIX = "geometry."


def identity_map(*lead: int, device: torch.device | str | None = None) -> Tensor:
    """The identity affine map, (*lead, 2, 3) float32."""
    return torch.eye(2, 3, device=device).expand(*lead, 2, 3).clone()


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """`outer` after `inner`: (..., 2, 3) x (..., 2, 3) -> (..., 2, 3)."""
    linear = outer[..., :2] @ inner[..., :2]
    shift = outer[..., :2] @ inner[..., 2:] + outer[..., 2:]
    return torch.cat([linear, shift], dim=-1)


def invert(affine: Tensor) -> Tensor:
    """The inverse of an affine map, (..., 2, 3). Raises `DataError` when it is singular."""
    linear = affine[..., :2]
    if bool((torch.linalg.det(linear).abs() < 1e-8).any()):
        raise DataError("an affine map is singular and cannot be inverted; check the augmentation.")
    inverse = torch.linalg.inv(linear)
    return torch.cat([inverse, -(inverse @ affine[..., 2:])], dim=-1)


def transform(affine: Tensor, points: Tensor) -> Tensor:
    """Map `points` (..., N, 2) by `affine` (..., 2, 3)."""
    return points @ affine[..., :2].transpose(-1, -2) + affine[..., 2].unsqueeze(-2)


@dataclass(frozen=True)
class Views:
    """A batch of multi-view images for a teacher. Build it with `Views.create`, which validates.

    Attributes:
        images: (B, V, 3, H, W) float in [0, 1]: what the teacher encodes.
        cameras: ordered camera names, one a view. The order matters: VGGT treats view 0 as reference.
        present: (B, V) bool; an absent view never reaches the teacher.
        valid: (B, V, H, W) bool; False on padding.
        student_to_view: (B, V, 2, 3), from the student's token image to `images` (identity: same framing).
        keys: (B,) long, the dataset's absolute frame index of each sample, or None.
    """

    images: Tensor
    cameras: tuple[str, ...]
    present: Tensor
    valid: Tensor
    student_to_view: Tensor
    keys: Tensor | None = None

    @classmethod
    def create(
        cls,
        images: Tensor,
        cameras: Sequence[str] | None = None,
        *,
        present: Tensor | None = None,
        valid: Tensor | None = None,
        student_to_view: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Views:
        """Validate and complete.

        Args:
            images: (B, V, 3, H, W), uint8 or float in [0, 1] (tolerance 1/256, then clamped).
                Where a view is absent its pixels are ignored and may hold anything.
            cameras: V names; default `view0`, `view1`, ...
            present, valid: default all True.
            student_to_view: default identity.
            keys: (B,) integer frame indices; needed by a cached teacher.

        Raises:
            DataError: wrong shape, a pixel out of range or not finite, duplicate camera names.
        """
        if images.ndim != 5 or images.shape[2] != 3:
            raise DataError(
                f"Views.images has shape {tuple(images.shape)}; expected (B, V, 3, H, W). "
                "Stack the views on dimension 1 and put channels before height and width."
            )
        B, V, _, H, W = images.shape
        device = images.device
        present = torch.ones(B, V, dtype=torch.bool, device=device) if present is None else present
        _expect("present", present, (B, V), torch.bool)
        images = _checked_images(images, present)
        names = tuple(cameras) if cameras is not None else tuple(f"view{i}" for i in range(V))
        if len(names) != V or len(set(names)) != V:
            raise DataError(f"Views.cameras is {names}; expected {V} distinct names, one for each view.")
        if valid is None:
            valid = present[:, :, None, None].expand(B, V, H, W)
        if student_to_view is None:
            student_to_view = identity_map(B, V, device=device)
        _expect("valid", valid, (B, V, H, W), torch.bool)
        _expect("student_to_view", student_to_view, (B, V, 2, 3))
        if not bool(torch.isfinite(student_to_view).all()):
            raise DataError("Views.student_to_view is not finite; check the augmentation that made it.")
        if keys is not None:
            _expect("keys", keys, (B,), torch.long)
        return cls(images, names, present, valid & present[:, :, None, None], student_to_view.float(), keys)

    def to(self, device: torch.device | str) -> Views:
        """The same views on another device."""
        keys = None if self.keys is None else self.keys.to(device)
        return replace(
            self,
            images=self.images.to(device),
            present=self.present.to(device),
            valid=self.valid.to(device),
            student_to_view=self.student_to_view.to(device),
            keys=keys,
        )


def _expect(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    if tuple(value.shape) != shape or (dtype is not None and value.dtype != dtype):
        wanted = f"{shape}" + (f" of {dtype}" if dtype is not None else "")
        raise DataError(f"Views.{name} is {tuple(value.shape)} of {value.dtype}; expected {wanted}.")


def _checked_images(images: Tensor, present: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images.float().div_(255)
    if not images.is_floating_point():
        raise DataError(f"Views.images is {images.dtype}; expected uint8, or float in [0, 1].")
    # Absent views may hold anything (LeRobot writes -1); they are blanked, never checked or encoded.
    # Each pass over a batch of images costs as much as a small layer; most batches need none of them.
    if not bool(present.all()):
        images = torch.where(present[:, :, None, None, None], images, images.new_zeros(()))
    low, high = (float(v) for v in images.aminmax()) if images.numel() else (0.0, 1.0)
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):  # also catches NaN
        raise DataError(
            f"Views.images lies in [{low:.4g}, {high:.4g}]; expected [0, 1] (tolerance 1/256). "
            "Undo the student's normalisation (x * std + mean, or (x + 1) / 2) before making the views."
        )
    return images if low >= 0 and high <= 1 else images.clamp(0, 1)


def views_from_batch(batch: Mapping[str, Any], cameras: Sequence[str]) -> Views:
    """The views of a training batch with LeRobot's key names; every student uses this one rule.

    Reads `observation.images.<camera>` (B, 3, H, W), the student's augmented image, with the
    identity map. Where the data pipeline was told to keep the stored frame (cached teacher), it adds
    `frame.<camera>` (B, 3, H, W) and `geometry.<camera>` (B, 2, 3), the map from the student's image to
    that frame, and both are used instead; `frame.<camera>.valid` marks the picture in a letterboxed frame.
    `<image key>_is_pad` (B,) bool marks absent views;
    `index` (B,) becomes the keys.

    Raises:
        DataError: a camera is missing from the batch; the message lists those that are there.
    """
    images, maps, present, valid = [], [], [], []
    for camera in cameras:
        key = IMAGE_PREFIX + camera
        if key not in batch:
            there = sorted(k.removeprefix(IMAGE_PREFIX) for k in batch if k.startswith(IMAGE_PREFIX))
            raise DataError(
                f"camera {camera!r} is not in the batch (no key {key!r}); it has {there}. "
                "Change the student's cameras or record the missing one."
            )
        image = batch.get(FRAME_PREFIX + camera, batch[key])
        images.append(image)
        valid.append(batch.get(FRAME_PREFIX + camera + FRAME_VALID_SUFFIX))
        maps.append(batch.get(GEOMETRY_PREFIX + camera, identity_map(len(image), device=image.device)))
        absent = batch.get(key + "_is_pad")
        present.append(
            torch.ones(len(image), dtype=torch.bool, device=image.device) if absent is None else ~absent
        )
    if len({image.shape for image in images}) != 1:
        sizes = {camera: tuple(image.shape) for camera, image in zip(cameras, images, strict=True)}
        raise DataError(
            f"the cameras' images differ in shape: {sizes}. Give the loader one image_size, so that every "
            "view is letterboxed to it."
        )
    if len({image.dtype for image in images}) != 1:
        types = {camera: str(image.dtype) for camera, image in zip(cameras, images, strict=True)}
        raise DataError(
            f"the cameras' images differ in type: {types}. Give all of them as uint8, or all as float in "
            "[0, 1]."
        )
    return Views.create(
        torch.stack(images, 1),
        cameras,
        present=torch.stack(present, 1),
        valid=None if any(mask is None for mask in valid) else torch.stack(valid, 1),  # type: ignore[arg-type]
        student_to_view=torch.stack(maps, 1),
        keys=batch.get("index"),
    )
