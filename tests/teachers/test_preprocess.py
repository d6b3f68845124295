"""Resizing and framing against the released code's preprocessing."""

from __future__ import annotations

import pytest
import torch

from spatial_forcing.alignment import transform
from spatial_forcing.errors import ConfigError
from spatial_forcing.teachers.preprocess import frame, resize, resized_shape
from tests.golden import golden

CASES = ["sq224_n2", "sq28_n2", "sq28_n1_pad", "tall_crop", "wide_pad", "tall_pad"]


def formula_pixels(B: int, N: int, H: int, W: int) -> torch.Tensor:
    """The vector's input images in [0, 1], (B * N, 3, H, W), from the formula in its json."""
    b, n, c, y, x = torch.meshgrid(*(torch.arange(k).double() for k in (B, N, 3, H, W)), indexing="ij")
    wave = (0.37 * x + 0.23 * y + 1.1 * c + 2.3 * n + 0.7 * b).sin() * (0.05 * x * (n + 1) - 0.11 * y).cos()
    return (0.5 + 0.5 * wave).float().flatten(0, 1)


def stored_pixels(vectors, case: str) -> torch.Tensor:
    """The un-normalised DINO half of the stored pixel values, (B * N, 3, H, W)."""
    pixels = vectors.tensors[f"{case}.pixel_values"].unflatten(1, (-1, 6))[:, :, :3].flatten(0, 1)
    first = vectors.config["normalize_params"][0]
    mean, std = (torch.tensor(first[k]).view(3, 1, 1) for k in ("mean", "std"))
    return pixels * std + mean


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES)
def test_framing_equals_the_released_preprocessing(case):
    vectors = golden("align_preprocess_normed")
    facts = vectors.config["cases"][case]
    if f"{case}.pixel_values" in vectors.tensors:
        images = stored_pixels(vectors, case)
    else:
        images = formula_pixels(facts["B"], facts["N"], facts["H"], facts["W"])
    valid = torch.ones(len(images), facts["H"], facts["W"], dtype=torch.bool)
    framed = frame(images, valid, 518, 14, facts["mode"])
    out = framed.images.unflatten(0, (facts["B"], facts["N"]))
    assert list(out.shape) == facts["out_shape"]
    expected = vectors.tensors[f"{case}.out_stride37"]
    torch.testing.assert_close(out[..., ::37, ::37], expected, atol=1e-5, rtol=1e-5)
    if f"{case}.out_rows_0_7" in vectors.tensors:
        rows = vectors.tensors[f"{case}.out_rows_0_7"]
        torch.testing.assert_close(out[..., :7, :], rows, atol=1e-5, rtol=1e-5)
    assert out.min().item() == pytest.approx(facts["min"], abs=1e-5)
    assert out.max().item() == pytest.approx(facts["max"], abs=1e-5)
    assert out.mean().item() == pytest.approx(facts["mean"], abs=1e-5)


@pytest.mark.golden
def test_resize_equals_the_openpi_preprocessing():
    vectors = golden("openpi_extras")
    facts = vectors.config["results"]["preprocess"]
    images = vectors.tensors["preprocess.in"]
    out = resize(images.flatten(0, 1), 518, 14).unflatten(0, images.shape[:2])
    assert list(out.shape) == facts["out_shape"]
    expected = vectors.tensors["preprocess.out_stride37"]
    torch.testing.assert_close(out[..., ::37, ::37], expected, atol=1e-5, rtol=1e-5)
    assert out.min().item() == pytest.approx(facts["min"], abs=1e-5)
    assert out.max().item() == pytest.approx(facts["max"], abs=1e-5)
    assert out.mean().item() == pytest.approx(facts["mean"], abs=1e-5)


def test_a_wide_image_in_crop_mode_keeps_all_its_rows():
    images = torch.rand(1, 3, 20, 28)
    framed = frame(images, torch.ones(1, 20, 28, dtype=torch.bool), 56, 14, "crop")
    assert framed.images.shape == (1, 3, 42, 56)
    assert framed.valid.all()
    torch.testing.assert_close(framed.images, resize(images, 56, 14))


@pytest.mark.parametrize("mode", ["fit", "pad", "crop"])
def test_square_images_keep_their_framing(mode):
    images = torch.rand(2, 3, 20, 20)
    framed = frame(images, torch.ones(2, 20, 20, dtype=torch.bool), 28, 14, mode)
    assert framed.images.shape == (2, 3, 28, 28)
    assert framed.valid.all()
    torch.testing.assert_close(framed.from_original, torch.eye(2, 3))


def test_an_image_of_the_right_size_is_left_alone():
    images = torch.rand(1, 3, 28, 42)
    assert resize(images, 42, 14) is images


def test_padding_is_white_invalid_and_known_to_the_map():
    images = torch.zeros(1, 3, 20, 40)
    valid = torch.ones(1, 20, 40, dtype=torch.bool)
    valid[..., :10] = False
    framed = frame(images, valid, 56, 14, "pad")
    assert framed.images.shape == (1, 3, 56, 56)
    rows = framed.valid[0, :, -1]
    assert rows.nonzero().flatten().tolist() == list(range(14, 42))
    assert not framed.valid[0, :, :14].any()
    assert (framed.images[0, :, ~rows] == 1).all()
    assert (framed.images[0, :, rows] == 0).all()
    corners = transform(framed.from_original, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    expected_y = 2 * 14 / 55 - 1
    torch.testing.assert_close(corners, torch.tensor([[-1.0, expected_y], [1.0, -expected_y]]))


def test_cropping_maps_the_lost_rows_outside():
    framed = frame(torch.rand(1, 3, 40, 20), torch.ones(1, 40, 20, dtype=torch.bool), 28, 14, "crop")
    assert framed.images.shape == (1, 3, 28, 28)
    top, middle = transform(framed.from_original, torch.tensor([[0.0, -1.0], [0.0, 0.0]]))
    assert top[1] < -1
    torch.testing.assert_close(middle, torch.zeros(2), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("shape", "resolution", "mode", "message"),
    [((20, 20), 30, "fit", "patch size 14"), ((20, 20), 0, "fit", "0"), ((20, 20), 28, "zoom", "'zoom'")],
)
def test_impossible_framings_are_refused(shape, resolution, mode, message):
    with pytest.raises(ConfigError, match=message):
        resized_shape(*shape, resolution, 14, mode)


def test_a_sliver_still_gets_one_patch():
    assert resized_shape(2, 200, 56, 14, "fit") == (14, 56)
    assert resized_shape(200, 2, 56, 14, "pad") == (56, 14)
