"""What a batch says about its visual tokens and their images: where they are, and what the teacher sees.

    alignment = student.alignment(batch)     # once for a batch
    alignment.layout                         # where each view's token grid lies in the sequence
    alignment.views                          # what the teacher encodes; pixels are made when it reads them

Shapes: B batch, V view, H x W pixels, h x w token grid of one view.

Coordinates are corner-to-corner: (-1, -1) is the centre of the top-left pixel (or token) of a
grid and (1, 1) the centre of the bottom-right one (`align_corners=True`), x first, y second.
An affine map is a (2, 3) matrix `M`; it takes a point `(x, y)` to `M @ (x, y, 1)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
VALID_PREFIX = "valid."


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
class TokenLayout:
    """Where each view's token grid sits in the student's sequence.

    Attributes:
        index: (B, V, h, w) long: positions in the sequence the decoder blocks see; row-major in a view.
            Grids of different sizes are padded at the right and the bottom with -1.
        valid: (B, V, h, w) bool: False where a token is padding or its view is absent.
    """

    index: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Views:
    """A batch of multi-view images for a teacher. Build it with `Views.create`, which validates.

    Pixels are made and checked when `images` is first read: a cached teacher never does.

    Attributes:
        cameras: ordered camera names, one for each view. The order matters: VGGT treats view 0 as reference.
        present: (B, V) bool; an absent view never reaches the teacher.
        valid: (B, V, H, W) bool; False on padding.
        student_to_view: (B, V, 2, 3), from the student's token image to `images` (identity: same framing).
        keys: (B,) long, the dataset's absolute frame index of each sample, or None.
        make: gives the pixels, (B, V, 3, H, W) float; the function that `create` puts here checks them.
    """

    cameras: tuple[str, ...]
    present: Tensor
    valid: Tensor
    student_to_view: Tensor
    keys: Tensor | None
    make: Callable[[], Tensor]

    @cached_property
    def images(self) -> Tensor:
        """(B, V, 3, H, W) float: what the teacher encodes. In [0, 1], except where resampling overshoots.

        Raises:
            DataError: another type or shape than promised, a pixel out of range or not finite.
        """
        return self.make()

    @classmethod
    def create(
        cls,
        images: Tensor | Callable[[], Tensor],
        cameras: Sequence[str] | None = None,
        *,
        present: Tensor | None = None,
        valid: Tensor | None = None,
        student_to_view: Tensor | None = None,
        keys: Tensor | None = None,
        shape: tuple[int, int, int, int] | None = None,
        device: torch.device | str | None = None,
    ) -> Views:
        """Validate and complete.

        Args:
            images: (B, V, 3, H, W), uint8 or float in [0, 1] (tolerance 1/256, then clamped), or a function
                that gives them when they are needed; then `shape` and `device` are needed.
                Where a view is absent its pixels are ignored and may hold anything.
            cameras: V names; default `view0`, `view1`, ...
            present, valid: default all True.
            student_to_view: default identity.
            keys: (B,) integer frame indices; needed by a cached teacher.
            shape: (B, V, H, W) of what the function gives.
            device: where it gives them.

        Raises:
            DataError: wrong shape, duplicate camera names. What is wrong with pixels is found in `images`.
        """
        if isinstance(images, Tensor):
            if images.ndim != 5 or images.shape[2] != 3:
                raise DataError(
                    f"Views.images has shape {tuple(images.shape)}; expected (B, V, 3, H, W). "
                    "Stack the views on dimension 1 and put channels before height and width."
                )
            if images.dtype != torch.uint8 and not images.is_floating_point():
                raise DataError(f"Views.images is {images.dtype}; expected uint8, or float in [0, 1].")
            given, device = images, images.device
            shape = (images.shape[0], images.shape[1], images.shape[3], images.shape[4])
            raw: Callable[[], Tensor] = lambda: given  # noqa: E731
        else:
            raw = images
        if shape is None or device is None:
            raise DataError("Views.create: a function for the images needs `shape` and `device` beside it.")
        B, V, H, W = shape
        present = torch.ones(B, V, dtype=torch.bool, device=device) if present is None else present
        _expect("present", present, (B, V), torch.bool)
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
        shown, there = valid & present[:, :, None, None], present

        def make() -> Tensor:
            pixels = raw()
            _expect("images", pixels, (B, V, 3, H, W))
            return _checked_images(pixels, there)

        return cls(names, present, shown, student_to_view.float(), keys, make)

    @property
    def device(self) -> torch.device:
        """Where masks and maps are, and the images when they are read."""
        return self.present.device

    def to(self, device: torch.device | str) -> Views:
        """The same views on another device."""
        keys = None if self.keys is None else self.keys.to(device)
        return replace(
            self,
            present=self.present.to(device),
            valid=self.valid.to(device),
            student_to_view=self.student_to_view.to(device),
            keys=keys,
            make=lambda: self.images.to(device),
        )


Sequencer = Callable[[Sequence[Tensor]], Tensor]
"""What enters a block, one tensor a call -> the sequence (B, L, D)."""


@dataclass(frozen=True)
class Alignment:
    """What one batch says about its visual tokens; made once by `Student.alignment`.

    Attributes:
        layout: where the tokens are.
        views: what the teacher should see, and how the student's framing maps to it.
        source: what the student made both from; it gets it back in its forward pass.
        sequence: makes the (B, L, D) sequence that the layout speaks of from what enters a block, one tensor
            a
            call; None: the first call is that sequence. A vision tower that runs once a view, or with all
            views in its batch dimension, needs it; see `as_student`.
    """

    layout: TokenLayout
    views: Views
    source: Any = None
    sequence: Sequencer | None = None


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


@dataclass(frozen=True)
class CameraImages:
    """The images of a batch with LeRobot's key names, one entry a camera; made by `camera_images`.

    Attributes:
        cameras: ordered names.
        images: the student's, as delivered (geometrically augmented), (B, 3, H, W) each.
        masks: (B, H, W) bool, the picture in an image that was letterbox-padded before (`valid.<camera>`),
            or None.
        frames: what the teacher should see: the stored frames (`frame.<camera>`) where the data pipeline
            kept them for a cached teacher, else the images.
        frame_masks: (B, H, W) bool, the picture in a letterboxed stored frame, or None.
        maps: (B, 2, 3) from the image to the frame; None is the identity.
        present: (B, V) bool; `<image key>_is_pad` marks absent views.
        keys: `index` (B,), or None.
    """

    cameras: tuple[str, ...]
    images: tuple[Tensor, ...]
    masks: tuple[Tensor | None, ...]
    frames: tuple[Tensor, ...]
    frame_masks: tuple[Tensor | None, ...]
    maps: tuple[Tensor | None, ...]
    present: Tensor
    keys: Tensor | None

    @property
    def stored(self) -> bool:
        """Whether the teacher's frames are other images than the student's."""
        return any(frame is not image for frame, image in zip(self.frames, self.images, strict=True))

    def views(self) -> Views:
        """The frames, with the maps from the student's images.

        Raises:
            DataError: frames of different sizes or types.
        """
        require_alike(self.cameras, self.frames)
        first = self.frames[0]
        identity = identity_map(len(first), device=first.device)
        masks = [mask for mask in self.frame_masks if mask is not None]
        return Views.create(
            lambda: torch.stack(self.frames, 1),
            self.cameras,
            present=self.present,
            valid=torch.stack(masks, 1) if len(masks) == len(self.cameras) else None,
            student_to_view=torch.stack([identity if m is None else m for m in self.maps], 1),
            keys=self.keys,
            shape=(len(first), len(self.frames), first.shape[-2], first.shape[-1]),
            device=first.device,
        )

    def own(self, fit: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
        """The student's own pixels, (B, V, 3, S, S) float in [0, 1] on `device`, in memory of their own.

        Args:
            fit: brings (B, 3, H, W) of its type to the student's size, on `device`.
            device: where they are wanted.

        Raises:
            DataError: images of different types, out of range or not finite.
        """
        fitted = [fit(image.to(device)) for image in self.images]
        require_alike(self.cameras, fitted)
        return _checked_images(torch.stack(fitted, 1), self.present.to(device))


def require_alike(cameras: Sequence[str], images: Sequence[Tensor]) -> None:
    """Raise `DataError` unless the images of all cameras have one shape and type; names them."""
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


def camera_images(batch: Mapping[str, Any], cameras: Sequence[str]) -> CameraImages:
    """Read the images of `cameras` out of a batch; every student reads them here, once for each batch.

    Raises:
        DataError: a camera is missing from the batch; the message lists those that are there.
    """
    found: dict[str, list[Any]] = {name: [] for name in ("images", "masks", "frames", "frame_masks", "maps")}
    present = []
    for camera in cameras:
        key = IMAGE_PREFIX + camera
        if key not in batch:
            keys = [k for k in batch if k.startswith(IMAGE_PREFIX) and not k.endswith("_is_pad")]
            there = sorted(k.removeprefix(IMAGE_PREFIX) for k in keys)
            raise DataError(
                f"camera {camera!r} is not in the batch (no key {key!r}); it has {there}. "
                "Change the student's cameras or record the missing one."
            )
        image = batch[key]
        found["images"].append(image)
        found["masks"].append(_pixel_mask(batch.get(VALID_PREFIX + camera), image, VALID_PREFIX + camera))
        found["frames"].append(batch.get(FRAME_PREFIX + camera, image))
        found["frame_masks"].append(batch.get(FRAME_PREFIX + camera + FRAME_VALID_SUFFIX))
        found["maps"].append(batch.get(GEOMETRY_PREFIX + camera))
        absent = batch.get(key + "_is_pad")
        here = torch.ones(len(image), dtype=torch.bool, device=image.device)
        present.append(here if absent is None else ~absent.to(image.device, torch.bool))
    return CameraImages(
        cameras=tuple(cameras),
        present=torch.stack(present, 1),
        keys=batch.get("index"),
        **{name: tuple(values) for name, values in found.items()},
    )


def _pixel_mask(mask: Tensor | None, image: Tensor, name: str) -> Tensor | None:
    if mask is None:
        return None
    shape = (len(image), *image.shape[-2:])
    if tuple(mask.shape) != shape:
        raise DataError(f"{name} is {tuple(mask.shape)}; expected {shape}, one value for each pixel.")
    return mask.to(image.device, torch.bool)


def views_from_batch(batch: Mapping[str, Any], cameras: Sequence[str]) -> Views:
    """The views of a training batch with LeRobot's key names (see `CameraImages`).

    Raises:
        DataError: a camera is missing from the batch, or the frames differ in shape or type.
    """
    return camera_images(batch, cameras).views()
