"""The images of a batch: where they are, how to bring them into [0, 1], and how to paint them.

Shapes: B samples, V views of a sample, N images of a tensor, H x W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from spatial_forcing.alignment import RANGE_TOLERANCE
from spatial_forcing.doctor.subject import Subject
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.registry import did_you_mean

Value_co = TypeVar("Value_co", covariant=True)


@dataclass(frozen=True)
class Piece(Generic[Value_co]):
    """A part of the adapter: the Python that is printed, and the object that it makes."""

    code: str
    value: Value_co


Box = tuple[int, int, int, int]
"""Pixels (y0, y1, x0, x1), ends excluded."""
Path = tuple[Any, ...]
"""Keys and indices that lead to a tensor of a nested batch."""
SMALLEST_SIDE = 8
LATTICE = 0.01
"""How far un-normalised 8-bit levels may be from whole numbers."""


@dataclass(frozen=True)
class Normalisation:
    """pixels = stored * std + mean, in [0, 1]."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def undo(self, stored: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1]."""
        mean, std = (torch.tensor(v, device=stored.device).view(3, 1, 1) for v in (self.mean, self.std))
        return stored.float() * std + mean


KNOWN = (
    Normalisation("[0, 1]", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    Normalisation("[-1, 1]", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    Normalisation("CLIP's mean and std", tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)),
    Normalisation("ImageNet's mean and std", tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)),
    Normalisation("[0, 255]", (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
)


@dataclass(frozen=True)
class ImageTensor:
    """One tensor of images in the batch.

    Attributes:
        path: where it is.
        value: (..., 3, H, W), or (..., H, W, 3) if `last`.
        last: channels last.
    """

    path: Path
    value: Tensor
    last: bool

    @property
    def key(self) -> str:
        """Its path in one word, as `--image-key` takes it."""
        return ".".join(str(part) for part in self.path)

    @property
    def images(self) -> Tensor:
        """(..., 3, H, W), a view of the tensor."""
        return self.value.movedim(-1, -3) if self.last else self.value

    @property
    def lead(self) -> tuple[int, ...]:
        """The dimensions before the channels, height and width."""
        return tuple(self.images.shape[:-3])

    @property
    def code(self) -> str:
        """Python that reads `images` from `batch`."""
        return access(self.path) + (".movedim(-1, -3)" if self.last else "")

    def read(self, batch: Mapping[str, Any]) -> Tensor:
        """What `code` reads."""
        value: Tensor = entry(batch, self.path)
        return value.movedim(-1, -3) if self.last else value


def access(path: Path) -> str:
    """Python that reads the entry at `path` of `batch`."""
    return "batch" + "".join(f"[{json.dumps(part)}]" for part in path)


def entry(batch: Any, path: Path) -> Any:
    """What `access` reads."""
    for part in path:
        batch = batch[part]
    return batch


def count_samples(subject: Subject, batch: Mapping[str, Any], found: Sequence[ImageTensor]) -> int:
    """How many samples the batch holds: the first dimension of what is not an image, else of the images.

    Where tensors differ, views are folded into the batch of some of them, and the fewest rows are samples:
    two actions beside four images with four prompts are two samples of two views.
    """
    if not found:
        assert subject.pixels is not None
        return len(subject.pixels)
    images = {image.path for image in found}
    others = [v for path, v in tensors(batch) if path not in images and v.ndim]
    total = int(np.prod(found[0].lead)) if len(found) == 1 else len(found[0].images)
    # A vector may be a size, and a single row may be shared by all samples.
    rows = [v for v in others if v.ndim > 1 and len(v) > 1] or others
    whole = [len(v) for v in rows if len(v) and total % len(v) == 0]
    return min(whole) if whole else found[0].lead[0]


def tensors(batch: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """All tensors of a nested batch with their paths."""
    if isinstance(batch, Tensor):
        yield path, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from tensors(value, (*path, key))
    elif isinstance(batch, (list, tuple)):
        for i, value in enumerate(batch):
            yield from tensors(value, (*path, i))


def replaced(batch: Any, path: Path, value: Tensor) -> Any:
    """`batch` with another tensor at `path`; nothing else is copied."""
    if not path:
        return value
    head, *rest = path
    if isinstance(batch, Mapping):
        return {**batch, head: replaced(batch[head], tuple(rest), value)}
    return [replaced(v, tuple(rest), value) if i == head else v for i, v in enumerate(batch)]


def find_images(batch: Mapping[str, Any], keys: Sequence[str] = ()) -> list[ImageTensor]:
    """The image tensors of `batch`: three channels first or last, at least 8 x 8 pixels, float or uint8.

    Args:
        batch: may be nested.
        keys: only these, in this order; `a.b` for `batch["a"]["b"]`.

    Raises:
        ConfigError: an unknown key, or one that holds no images.
        DataError: no images at all.
    """
    everything = {".".join(map(str, path)): (path, value) for path, value in tensors(batch)}
    found = []
    for name in keys or everything:
        if name not in everything:
            raise ConfigError(
                f"the batch has no tensor {name!r}.{did_you_mean(name, everything)} It has: "
                f"{', '.join(everything)}."
            )
        path, value = everything[name]
        if (image := _as_images(path, value)) is not None:
            found.append(image)
        elif keys:
            raise ConfigError(
                f"batch tensor {name!r} is {tuple(value.shape)} of {value.dtype}; images are (..., 3, H, W) "
                "or (..., H, W, 3), float or uint8."
            )
    if not found:
        shapes = ", ".join(f"{name} {tuple(v.shape)}" for name, (_, v) in everything.items()) or "no tensors"
        raise DataError(
            f"no tensor of the batch looks like images, (..., 3, H, W) or (..., H, W, 3): it has {shapes}. "
            "If the images are cut into patches before the model, return Subject(model, batch=FUNCTION, "
            "pixels=IMAGES, views=...) with a function from images to the batch."
        )
    return found


def _as_images(path: Path, value: Tensor) -> ImageTensor | None:
    if value.ndim < 4 or not (value.is_floating_point() or value.dtype == torch.uint8):
        return None
    if value.shape[-3] == 3 and min(value.shape[-2:]) >= SMALLEST_SIDE:
        return ImageTensor(path, value, last=False)
    if value.shape[-1] == 3 and min(value.shape[-3:-1]) >= SMALLEST_SIDE:
        return ImageTensor(path, value, last=True)
    return None


def normalisation_of(found: Sequence[ImageTensor]) -> tuple[Normalisation, bool]:
    """How the images were normalised, and whether that is certain (8-bit images can be identified).

    Raises:
        DataError: no known normalisation brings them into [0, 1].
    """
    kinds = {image.value.dtype == torch.uint8 for image in found}
    if kinds == {True}:
        return Normalisation("uint8", (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)), True
    stored = [image.images.float().flatten(0, -4) for image in found]
    fitting = [n for n in KNOWN if all(_inside(n.undo(s)) for s in stored)]
    if not fitting:
        low, high = min(float(s.min()) for s in stored), max(float(s.max()) for s in stored)
        raise DataError(
            f"the images lie in [{low:.3g}, {high:.3g}], which no known normalisation brings into [0, 1] "
            f"(tried {'; '.join(n.name for n in KNOWN)}). Return Subject(..., views=lambda batch: "
            "Views.create(...)), which undoes it."
        )
    whole = [n for n in fitting if all(_on_lattice(n.undo(s)) for s in stored)]
    # Images that are black and white alone are whole numbers in several.
    return (whole[0], len(whole) == 1) if whole else (fitting[0], False)


def _inside(pixels: Tensor) -> bool:
    return bool(pixels.min() >= -RANGE_TOLERANCE) and bool(pixels.max() <= 1 + RANGE_TOLERANCE)


def _on_lattice(pixels: Tensor) -> bool:
    levels = pixels.double() * 255
    return bool((levels - levels.round()).abs().max() < LATTICE)


class Pictures:
    """The images of a subject's batch as (sample, view), which can be painted.

    Args:
        subject: with its batch or its function from pixels to a batch.
        batch: the subject's example.
        found: its image tensors; empty where the batch is a function.
        samples: B, batch size of the decoder.

    Raises:
        DataError: the images cannot be shared out among the samples.
    """

    def __init__(
        self, subject: Subject, batch: Mapping[str, Any], found: Sequence[ImageTensor], samples: int
    ) -> None:
        self.subject, self.batch, self.found, self.samples = subject, batch, list(found), samples
        if not self.found:
            assert subject.pixels is not None
            self.views = subject.pixels.shape[1]
            return
        counts = [image.images.flatten(0, -4).shape[0] for image in self.found]
        for image, count in zip(self.found, counts, strict=True):
            if count % samples or (len(self.found) > 1 and count != samples):
                raise DataError(
                    f"batch tensor {image.key!r} holds {count} images ({tuple(image.value.shape)}) for "
                    f"{samples} samples of the "
                    f"decoder{' and is one of several' if len(self.found) > 1 else ''}; give every sample "
                    "as many views, or name the tensor with --image-key."
                )
        self.views = len(self.found) if len(self.found) > 1 else counts[0] // samples

    def size(self, view: int) -> tuple[int, int]:
        """(H, W) of a view."""
        if not self.found:
            assert self.subject.pixels is not None
            image = self.subject.pixels
        else:
            image = self.found[view if len(self.found) > 1 else 0].images
        return image.shape[-2], image.shape[-1]

    def painted(self, sample: int, view: int, box: Box | None = None) -> Iterator[dict[str, Any]]:
        """The batch twice, with one box (None: the whole) of one image at either end of the images' range.

        One of the two is far from whatever the image shows there.
        """
        for end in (0, 1):
            if not self.found:
                assert self.subject.pixels is not None
                assert callable(self.subject.batch)
                pixels = self.subject.pixels.clone()
                _part(pixels[sample, view], box).fill_(end)
                yield dict(self.subject.batch(pixels))
                continue
            image = self.found[view if len(self.found) > 1 else 0]
            item = sample if len(self.found) > 1 else sample * self.views + view
            copy = replace(image, value=image.value.clone())
            _part(copy.images[np.unravel_index(item, image.lead)], box).fill_(image.value.aminmax()[end])
            yield replaced(self.batch, image.path, copy.value)

    @property
    def stacked(self) -> Piece[Callable[[Mapping[str, Any]], Tensor]]:
        """How the images of `batch` become (B, V, 3, H, W), as stored."""
        images, views = self.found, self.views
        if len(images) > 1:
            listed = ", ".join(image.code for image in images)
            return Piece(f"torch.stack([{listed}], 1)", lambda b: torch.stack([i.read(b) for i in images], 1))
        (image,) = images
        lead, code, read = len(image.lead), image.code, image.read
        if lead > 2:
            return Piece(f"{code}.flatten(1, {lead - 1})", lambda b: read(b).flatten(1, lead - 1))
        if lead == 2 and image.lead[0] == self.samples:
            return Piece(code, read)
        if lead == 2:
            return Piece(
                f"{code}.flatten(0, 1).unflatten(0, (-1, {views}))",
                lambda b: read(b).flatten(0, 1).unflatten(0, (-1, views)),
            )
        if views == 1:
            return Piece(f"{code}[:, None]", lambda b: read(b)[:, None])
        return Piece(f"{code}.unflatten(0, (-1, {views}))", lambda b: read(b).unflatten(0, (-1, views)))


def all_inverted(subject: Subject, batch: Mapping[str, Any], found: Sequence[ImageTensor]) -> dict[str, Any]:
    """The batch with every pixel moved to the farther end of the range."""
    if not found:
        assert callable(subject.batch)
        assert subject.pixels is not None
        return dict(subject.batch((subject.pixels < 0.5).to(subject.pixels.dtype)))
    changed: Any = batch
    for image in found:
        low, high = image.value.aminmax()
        inverted = torch.where(image.value > low / 2 + high / 2, low, high)
        changed = replaced(changed, image.path, inverted)
    return dict(changed)


def _part(picture: Tensor, box: Box | None) -> Tensor:
    return picture if box is None else picture[..., box[0] : box[1], box[2] : box[3]]
