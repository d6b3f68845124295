from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.evaluation.paired import (
    holm,
    macro_average,
    mcnemar,
    outcomes,
    p_text,
    paired_difference,
    paired_error,
    spread,
)
from spatial_forcing.evaluation.planning import (
    first_reach,
    independent_episode_sd,
    power,
    sample_sizes,
    seeds_needed,
    steps_to_threshold,
)
from spatial_forcing.evaluation.results import EpisodeResult
from spatial_forcing.evaluation.statistics import wilson

TASKS = ("push", "reach")


def arm(rng, rates, episodes=20):
    """Outcomes of one training seed for each rate."""
    return {
        seed: {(task, e): bool(rng.random() < rate) for task in TASKS for e in range(episodes)}
        for seed, rate in enumerate(rates)
    }


def test_outcomes_and_their_mean_over_tasks():
    rows = [EpisodeResult("a", i, i < 3, 1, 0.0, 0.0) for i in range(4)]
    found = outcomes([*rows, EpisodeResult("b", 0, False, 1, 0.0, 0.0)])
    assert macro_average(found) == pytest.approx((0.75 + 0) / 2)
    with pytest.raises(DataError, match="twice"):
        outcomes([rows[0], rows[0]])


def test_the_error_is_that_of_a_hierarchical_bootstrap():
    """Seeds are drawn with replacement, then the episodes of each: the spread of the means of many draws."""
    rng = np.random.default_rng(7)
    treated, control = error_arm(rng, [2.0, 2.2, 1.9, 2.4], 6), error_arm(rng, [2.1, 2.0, 2.2, 2.0], 6)
    found = paired_error(treated, control)
    gaps = np.array(
        [[[treated[s][t, n] - control[s][t, n] for n in range(6)] for t in "ab"] for s in range(4)]
    )
    seeds = rng.integers(4, size=(20_000, 4))
    episodes = rng.integers(6, size=(20_000, 4, 2, 6))
    drawn = np.take_along_axis(gaps[seeds], episodes, -1).mean((1, 2, 3))
    level = np.mean([macro_average(control[s]) for s in range(4)])
    reach = (found.high - found.low) / 2 / stats.t.ppf(0.975, 3)
    assert reach == pytest.approx(drawn.std() / level * np.sqrt(4 / 3), rel=0.02)


@pytest.mark.parametrize("seeds", [2, 3, 5, 6])
def test_seeds_that_all_agree_are_as_strong_as_barnards_test_says(seeds):
    won, lost = ({s: {("push", e): w for e in range(20)} for s in range(seeds)} for w in (True, False))
    barnard = stats.barnard_exact([[seeds, 0], [0, seeds]], n=128).pvalue
    assert paired_difference(won, lost).p_value == pytest.approx(barnard)


def test_one_seed_has_the_interval_of_its_episodes():
    """With one task the reference is scipy's paired t-test over episodes."""
    rng = np.random.default_rng(0)
    treated, control = ({0: {("a", e): rng.random() < r for e in range(60)}} for r in (0.8, 0.4))
    found = paired_difference(treated, control)
    first, second = ([float(v) for v in arm[0].values()] for arm in (treated, control))
    reference = stats.ttest_rel(first, second)
    interval = reference.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p_value == pytest.approx(reference.pvalue)
    assert found.seeds == 1


def test_difference_is_students_over_seeds_when_episodes_are_many():
    """Episode noise vanishes, so the reference is scipy's paired t-test on the seeds' success."""
    rng = np.random.default_rng(0)
    treated, control = arm(rng, [0.9, 0.5, 0.7, 0.8], 3000), arm(rng, [0.5, 0.4, 0.6, 0.2], 3000)
    found = paired_difference(treated, control)
    first, second = ([macro_average(a[s]) for s in range(4)] for a in (treated, control))
    reference = stats.ttest_rel(first, second)
    interval = reference.confidence_interval(0.95)
    assert found.value == pytest.approx(np.mean(first) - np.mean(second))
    assert found.p_value == pytest.approx(reference.pvalue, rel=0.05)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.02)
    assert found.seed_sd == pytest.approx(np.std(np.subtract(first, second), ddof=1), rel=0.02)


