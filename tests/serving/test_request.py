from __future__ import annotations

import numpy as np
import pytest

from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.serving.request import Signature

SIGNATURE = Signature(
    ("front", "wrist"), state_dim=2, action_dim=3, chunk=5, continues_chunks=True, aliases={"image": "front"}
)
IMAGE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
STATE = np.array([0.5, -1], np.float32)
GOOD = {"observation/front": IMAGE, "observation/wrist": IMAGE, "observation/state": STATE, "prompt": "go"}


def without(*keys, **changes):
    return {k: v for k, v in GOOD.items() if k not in keys} | changes


@pytest.mark.parametrize(
    "message",
    [
        GOOD,
        GOOD | {"something/else": 1, "observation/left": IMAGE},
        {"images": {"front": IMAGE, "wrist": IMAGE}, "state": [0.5, -1], "task": "go"},
        {
            "images": {"front": IMAGE.transpose(2, 0, 1), "wrist": IMAGE},
            "state": STATE.astype(">f8"),
            "prompt": "go",
        },
        {
            "observation.images.front": IMAGE,
            "observation.images.wrist": IMAGE,
            "observation.state": STATE,
            "task": np.array("go"),
        },
        without("observation/front", **{"observation/image": IMAGE}),
        without("observation/front", **{"observation/front": (IMAGE / np.float32(255)).astype(np.float64)}),
    ],
)
def test_the_names_of_openpi_and_lerobot_are_understood(message):
    request = SIGNATURE.parse(message)
    assert list(request.observation["images"]) == ["front", "wrist"]
    for image in request.observation["images"].values():
        assert image.dtype == np.uint8
        np.testing.assert_allclose(image.astype(int), IMAGE.astype(int), atol=1)  # floats are truncated
    assert request.observation["state"].dtype == np.float32
    np.testing.assert_array_equal(request.observation["state"], STATE)
    assert request.observation["task"] == "go"
    assert (request.seed, request.overlap) == (None, None)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ([1], "the request is a list; expected a map"),
        (dict.fromkeys(map(str, range(999)), 0), "has 999 entries; expected at most 256"),
        ({"images": dict.fromkeys(map(str, range(999)), 0)}, "has 999 entries"),
        ({b"prompt": "go"}, "expected a map with text keys"),
        (
            without("observation/wrist"),
            r"image 'wrist' is missing from the request; it has images \['front'\]",
        ),
        ({"prompt": "go"}, "image 'front' is missing from the request; it has no image at all"),
        (without("observation/wrist", **{"observation/wirst": IMAGE}), r"Did you mean 'wirst'\?"),
        (GOOD | {"observation/front": IMAGE[..., 0]}, r"image 'front' has shape \(4, 6\); expected \(height"),
        (GOOD | {"observation/front": [[1]]}, "image 'front' is a list"),
        (GOOD | {"observation/front": IMAGE[:0]}, r"shape \(0, 6, 3\)"),
        (GOOD | {"observation/front": np.zeros((1, 9999, 3), np.uint8)}, r"shape \(1, 9999, 3\)"),
        (GOOD | {"observation/front": IMAGE.astype(np.float32)}, "'front' is float32 or out of range"),
        (GOOD | {"observation/front": np.full((2, 2, 3), np.nan)}, "out of range"),
        (GOOD | {"observation/front": IMAGE.astype(np.int64)}, "'front' is int64"),
        (
            without("observation/state"),
            "'observation/state' is missing .*also taken: observation.state, state",
        ),
        (GOOD | {"observation/state": STATE[:1]}, r"has shape \(1,\); expected \(2,\) finite"),
        (GOOD | {"observation/state": STATE * np.inf}, "is not finite"),
        (GOOD | {"observation/state": "0.5"}, "'observation/state' does not hold numbers"),
        (GOOD | {"observation/state": [[1], [2, 3]]}, "does not hold numbers"),
        (without("prompt"), "'prompt' is missing .*the instruction as text"),
        (GOOD | {"prompt": 7}, "'prompt' is int; expected text"),
        (GOOD | {"prompt": "x" * 5000}, "5000 characters long"),
        (GOOD | {"seed": 1.5}, "'seed' is 1.5; expected a 64-bit integer"),
        (GOOD | {"seed": True}, "'seed' is True"),
        (GOOD | {"rtc": 3}, "'rtc' must be a map of `previous`"),
        (GOOD | {"rtc": {"previous": np.ones((2, 3))}}, "'rtc' must be a map"),
        (GOOD | {"rtc": {"previous": np.ones((2, 4)), "delay": 1}}, "at most 5 rows of 3 numbers"),
        (GOOD | {"rtc": {"previous": np.ones((2, 3)), "delay": 3}}, "rtc.delay is 3; expected 0 to 2"),
        (GOOD | {"rtc": {"previous": "ab", "delay": 0}}, "'rtc.previous' does not hold numbers"),
    ],
)
def test_a_wrong_field_is_named(message, error):
    with pytest.raises(DataError, match=error):
        SIGNATURE.parse(message)


def test_optional_fields():
    overlap = {"previous": np.ones((2, 3)), "delay": np.int64(1)}
    request = SIGNATURE.parse(GOOD | {"seed": 2**64 - 1, "rtc": overlap})
    assert request.seed == 2**64 - 1
    assert request.overlap.delay == 1
    assert request.overlap.previous.dtype == np.float32
    plain = Signature(("front",), 2, 3, 5, default_prompt="stack the cups")
    assert plain.parse(without("prompt")).observation["task"] == "stack the cups"
    with pytest.raises(DataError, match=r"'rtc'"):
        plain.parse(GOOD | {"rtc": overlap})


def test_a_policy_without_proprioception_ignores_the_state():
    blind = Signature(("front",), state_dim=0, action_dim=3, chunk=5)
    for message in (GOOD, without("observation/state")):
        assert blind.parse(message).observation["state"].shape == (0,)


def test_a_fixed_image_shape_and_the_camera_map():
    strict = Signature(("front",), 2, 3, 5, image_shape=(224, 224))
    with pytest.raises(DataError, match=r"has shape \(4, 6, 3\); expected \(224, 224, 3\)"):
        strict.parse(GOOD)
    assert strict.metadata()["cameras"] == {"front": {"shape": [224, 224, 3], "dtype": "uint8"}}
    with pytest.raises(ConfigError, match=r"no camera 'frnt'. Did you mean 'front'"):
        Signature(("front",), 2, 3, 5, aliases={"image": "frnt"})
