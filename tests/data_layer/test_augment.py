import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_forcing.alignment import compose, identity_map, transform
from spatial_forcing.data.augment import Augment, colour_jitter, openpi_crop_rotate
from spatial_forcing.data.geometry import (
    crop_map,
    inside,
    letterbox_map,
    resize_map,
    warp,
)
from spatial_forcing.data.letterbox import letterbox_mask, resize_with_pad, resize_with_pad_tensor
from spatial_forcing.errors import ConfigError
from tests.golden import golden

sizes = st.tuples(st.integers(8, 40), st.integers(8, 40))
quick = settings(max_examples=25, deadline=None)


def grid(size):
    """Corner-to-corner coordinates of every pixel, (H, W, 2)."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size[0]), torch.linspace(-1, 1, size[1]), indexing="ij")
    return torch.stack([x, y], -1)


def ramps(size):
    """An image whose two channels are its own coordinates, (1, 2, H, W)."""
    return grid(size).permute(2, 0, 1).unsqueeze(0)


def drawn(seed: int, source, size):
    augment = Augment(crop_area=(0.4, 1), crop_aspect=(0.8, 1.25), rotation=15)
    draw = augment.draw(np.random.default_rng(seed), "front", size)
    return compose(letterbox_map(source, size), draw.affine)


def warped_and_mapped(seed, source, size):
    """Coordinates found by warping an image of coordinates, and by the reported map, (H, W, 2) each."""
    affine = drawn(seed, source, size)
    found = warp(ramps(source), affine[None], size)[0].permute(1, 2, 0)
    return found, transform(affine, grid(size).reshape(-1, 2)).reshape(*size, 2)


@quick
@given(seed=st.integers(0, 10**6), source=sizes, size=st.tuples(st.integers(40, 60), st.integers(40, 60)))
def test_the_map_says_where_every_pixel_came_from(seed, source, size):
    found, wanted = warped_and_mapped(seed, source, size)
    known = inside(wanted, source)
    assert torch.allclose(found[known], wanted[known].clamp(-1, 1), atol=1e-4)
    assert (found[~known] == 0).all()


@quick
@given(seed=st.integers(0, 10**6), source=st.tuples(st.integers(40, 80), st.integers(40, 80)))
def test_the_map_holds_when_images_shrink(seed, source):
    found, wanted = warped_and_mapped(seed, source, (10, 10))
    interior = (wanted.abs() < 0.6).all(-1)  # the antialiasing filter is cut off at the border
    assert interior.any()
    assert torch.allclose(found[interior], wanted[interior], atol=0.01)


@quick
@given(first=st.integers(0, 10**6), second=st.integers(0, 10**6), size=sizes)
def test_two_warps_are_the_warp_of_the_composition(first, second, size):
    inner, outer = (drawn(seed, size, size) for seed in (first, second))
    # On ramps bilinear sampling is exact, so two resamplings lose nothing inside both pictures.
    twice = warp(warp(ramps(size), outer[None], size), inner[None], size)
    once = warp(ramps(size), compose(outer, inner)[None], size)
    through = transform(inner, grid(size).reshape(-1, 2)).reshape(*size, 2)
    source = transform(outer, through.reshape(-1, 2)).reshape(*size, 2)
    safe = (through.abs() <= 1).all(-1) & (source.abs() <= 0.7).all(-1)
    difference = (twice - once)[0].permute(1, 2, 0)[safe]
    assert difference.numel() == 0 or difference.abs().max().item() < 1e-4


@quick
@given(size=sizes, seed=st.integers(0, 1000))
def test_the_identity_changes_nothing(size, seed):
    images = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (2, 3, *size), dtype=np.uint8))
    assert torch.equal(warp(images, identity_map(2), size).round().to(torch.uint8), images)
    assert torch.allclose(letterbox_map(size, size), identity_map(), atol=1e-6)
    none = Augment(crop_area=(1, 1)).draw(np.random.default_rng(seed), "front", size)
    assert torch.allclose(none.affine, identity_map(), atol=1e-6)
    assert (none.brightness, none.contrast, none.saturation) == (1, 1, 1)


def test_draws_are_a_function_of_the_generator():
    augment = Augment(rotation=5, brightness=0.2)
    one, two = (augment.draw(np.random.default_rng([1, 2, 3]), "front", (8, 8)) for _ in range(2))
    assert torch.equal(one.affine, two.affine)
    assert one.brightness == two.brightness


def test_fixed_views_keep_their_framing_and_their_colours():
    free, fixed = (
        Augment(crop_area=(0.5, 0.6), brightness=0.3, fixed_views=views).draw(
            np.random.default_rng(0), "wrist", (8, 8)
        )
        for views in ((), ("wrist",))
    )
    assert torch.equal(fixed.affine, identity_map())
    assert not torch.equal(free.affine, identity_map())
    assert fixed.brightness == free.brightness != 1


@quick
@given(seed=st.integers(0, 10**6))
def test_nothing_is_mirrored_and_crops_stay_inside(seed):
    augment = Augment(crop_area=(0.3, 1), crop_aspect=(0.5, 2), rotation=0)
    affine = augment.draw(np.random.default_rng(seed), "front", (20, 30)).affine
    assert torch.linalg.det(affine[:, :2]) > 0
    corners = torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1]])
    assert transform(affine, corners).abs().max() <= 1 + 1e-6


def test_rotation_turns_counter_clockwise():
    image = torch.zeros(1, 1, 11, 11)
    image[0, 0, 5, 9] = 1  # right of the centre
    turned = warp(image, crop_map((0, 0), (1, 1), 90, (11, 11))[None], (11, 11))
    assert turned[0, 0, 1, 5] == pytest.approx(1, abs=1e-4)  # above the centre


def test_rotation_keeps_lengths_in_pixels():
    size = (11, 21)
    affine = crop_map((0, 0), (1, 1), 30, size)
    ends = transform(affine, torch.tensor([[-0.2, 0.0], [0.2, 0.0]])) * torch.tensor([10.0, 5.0])
    assert float((ends[1] - ends[0]).norm()) == pytest.approx(4)
    assert float(torch.atan2(*(ends[1] - ends[0]).flip(0)).rad2deg()) == pytest.approx(30, abs=1e-3)


def test_a_crop_shows_its_part():
    image = torch.arange(64.0).reshape(1, 1, 8, 8)
    # The left half of the columns and the lower half of the rows, pixel centre to pixel centre.
    shown = warp(image, crop_map((-4 / 7, 4 / 7), (3 / 7, 3 / 7))[None], (4, 4))
    assert torch.allclose(shown[0, 0], image[0, 0, 4:, :4], atol=1e-3)


def test_shrinking_does_not_alias():
    checkerboard = torch.tensor([[0.0, 1], [1, 0]]).repeat(32, 32)[None, None]
    small = warp(checkerboard, resize_map((64, 64), (16, 16))[None], (16, 16))
    assert (small - 0.5).abs().max() < 0.02


def test_resize_map_agrees_with_interpolate():
    image = torch.rand(1, 3, 9, 12, generator=torch.Generator().manual_seed(0))
    wanted = torch.nn.functional.interpolate(image, (13, 17), mode="bilinear", align_corners=False)
    assert torch.allclose(warp(image, resize_map((9, 12), (13, 17))[None], (13, 17)), wanted, atol=1e-5)


@pytest.mark.parametrize(
    "settings_", [{"crop_area": (0, 1)}, {"crop_aspect": (2, 1)}, {"rotation": 90}, {"contrast": 2}]
)
def test_settings_out_of_range_are_refused(settings_):
    with pytest.raises(ConfigError, match=next(iter(settings_))):
        Augment(**settings_)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["wide", "tall", "same", "odd"])
def test_resize_with_pad_equals_openpi(case):
    vectors = golden("openpi_extras")
    size = tuple(vectors.config["config"]["resize_target"])
    images = vectors.tensors[f"pil_resize.{case}.in"]
    ours, mask = resize_with_pad(images.numpy(), size)
    assert np.array_equal(ours, vectors.tensors[f"pil_resize.{case}.out"].numpy())
    assert np.array_equal(mask, vectors.tensors[f"pil_resize.{case}.mask"].numpy())
    assert torch.equal(letterbox_mask(tuple(images.shape[1:3]), size), torch.from_numpy(mask[0]))
    scaled = images.permute(0, 3, 1, 2).float() / 255 * 2 - 1
    ours = resize_with_pad_tensor(scaled, size).permute(0, 2, 3, 1)
    assert torch.allclose(ours, vectors.tensors[f"torch_resize.{case}.out_f32"], atol=1e-5)


def openpi_colours(images):
    two = [len(images)]
    return colour_jitter(images, [1.15] * two[0], [1.2] * two[0], [1.25] * two[0])


@pytest.mark.golden
def test_augmentation_equals_openpi():
    vectors = golden("openpi_extras").tensors
    base, wrist = (vectors[f"aug.in.{name}"] / 2 + 0.5 for name in ("base", "wrist"))
    cropped, _ = openpi_crop_rotate(base, (1, 1, 53, 53), 2.5)
    assert torch.allclose(openpi_colours(cropped) * 2 - 1, vectors["aug.out.base"], atol=1e-5)
    assert torch.allclose(openpi_colours(wrist) * 2 - 1, vectors["aug.out.wrist"], atol=1e-5)
    assert torch.allclose(openpi_colours(base) * 2 - 1, vectors["aug.sf.out.base"], atol=1e-5)


def test_the_map_of_openpis_augmentation_says_where_pixels_came_from():
    size = (56, 56)
    found, affine = openpi_crop_rotate(ramps(size), (1, 1, 53, 53), 2.5)
    wanted = transform(affine, grid(size).reshape(-1, 2)).reshape(*size, 2)
    centre = slice(8, -8)
    assert torch.allclose(found[0].permute(1, 2, 0)[centre, centre], wanted[centre, centre], atol=1e-5)
