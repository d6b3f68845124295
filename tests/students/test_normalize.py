import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.students.normalize import Normalizer
from spatial_forcing.students.openvla_oft.statistics import Bounds, set_from_dataset


def stats_of(values):
    return {
        "action": {
            "mean": values.mean(0).tolist(),
            "std": values.std(0),
            "min": values.min(0),
            "max": torch.from_numpy(values.max(0)),
            "q01": np.quantile(values, 0.01, axis=0),
            "q99": np.quantile(values, 0.99, axis=0),
        }
    }


def fitted(values, mode):
    normalizer = Normalizer(values.shape[1], mode)
    normalizer.fit(stats_of(values), "action")
    return normalizer


@pytest.fixture
def values():
    return np.random.default_rng(0).normal([1, -200, 0.01], [0.1, 30, 1e-3], (500, 3))


def test_modes_do_what_their_names_say(values):
    x = torch.from_numpy(values).float()
    z = fitted(values, "mean_std").normalize(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)
    scaled = fitted(values, "min_max").normalize(x)
    torch.testing.assert_close(scaled.amin(0), -torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.amax(0), torch.ones(3), atol=1e-4, rtol=0)
    inside = (fitted(values, "quantile").normalize(x).abs() <= 1).float().mean(0)
    torch.testing.assert_close(inside, torch.full((3,), 0.98), atol=0.01, rtol=0)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["mean_std", "min_max", "quantile"]), st.floats(-100, 100), st.floats(0.01, 100))
def test_round_trip(mode, shift, spread):
    values = np.random.default_rng(1).normal(shift, spread, (40, 2))
    normalizer = fitted(values, mode)
    x = torch.from_numpy(values).float()
    back = normalizer.denormalize(normalizer.normalize(x))
    torch.testing.assert_close(back, x, atol=1e-5 * (abs(shift) + spread), rtol=1e-5)


@pytest.mark.parametrize("mode", ["mean_std", "min_max", "quantile"])
def test_a_constant_dimension_is_finite_and_comes_back_as_its_constant(mode):
    values = np.stack([np.full(10, 0.3), np.arange(10.0)], 1)
    normalizer = fitted(values, mode)
    normalized = normalizer.normalize(torch.tensor([[7.0, 2.0]]))
    assert normalized[0, 0] == 0
    assert torch.isfinite(normalized).all()
    torch.testing.assert_close(normalizer.denormalize(torch.tensor([5.0, 0.0]))[0], torch.tensor(0.3))


def test_bad_statistics_are_named(values):
    stats = stats_of(values)
    with pytest.raises(ConfigError, match="'median'"):
        Normalizer(3, "median")
    with pytest.raises(DataError, match=r"no 'mean' of 'observation.state' \(found \['action'\]\)"):
        Normalizer(3, "mean_std").fit(stats, "observation.state")
    del stats["action"]["q99"]
    with pytest.raises(DataError, match="'q99'"):
        Normalizer(3, "quantile").fit(stats, "action")
    with pytest.raises(DataError, match="expected 2 finite"):
        Normalizer(2, "mean_std").fit(stats, "action")
    stats["action"]["std"][1] = np.nan
    with pytest.raises(DataError, match="finite"):
        Normalizer(3, "mean_std").fit(stats, "action")
    stats["action"]["min"], stats["action"]["max"] = stats["action"]["max"], stats["action"]["min"]
    with pytest.raises(DataError, match=r"'action' .*\(min, max\)"):
        Normalizer(3, "min_max").fit(stats, "action")


def gripper(frames=1000, closed=3):
    """Two numbers: one that moves, and a gripper that closes in a few frames."""
    values = np.random.default_rng(0).normal(size=(frames, 3))
    values[:, 1] = 0.04
    values[:closed, 1] = 0.0
    values[:, 2] = 7
    return values


@pytest.mark.parametrize("family", ["normalizer", "bounds"])
def test_a_gripper_that_rarely_closes_can_be_commanded(family, caplog):
    """q01 = q99 there: scaled by them the closed position could never come out."""
    values = gripper()
    stats = stats_of(values)
    assert stats["action"]["q01"][1] == stats["action"]["q99"][1]
    if family == "normalizer":
        scale = Normalizer(3, "quantile")
        scale.fit(stats, "action")
    else:
        scale = Bounds(3)
        set_from_dataset(scale, stats, "action", "quantile")
    assert re.search(r"action.*\[1\].*q01 = q99", caplog.text)
    assert re.search(r"action.*\[2\] never change", caplog.text)
    x = torch.from_numpy(values)
    there = scale.normalize(x)
    torch.testing.assert_close(there[[0, 500], 1].float(), torch.tensor([-1.0, 1.0]))
    assert (there[:, 2] == 0).all()
    back = scale.denormalize(there)
    torch.testing.assert_close(back[:, 1].float(), x[:, 1].float())
    torch.testing.assert_close(back[:, 2].float(), x[:, 2].float())
    plain = np.quantile(values[:, 0], [0.01, 0.99])  # the first dimension keeps its quantiles
    ends = torch.zeros(2, 3, dtype=torch.float64)
    ends[:, 0] = torch.from_numpy(plain)
    torch.testing.assert_close(scale.normalize(ends)[:, 0].float(), torch.tensor([-1.0, 1.0]))


def test_dimensions_that_pass_unscaled_stay_as_they_are():
    stats = stats_of(gripper())
    bounds = Bounds(3)
    set_from_dataset(bounds, stats, "action", "quantile", unscaled=(1,))
    assert bounds.low[1] == bounds.high[1] == 0.04