def test_interval_covers_the_truth_as_often_as_it_says_and_rarely_more_than_needed():
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(150):
        base = rng.uniform(0.3, 0.6, 5)
        found = paired_difference(arm(rng, base + rng.normal(0.1, 0.08, 5)), arm(rng, base))
        covered.append(found.low <= 0.1 <= found.high)
    assert np.mean(covered) >= 0.92


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_difference_is_antisymmetric_in_range_and_consistent_with_its_p_value(number, seeds):
    rng = np.random.default_rng(number)
    a, b = arm(rng, rng.uniform(size=seeds), 6), arm(rng, rng.uniform(size=seeds), 6)
    forth = paired_difference(a, b)
    back = paired_difference(b, a)
    assert forth.value == pytest.approx(-back.value)
    assert -1 <= forth.low <= forth.value <= forth.high <= 1
    assert (forth.low > 0 or forth.high < 0) == (forth.p_value < 0.05) or forth.p_value == 2.0 ** (1 - seeds)
    assert forth.value == pytest.approx(np.mean(list(forth.per_task.values())))


def error_arm(rng, levels, episodes=40):
    return {
        s: {(t, n): level + 0.3 * rng.standard_normal() for t in "ab" for n in range(episodes)}
        for s, level in enumerate(levels)
    }


def test_error_difference_is_students_over_seeds_as_a_part_of_the_controls_error():
    rng = np.random.default_rng(3)
    treated, control = (error_arm(rng, levels, 3000) for levels in ([1.8, 1.5, 1.9], [2.0, 1.9, 2.2]))
    found = paired_error(treated, control)
    first, second = ([macro_average(a[s]) for s in range(3)] for a in (treated, control))
    reference = stats.ttest_rel(first, second)
    interval = reference.confidence_interval(0.95)
    level = np.mean(second)
    assert found.value == pytest.approx((np.mean(first) - level) / level)
    assert found.p_value == pytest.approx(reference.pvalue, rel=0.05)
    assert (found.low, found.high) == pytest.approx((interval.low / level, interval.high / level), abs=0.01)
    assert list(found.per_seed.values()) == pytest.approx(np.subtract(first, second) / level)
    assert found.episodes == 6000


def test_noise_of_few_episodes_widens_the_interval():
    """Two stages: the spread of seeds, and the noise of their episodes."""
    rng = np.random.default_rng(4)
    treated, control = error_arm(rng, [2.0] * 4, 5), error_arm(rng, [2.0] * 4, 5)
    found = paired_error(treated, control)
    differences = np.array(
        [[[treated[s][t, n] - control[s][t, n] for n in range(5)] for t in "ab"] for s in range(4)]
    )
    within = differences.var(-1).mean(0).sum() / 4 / 5  # of a seed's mean over two tasks
    expected = np.sqrt((differences.mean((1, 2)).var() + within) / 4 * 4 / 3) / 2.0
    reach = (found.high - found.low) / 2 / stats.t.ppf(0.975, 3)
    assert reach == pytest.approx(expected, rel=0.05)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_the_unit_of_an_error_does_not_matter(number, unit):
    rng = np.random.default_rng(number)
    a, b = (error_arm(rng, rng.uniform(2, 3, 3), 4) for _ in range(2))
    plain = paired_error(a, b)
    scaled = [{s: {k: unit * v for k, v in e.items()} for s, e in found.items()} for found in (a, b)]
    again = paired_error(*scaled)
    assert (again.value, again.low, again.high) == pytest.approx((plain.value, plain.low, plain.high))
    assert again.p_value == pytest.approx(plain.p_value)


def test_errors_that_do_not_match_are_refused():
    rng = np.random.default_rng(0)
    a, b = error_arm(rng, [2.0, 2.0], 3), error_arm(rng, [2.0, 2.0], 4)
    with pytest.raises(DataError, match="same episodes"):
        paired_error(a, b)
    with pytest.raises(DataError, match=r"share no training seed \(one has \[0\], the other \[1\]"):
        paired_error({0: a[0]}, {1: a[1]})
    with pytest.raises(DataError, match="error is 0"):
        paired_error(a, {s: dict.fromkeys(e, 0.0) for s, e in a.items()})


