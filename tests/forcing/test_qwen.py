"""Qwen's patches put together again: against transformers' own image processor."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

from spatial_forcing import layout_from_qwen, views_from_qwen
from spatial_forcing.errors import DataError, LayoutError

CAMERAS = ("front", "wrist")
CLIP = Qwen2VLImageProcessorPil()
HALF = Qwen2VLImageProcessorPil(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
IMAGE = 7


def pictures(count, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def processed(images, processor):
    made = processor(images=list(images), do_resize=False, return_tensors="pt")
    return {key: made[key] for key in ("pixel_values", "image_grid_thw")}


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([CLIP, HALF]), st.integers(1, 2))
def test_views_are_the_pixels_that_the_processor_got(rows, columns, processor, samples):
    block = processor.patch_size * processor.merge_size
    images = pictures(2 * samples, rows * block, columns * block)
    views = views_from_qwen(processed(images, processor), CAMERAS, processor)
    assert views.cameras == CAMERAS
    expected = torch.from_numpy(images).movedim(-1, 1).float().div(255).unflatten(0, (samples, 2))
    torch.testing.assert_close(views.images, expected, atol=1e-5, rtol=0)


def test_another_models_statistics_show_other_colours():
    images = pictures(2, 56, 56)
    other = Qwen2VLImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.25] * 3)
    with pytest.raises(DataError, match=r"expected \[0, 1\]"):
        _ = views_from_qwen(processed(images, CLIP), CAMERAS, other).images


def test_the_layout_counts_merged_tokens_and_keys_are_handed_on():
    batch = processed(pictures(4, 56, 84), CLIP)
    tokens = [1] + [IMAGE] * 6 + [2]
    batch["input_ids"] = torch.tensor([[*tokens, *tokens, 3]] * 2)
    layout = layout_from_qwen(batch, CAMERAS, IMAGE, CLIP)
    assert layout.index[0].tolist() == [[[1, 2, 3], [4, 5, 6]], [[9, 10, 11], [12, 13, 14]]]
    assert bool(layout.valid.all())
    keys = torch.tensor([5, 9])
    assert torch.equal(views_from_qwen(batch, CAMERAS, CLIP, keys=keys).keys, keys)
    with pytest.raises(LayoutError):
        layout_from_qwen({**batch, "input_ids": batch["input_ids"][:, 1:]}, ("front",), IMAGE, CLIP)


def test_pixels_are_put_together_only_when_they_are_read():
    batch = processed(pictures(2, 56, 56), CLIP)
    views = views_from_qwen(batch, CAMERAS, CLIP)
    batch["pixel_values"].fill_(0.0)
    assert float(views.images.std()) < 0.1


@dataclass
class Other:
    """A processor of another patch size."""

    image_mean = image_std = (0.5, 0.5, 0.5)
    patch_size, temporal_patch_size, merge_size = 16, 2, 2


def test_what_does_not_fit_is_refused():
    batch = processed(pictures(2, 56, 56), CLIP)
    with pytest.raises(DataError, match=r"pixel_values is \(32, 1176\); expected \(32, 1536\)"):
        views_from_qwen(batch, CAMERAS, Other())
    with pytest.raises(DataError, match=r"2 images.*3 cameras"):
        views_from_qwen(batch, ("a", "b", "c"), CLIP)
    mixed = processed([pictures(1, 56, 56)[0], pictures(1, 56, 84)[0]], CLIP)
    with pytest.raises(DataError, match=r"\[1, 4, 4\], \[1, 4, 6\]"):
        views_from_qwen(mixed, CAMERAS, CLIP)
    video = {**batch, "image_grid_thw": torch.tensor([[2, 4, 4], [2, 4, 4]])}
    with pytest.raises(DataError, match="one frame"):
        views_from_qwen(video, CAMERAS, CLIP)
    with pytest.raises(DataError, match=r"no tensor 'image_grid_thw'.*pixel_values"):
        views_from_qwen({"pixel_values": batch["pixel_values"]}, CAMERAS, CLIP)
