"""Resizing against the original's: sizes exactly, pixels to one level of 256."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spatial_forcing.errors import ConfigError
from spatial_forcing.teachers.da3.preprocess import METHODS, resize, resized_sizes
from spatial_forcing.teachers.preprocess import IMAGENET_MEAN, IMAGENET_STD
from tests.golden import golden

ONE_LEVEL = 1 / 255 + 1e-6
MOST = 0.98


def known_sizes(table):
    for text, methods in golden("da3_preprocess").config[table].items():
        width, height = map(int, text.split("x"))
        for method, (w, h) in methods.items():
            yield (height, width), method, (h, w)


@pytest.mark.golden
@pytest.mark.parametrize(("table", "resolution"), [("sizes_504", 504), ("sizes_small", 70)])
def test_sizes_are_the_originals(table, resolution):
    cases = list(known_sizes(table))
    assert len(cases) > 20
    for size, method, wanted in cases:
        whole = (max(14, wanted[0]), max(14, wanted[1]))  # the original crops thin images to nothing
        assert resized_sizes(size, resolution, 14, method)[1] == whole, (size, method)


def single_cases():
    cases = golden("da3_preprocess").config["cases"]
    return [name for name, facts in cases.items() if len(facts["sizes_wh"]) == 1]


@pytest.mark.golden
@pytest.mark.parametrize("name", single_cases())
def test_pixels_are_the_originals_to_one_level(name):
    vectors = golden("da3_preprocess")
    facts, image = vectors.config["cases"][name], vectors.tensors[f"image.{name}"]
    if image.ndim == 2:
        image = image[..., None].expand(-1, -1, 3)
    pixels = image[..., :3].permute(2, 0, 1)[None] / 255
    found = resize(pixels, facts["process_res"], 14, facts["method"])
    wanted = vectors.tensors[f"sized.{name}"].permute(2, 0, 1)[None] / 255
    assert found.shape == wanted.shape
    gap = (found - wanted).abs()
    assert float((gap <= ONE_LEVEL).float().mean()) >= MOST
    assert float(gap.max()) <= 2 * ONE_LEVEL
    if f"tensor.{name}" in vectors.tensors:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        normal = (found - mean) / std
        assert float((normal - vectors.tensors[f"tensor.{name}"]).abs().max()) <= 2 * ONE_LEVEL / 0.224


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 6), st.sampled_from(METHODS))
def test_sizes_are_whole_patches_and_a_plain_image_stays_plain(height, width, patches, method):
    resolution = 14 * patches
    _, (rows, columns) = resized_sizes((height, width), resolution, 14, method)
    assert rows % 14 == columns % 14 == 0
    assert min(rows, columns) >= 14
    if method.startswith("upper"):
        assert max(rows, columns) == resolution
    if max(rows, columns) <= 600:
        found = resize(torch.full((1, 3, height, width), 51 / 255), resolution, 14, method)
        assert found.shape[-2:] == (rows, columns)
        assert torch.allclose(found, torch.tensor(51 / 255), atol=1e-6)


def test_a_resolution_of_broken_patches_is_refused():
    with pytest.raises(ConfigError, match="500 is not a positive multiple of the teacher's patch size 14"):
        resized_sizes((10, 10), 500, 14)
    with pytest.raises(ConfigError, match="'squeeze'"):
        resized_sizes((10, 10), 504, 14, "squeeze")