def test_agreement_of_every_episode_says_a_little_more_than_of_all_but_one():
    def solved(missing):
        won = {("push", e): True for e in range(20)}
        return {s: won | {("push", 0): s >= missing} for s in range(5)}

    nothing = {s: {("push", e): False for e in range(20)} for s in range(5)}
    all_won, nearly = (paired_difference(solved(n), nothing) for n in (0, 1))
    assert all_won.p_value <= nearly.p_value < 0.002
    assert (all_won.value, all_won.high) == (1.0, 1.0)
    assert nearly.low < all_won.low < 1.0
    same = paired_difference(nothing, nothing)
    assert (same.value, same.p_value) == (0.0, 1.0)
    assert -0.1 < same.low < 0 < same.high < 0.1
    assert spread(nothing).low == 0
    assert 0 < spread(nothing).high < 0.1


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_seeds_that_solve_all_or_nothing_are_not_taken_for_more_than_they_are(seeds):
    """Over all outcomes of policies that solve everything or nothing with probability 1/2."""

    def one(wins):
        return {s: {("push", e): won for e in range(20)} for s, won in enumerate(wins)}

    outcomes = list(product([False, True], repeat=2 * seeds))
    found = [paired_difference(one(w[:seeds]), one(w[seeds:])).p_value for w in outcomes]
    for level in (0.05, 0.05 / 6):
        assert np.mean(np.array(found) < level) <= level + 0.01


def test_arms_that_do_not_match_are_refused():
    rng = np.random.default_rng(0)
    a, b = arm(rng, [0.5, 0.5]), arm(rng, [0.5, 0.5], 19)
    with pytest.raises(DataError, match="same episodes with training seed 0"):
        paired_difference(a, b)


def test_no_p_value_is_said_to_be_zero():
    assert [p_text(p) for p in (0.0, 0.0009, 0.001, 0.0421, 1.0)] == [
        "< 0.001", "< 0.001", "= 0.001", "= 0.042", "= 1.000"
    ]  # fmt: skip


def test_holm_steps_down_from_the_smallest():
    # By hand: 4 x 0.005, 3 x 0.01, 2 x 0.03, then 1 x 0.04 raised to the one before.
    raw = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    assert holm(raw) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(holm(raw)) == list(raw)
    assert holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), min_size=1, max_size=7))
def test_holm_is_monotone_and_between_raw_and_bonferroni(raw):
    adjusted = holm(raw)
    for name, p in raw.items():
        assert p <= adjusted[name] <= min(1.0, len(raw) * max(raw.values()))
        assert all(adjusted[name] <= adjusted[other] for other, q in raw.items() if p < q)


