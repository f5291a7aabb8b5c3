import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from a3tune.metrics.stats import (
    Estimate,
    holm,
    mean_interval,
    paired_difference,
    paired_permutation_test,
    seeds_interval,
)


def test_interval_of_independent_values_matches_theory():
    values = np.random.default_rng(0).normal(3.0, 1.0, 400)
    found = mean_interval(values, draws=5000)
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert found.count == 400
    narrow = mean_interval(values, level=0.5)
    assert narrow.high - narrow.low < 0.5 * (found.high - found.low)


def test_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(1)
    groups = np.repeat(np.arange(40), 5).tolist()
    covered = alone = 0
    for _ in range(200):
        # Five questions per image that share most of their luck.
        values = np.repeat(random.normal(size=40), 5) + 0.3 * random.normal(size=200)
        found, naive = mean_interval(values, groups, draws=400), mean_interval(values, draws=400)
        covered += found.low <= 0 <= found.high
        alone += naive.low <= 0 <= naive.high
    assert 180 <= covered <= 198
    assert alone < 150


@pytest.mark.parametrize(("images", "least"), [(5, 0.87), (10, 0.91), (20, 0.92)])
def test_few_images_are_no_surer_than_they_can_be(images: int, least: float):
    """Percentiles alone cover .82, .89 and .92."""
    random = np.random.default_rng(7)
    groups = np.repeat(np.arange(images), 4).tolist()
    covered = 0
    for _ in range(400):
        values = np.repeat(random.normal(size=images), 4) + random.normal(size=4 * images)
        found = mean_interval(values, groups, draws=500)
        covered += found.low <= 0 <= found.high
    assert covered >= least * 400


def test_few_seeds_are_no_surer_than_they_can_be():
    random = np.random.default_rng(8)
    covered = narrow = 0
    for _ in range(300):
        values = random.normal(size=(3, 1)) + 0.1 * random.normal(size=(3, 40))
        found = seeds_interval(values, draws=500)
        covered += found.low <= 0 <= found.high
        means = values.mean(1)
        narrow += abs(means.mean()) <= 1.96 * means.std() / math.sqrt(3)
    assert covered > 0.82 * 300 > narrow


def test_seeds_add_their_own_spread():
    random = np.random.default_rng(2)
    shift = np.array([-0.5, -0.2, 0.0, 0.2, 0.5])[:, None]
    values = shift + 0.1 * random.normal(size=(5, 300))
    both, one = seeds_interval(values), mean_interval(values.mean(0))
    assert both.mean == pytest.approx(one.mean)
    assert both.high - both.low > 10 * (one.high - one.low)
    assert both.count == 1500
    # One seed: the plain interval.
    assert seeds_interval(values[:1]) == mean_interval(values[0])


def test_groups_weigh_by_their_size():
    assert mean_interval([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]).mean == 0.75
    found = mean_interval([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"])
    assert (found.low, found.high) == (0.0, 1.0)


def test_nothing_undefined_slips_in():
    nan = float("nan")
    assert mean_interval([1.0, nan, 3.0], seed=3) == mean_interval([1.0, 3.0], seed=3)
    assert mean_interval([1.0, nan, 3.0]).count == 2
    empty = mean_interval([])
    assert math.isnan(empty.mean) and math.isnan(empty.low) and empty.count == 0
    assert mean_interval([nan]).count == 0
    alone = mean_interval([2.0, 4.0], ["x", "x"])
    assert alone.mean == 3.0 and math.isnan(alone.low)
    assert paired_difference([1.0, nan, 5.0], [0.0, 1.0, nan]).count == 1
    assert math.isnan(paired_permutation_test([nan], [1.0]))


def test_pairs_cancel_what_they_share():
    random = np.random.default_rng(4)
    base = random.normal(size=300)
    better = base + 0.05 + 0.01 * random.normal(size=300)
    found = paired_difference(better, base)
    assert found.mean == pytest.approx(0.05, abs=0.005)
    assert 0 < found.low < found.mean < found.high
    assert mean_interval(base).low < better.mean() < mean_interval(base).high
    assert paired_permutation_test(better, base) < 0.001
    with pytest.raises(ValueError, match="same samples"):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="group per value"):
        mean_interval([1.0], ["a", "b"])


def test_permutation_test_by_hand():
    # Differences 1, 2, 3: of 8 sign patterns, only all plus and all minus reach 6.
    assert paired_permutation_test([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]) == 2 / 8
    assert paired_permutation_test([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1.0
    # Two groups with sums 3 and 3.
    assert paired_permutation_test([1.0, 2.0, 3.0], [0.0] * 3, ["a", "a", "b"]) == 2 / 4


def test_exact_and_random_permutations_agree():
    random = np.random.default_rng(5)
    first, second = random.normal(0.3, 1, 12), np.zeros(12)
    exact = paired_permutation_test(first, second)
    assert paired_permutation_test(first, second, draws=4000) == pytest.approx(exact, abs=0.03)
    signs = np.array(list(product([-1, 1], repeat=12)))
    assert exact == np.mean(np.abs(signs @ first) >= abs(first.sum()) - 1e-9)
    reference = scipy_stats.permutation_test(
        (first, second), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", n_resamples=10_000
    )
    assert exact == pytest.approx(reference.pvalue)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_right_or_wrong_answers_give_mcnemars_exact_test(pairs):
    first, second = np.array(pairs, dtype=float).T
    won, lost = int((first > second).sum()), int((first < second).sum())
    expected = scipy_stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert paired_permutation_test(first, second) == pytest.approx(expected)


def test_permutation_test_rejects_as_often_as_it_says():
    random = np.random.default_rng(6)
    p = [paired_permutation_test(random.normal(size=30), np.zeros(30), draws=300, seed=i) for i in range(300)]
    assert 0.02 <= np.mean(np.array(p) <= 0.05) <= 0.09


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1.0, 1.0])
    assert holm([]).size == 0
    np.testing.assert_allclose(holm([math.nan, 0.01, 0.04, math.nan, 0.03]), [math.nan, 0.03, 0.06, math.nan, 0.06])


VALUES = st.lists(st.floats(-10, 10), min_size=2, max_size=30)


@given(VALUES, st.integers(0, 5), st.integers(1, 4))
def test_properties(values, seed, size):
    groups = [index // size for index in range(len(values))]
    found = mean_interval(values, groups, draws=200, seed=seed)
    assert found == mean_interval(values, groups, draws=200, seed=seed) or math.isnan(found.low)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    if not math.isnan(found.low):
        assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    flipped = paired_permutation_test(np.zeros(len(values)), values, groups, draws=200, seed=seed)
    assert 0 < flipped <= 1
    assert flipped == paired_permutation_test(values, np.zeros(len(values)), groups, draws=200, seed=seed)
    assert isinstance(found, Estimate)


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_only_raises_and_keeps_the_order(p_values):
    adjusted = holm(p_values)
    assert (adjusted >= np.array(p_values) - 1e-12).all() and (adjusted <= 1).all()
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(adjusted[order]) >= -1e-12).all()
