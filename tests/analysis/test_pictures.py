import io

import numpy as np
import pytest
import torch
from PIL import Image

from spatial_forcing.analysis.pictures import depth_picture, pca_pictures, png_bytes
from spatial_forcing.errors import ConfigError, DataError


def structure(channels, seed, side=6):
    """The same three patterns over 4 pictures, in a random basis with noise."""
    shared = torch.Generator().manual_seed(0)
    pattern = torch.randn(4, 6, 6, 3, generator=shared) * torch.tensor([4.0, 2.0, 1.0])
    own = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(channels, 3, generator=own))[0]
    features = pattern @ basis.T + 0.01 * torch.randn(4, 6, 6, channels, generator=own) + 5.0
    if side != 6:
        features = torch.nn.functional.interpolate(
            features.permute(0, 3, 1, 2), (side, side), mode="bilinear", align_corners=True
        ).permute(0, 2, 3, 1)
    return features


def test_equal_structure_gets_equal_colours_whatever_basis_and_signs():
    pictures = pca_pictures(
        {"teacher": structure(32, 1), "before": structure(16, 2), "after": structure(16, 3)}, "teacher"
    )
    for name in ("before", "after"):
        difference = np.abs(pictures[name].astype(int) - pictures["teacher"].astype(int))
        assert difference.mean() < 3, name


def test_pictures_do_not_depend_on_the_features_sign_or_scale():
    features = structure(16, 2)
    sets = {"teacher": structure(32, 1), "student": features}
    mirrored = {"teacher": structure(32, 1), "student": -7 * features}
    expected = pca_pictures(sets, "teacher")["student"].astype(int)
    assert np.abs(pca_pictures(mirrored, "teacher")["student"].astype(int) - expected).max() <= 1


def test_grids_of_different_sizes_share_colours():
    pictures = pca_pictures({"teacher": structure(32, 1, side=11), "student": structure(16, 2)}, "teacher")
    assert pictures["teacher"].shape == pictures["student"].shape == (4, 11, 11, 3)
    inside = slice(2, -2)  # the two were resampled differently at the border
    teacher, student = (pictures[name][:, inside, inside].astype(int) for name in ("teacher", "student"))
    assert np.corrcoef(teacher.ravel(), student.ravel())[0, 1] > 0.9


def test_a_colour_does_not_depend_on_which_pictures_are_shown():
    sets = {"teacher": structure(32, 1), "student": structure(16, 2)}
    everything, some = pca_pictures(sets, "teacher"), pca_pictures(sets, "teacher", (3, 1))
    for name, pictures in some.items():
        np.testing.assert_array_equal(pictures, everything[name][[3, 1]])


def test_pictures_use_the_whole_range():
    picture = pca_pictures({"a": structure(16, 2)}, "a")["a"]
    assert picture.min() == 0
    assert picture.max() == 255


@pytest.mark.parametrize(
    ("features", "reference", "error"),
    [
        ({"a": structure(8, 1)}, "b", ConfigError),
        ({"a": structure(8, 1), "b": structure(8, 1)[:2]}, "a", DataError),
        ({"a": structure(8, 1)[..., :2]}, "a", DataError),
        ({"a": structure(8, 1) * float("nan")}, "a", DataError),
    ],
)
def test_features_that_make_no_picture_are_refused(features, reference, error):
    with pytest.raises(error):
        pca_pictures(features, reference)


def test_depth_colours_run_from_bright_near_to_dark_far():
    ramp = depth_picture(np.array([[0.1, 0.5, 1.0, 3.0, 99.0]], np.float32), 0.1, 3.0)
    brightness = ramp[0].astype(int).sum(-1)
    assert (np.diff(brightness[:4]) < 0).all()
    assert (ramp[0, 3] == ramp[0, 4]).all()  # clipped
    with pytest.raises(ConfigError, match="near is 2"):
        depth_picture(np.ones((2, 2), np.float32), 2, 1)


def test_png_round_trip():
    picture = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(picture)))), picture)
