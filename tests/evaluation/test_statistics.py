from math import sqrt
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_forcing.errors import DataError
from spatial_forcing.evaluation.statistics import macro_mean, wilson

counts = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counts, st.sampled_from([0.8, 0.95, 0.99]))
@settings(max_examples=60, deadline=None)
def test_wilsons_limits_are_the_rates_that_the_score_test_just_accepts(count, confidence):
    rate = wilson(*count, confidence)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    for limit in (rate.low, rate.high):
        if 0 < limit < 1:
            assert abs(rate.value - limit) == pytest.approx(z * sqrt(limit * (1 - limit) / rate.trials))
    assert 0 <= rate.low <= rate.value <= rate.high <= 1


def test_wilson_published_value():
    # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3: 81 of 263.
    rate = wilson(81, 263)
    assert (rate.low, rate.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_impossible_counts(successes, trials):
    with pytest.raises(DataError, match=f"{successes} successes in {trials}"):
        wilson(successes, trials)


def test_macro_mean_of_one_task_is_the_task_and_of_many_is_narrower():
    one = wilson(30, 50)
    assert macro_mean([one]) == one
    four = macro_mean([one] * 4)
    assert four.value == one.value
    assert four.high - four.low == pytest.approx((one.high - one.low) / 2)
    assert (four.successes, four.trials) == (120, 200)


def test_macro_mean_weighs_tasks_not_episodes():
    assert macro_mean([wilson(10, 10), wilson(0, 90)]).value == 0.5
    with pytest.raises(DataError, match="no task"):
        macro_mean([])