def test_spread_is_students_interval_of_the_mean():
    arms = {s: {("a", e): e < won for e in range(10)} for s, won in enumerate((4, 6, 8))}
    found = spread(arms)
    low, high = stats.t.interval(0.95, 2, 0.6, stats.sem([0.4, 0.6, 0.8]))
    assert (found.mean, found.sd, found.seeds) == (pytest.approx(0.6), pytest.approx(0.2), 3)
    assert (found.low, found.high) == pytest.approx((low, min(high, 1.0)))
    assert (found.minimum, found.maximum) == (0.4, 0.8)
    alone = spread({0: arms[0]})
    one = wilson(4, 10)
    assert (alone.low, alone.high, alone.seeds) == (one.low, one.high, 1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_is_the_binomial_test_of_discordant_episodes(pairs):
    first, second = ({("a", i): pair[k] for i, pair in enumerate(pairs)} for k in (0, 1))
    found = mcnemar(first, second)
    n = found.only_first + found.only_second
    assert n == sum(a != b for a, b in pairs)
    tail = sum(comb(n, i) for i in range(min(found.only_first, found.only_second) + 1)) / 2**n
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar(second, first).p_value == found.p_value


def test_mcnemar_needs_identical_episodes():
    with pytest.raises(DataError, match="same episodes"):
        mcnemar({("a", 0): True}, {("a", 1): True})


def test_power_and_seeds_are_those_of_the_paired_t_test():
    # Cohen (1988) and every power program: d = 0.5, two-sided 5 %, 80 % power needs 34 pairs.
    found = seeds_needed(0.5, 10**9, seed_sd=1.0, episode_sd=0.0)
    assert found is not None
    assert found.seeds == 34
    assert found.power == pytest.approx(0.8078, abs=2e-4)  # G*Power 3.1
    assert power(0.5, 2, 10**9, seed_sd=0.001, episode_sd=0.0, alpha=0.05) == 0  # two may agree by chance
    assert power(0.05, 5, 10, seed_sd=0.0, episode_sd=0.0, alpha=0.05) < 1  # half an episode is a tenth of it
    assert power(0.0, 12, 10**9, seed_sd=1.0, episode_sd=0.3, alpha=0.05) == pytest.approx(0.05, abs=1e-4)
    assert power(0.0, 12, 10, seed_sd=0.1, episode_sd=0.7, alpha=0.05) < 0.02  # careful with few episodes


@pytest.mark.parametrize("seed_sd", [0.0, 0.1])
def test_power_is_what_compare_itself_reaches(seed_sd):
    rng = np.random.default_rng(5)
    seeds, gain, repeats = 8, 0.15, 400
    shown = []
    for _ in range(repeats):
        base = rng.uniform(0.4, 0.5, seeds)
        treated = arm(rng, np.clip(base + rng.normal(gain, seed_sd, seeds), 0, 1), 20)
        shown.append(paired_difference(treated, arm(rng, base, 20)).p_value < 0.05)
    episode_sd = np.sqrt(0.45 * 0.55 + 0.6 * 0.4)
    planned = power(gain, seeds, 40, seed_sd=seed_sd, episode_sd=episode_sd, alpha=0.05)
    assert planned == pytest.approx(np.mean(shown), abs=0.06)
    assert 0.2 < planned < 0.8  # else it would say little


def test_more_episodes_never_need_more_seeds_and_hopeless_effects_are_named():
    plans = sample_sizes(0.05, seed_sd=0.04, episode_sd=independent_episode_sd(0.5), episodes=(20, 80, 320))
    seeds = [plan.seeds for plan in plans if plan is not None]
    assert len(seeds) == 3
    assert seeds == sorted(seeds, reverse=True)
    assert seeds_needed(0.0001, 20, seed_sd=0.3, episode_sd=0.5) is None
    with pytest.raises(ConfigError, match="effect is 0 "):
        seeds_needed(0, 20, seed_sd=0.1, episode_sd=0.5)
    with pytest.raises(ConfigError, match=r"0\.05 for five points"):
        seeds_needed(50, 20, seed_sd=0.1, episode_sd=0.5)
    with pytest.raises(ConfigError, match=r"seed_sd is -0\.1"):
        seeds_needed(0.1, 20, seed_sd=-0.1, episode_sd=0.5)
    with pytest.raises(ConfigError, match="seed_sd is nan"):
        seeds_needed(0.1, 20, seed_sd=float("nan"), episode_sd=0.5)
    with pytest.raises(ConfigError, match="episodes is empty"):
        sample_sizes(0.1, seed_sd=0.1, episode_sd=0.5, episodes=())
    with pytest.raises(ConfigError, match=r"rate is 1\.5"):
        independent_episode_sd(1.5)
    with pytest.raises(ConfigError, match="alpha < power"):
        seeds_needed(0.1, 20, seed_sd=0.1, episode_sd=0.5, power_wanted=1.5)


def test_first_reach_interpolates_between_checkpoints():
    curve = {100: 0.2, 200: 0.6, 300: 0.4}
    assert first_reach(curve, 0.4) == pytest.approx(150)
    assert first_reach(curve, 0.1) == 100
    assert first_reach(curve, 0.7) is None
    assert first_reach({100: 0.1 + 0.2 - 1e-16}, 0.3 + 4e-16) == 100  # sums of the same rates


def test_steps_to_threshold_counts_seeds_that_never_reach_it_as_later():
    curves = {0: {100: 0.1, 200: 0.5}, 1: {100: 0.5, 200: 0.6}, 2: {100: 0.0, 200: 0.3}}
    found = steps_to_threshold(curves, 0.5)
    assert found.per_seed == {0: pytest.approx(200), 1: 100, 2: None}
    assert (found.median, found.reached, found.high) == (pytest.approx(200), 2, None)
    assert found.low == 100
    assert str(found) == "200 (2 of 3 seeds)"  # three seeds have no interval of a median
    many = steps_to_threshold(curves | {3: curves[0], 4: curves[1]}, 0.5)
    assert str(many) == "200 [<= 100, > 200] (4 of 5 seeds)"
    never = steps_to_threshold({0: {100: 0.1}, 1: {100: 0.2}}, 0.5)
    assert (never.median, never.low, never.high) == (None, None, None)
    half = steps_to_threshold({0: {100: 0.9}, 1: {100: 0.2}}, 0.5)
    assert half.median is None  # the median lies between 100 and never


def test_observation_ends_with_the_shortest_curve():
    found = steps_to_threshold({0: {100: 0.1, 200: 0.9}, 1: {100: 0.8}}, 0.5)
    assert found.last_step == 100
    assert found.per_seed[0] is None
