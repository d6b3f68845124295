"""Images are found in any batch, and brought back into [0, 1] as they were."""

from __future__ import annotations

import pytest
import torch

from spatial_forcing.doctor import DoctorOptions, Subject, examine
from spatial_forcing.doctor.images import KNOWN, find_images, normalisation_of
from spatial_forcing.errors import ConfigError, DataError
from tests.doctor.toys import Toy, toy, toy_batch

QUICK = DoctorOptions(teacher_dim=8, grid=(4, 4))
NAMES = {n.name: n for n in KNOWN}


def levels(*lead):
    """8-bit images as floats in [0, 1]."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (*lead, 3, 32, 32), generator=generator) / 255


@pytest.mark.parametrize("name", NAMES)
def test_the_normalisation_of_8_bit_images_is_certain(name):
    known = NAMES[name]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (known.mean, known.std))
    pixels = levels(2)
    stored = ((pixels - mean) / std).round() if name == "[0, 255]" else (pixels - mean) / std
    found = find_images({"pixels": stored})
    normalisation, sure = normalisation_of(found)
    assert normalisation.name == name
    assert sure
    torch.testing.assert_close(normalisation.undo(stored), pixels, atol=1e-5, rtol=0)


def test_a_range_alone_is_a_guess():
    images = find_images({"pixels": torch.rand(2, 3, 32, 32) * 2 - 1})
    normalisation, sure = normalisation_of(images)
    assert normalisation.name == "[-1, 1]"
    assert not sure


def test_an_unknown_range_is_refused():
    with pytest.raises(DataError, match=r"\[-8.*no known normalisation"):
        normalisation_of(find_images({"pixels": torch.rand(2, 3, 32, 32) * 18 - 9}))


def adapt(convert, **batch):
    """A toy that takes its images as `convert` makes them from the batch, and the printed views."""
    subject = toy()
    model = subject.model
    rest = {key: value for key, value in subject.batch.items() if key != "pixel_values"}

    def loss(model, batch):
        return model(convert(batch), batch["input_ids"], batch["action"]).loss

    report = examine(Subject(model, {**batch, **rest}, loss), QUICK)
    assert report.ok, report.text()
    namespace = {"model": model, "teacher": None, "loss": loss}
    exec(report.adapter.partition("forcing =")[0], namespace)
    assert "loss=loss" in report.adapter
    return namespace["student"].alignment({**batch, **rest}).views, report.adapter


IMAGES = levels(2, 2)
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in (KNOWN[3].mean, KNOWN[3].std))
BATCHES = {
    "as they are": (lambda b: b["x"], {"x": IMAGES}),
    "uint8": (lambda b: b["x"] / 255, {"x": (IMAGES * 255).round().byte()}),
    "0..255": (lambda b: b["x"] / 255, {"x": (IMAGES * 255).round()}),
    "ImageNet": (lambda b: b["x"] * STD + MEAN, {"x": (IMAGES - MEAN) / STD}),
    "channels last": (lambda b: b["x"].movedim(-1, -3), {"x": IMAGES.movedim(-3, -1)}),
    "stacked": (lambda b: b["x"].unflatten(0, (2, 2)), {"x": IMAGES.flatten(0, 1)}),
    "tiles": (lambda b: b["x"].flatten(1, 2), {"x": IMAGES[:, :, None]}),
    "keys": (
        lambda b: torch.stack([b["observation.images.front"], b["observation.images.wrist"]], 1),
        {"observation.images.front": IMAGES[:, 0], "observation.images.wrist": IMAGES[:, 1]},
    ),
    "nested": (
        lambda b: torch.stack(list(b["images"].values()), 1),
        {"images": {"front": IMAGES[:, 0], "wrist": IMAGES[:, 1]}},
    ),
    "with a picture that is not used": (lambda b: b["x"], {"x": IMAGES, "goal": IMAGES[:, 0]}),
}


@pytest.mark.parametrize(("convert", "batch"), BATCHES.values(), ids=BATCHES)
def test_printed_views_are_the_images(convert, batch):
    views, code = adapt(convert, **batch)
    torch.testing.assert_close(views.images, IMAGES, atol=1e-5, rtol=0)
    assert "goal" not in code


def test_images_in_the_wrong_order_are_refused():
    """All samples' first views, then all second ones: items of a sample do not lie together."""
    batch = toy_batch()
    images = batch["pixel_values"].transpose(0, 1).flatten(0, 1)

    def loss(model, batch):
        stacked = batch["pixel_values"].unflatten(0, (2, 2)).transpose(0, 1)
        return model(stacked, batch["input_ids"], batch["action"]).loss

    torch.manual_seed(0)
    report = examine(Subject(Toy(), {**batch, "pixel_values": images}, loss), QUICK)
    assert report.checks[2].state == "FAIL"
    assert "put the images of one sample next to each other" in report.checks[2].remedy


def test_a_view_that_is_not_used_is_named():
    def loss(model, batch):
        return model(batch["pixel_values"][:, :1], batch["input_ids"], batch["action"]).loss

    report = examine(Subject(toy().model, toy_batch(), loss), QUICK)
    assert "view 1 changes nothing" in report.checks[2].remedy


def test_batches_without_images_are_refused():
    with pytest.raises(DataError, match=r"it has patches \(64, 192\)"):
        find_images({"patches": torch.rand(64, 192)})
    with pytest.raises(ConfigError, match=r"Did you mean 'camera.front'"):
        find_images({"camera": {"front": torch.rand(2, 3, 32, 32)}}, ["camera.fron"])
