"""Evaluation statistics: intervals against published values, pass@k against enumeration (R28, R36)."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.evals.statistics import mean_interval, pass_at_k, wilson


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_newcombe_s_table(successes, count, low, high):
    """R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    estimate = wilson(successes, count)
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (low, high)
    assert (estimate.value, estimate.count) == (successes / count, count)


@given(data=st.data(), count=st.integers(1, 10_000))
@settings(max_examples=100, deadline=None)
def test_wilson_s_ends_are_where_the_score_test_just_rejects(data, count):
    """(share - p)^2 = z^2 p (1 - p) / n at both ends p: the definition, which the closed form solves."""
    successes = data.draw(st.integers(0, count))
    estimate = wilson(successes, count)
    rounding = 1e-12
    assert 0 <= estimate.low <= estimate.value + rounding
    assert estimate.value - rounding <= estimate.high <= 1
    for end in (estimate.low, estimate.high):
        assert (successes / count - end) ** 2 == pytest.approx(
            1.959964**2 * end * (1 - end) / count, rel=1e-4, abs=1e-12
        )


def test_wilson_mirrors():
    few, many = wilson(3, 17), wilson(14, 17)
    assert (few.low, few.high) == pytest.approx((1 - many.high, 1 - many.low), abs=1e-12)


@pytest.mark.parametrize(("successes", "count"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_proportion(successes, count):
    with pytest.raises(ValueError, match=f"{successes} successes of {count}"):
        wilson(successes, count)


def test_mean_interval_by_hand():
    """2, 4, 6: mean 4, sample variance 4, standard error 2 / sqrt 3."""
    estimate = mean_interval([2.0, 4.0, 6.0])
    half = 1.959964 * 2 / math.sqrt(3)
    assert (estimate.value, estimate.count) == (4, 3)
    assert (estimate.low, estimate.high) == pytest.approx((4 - half, 4 + half), rel=1e-6)


def test_mean_interval_of_one_value_and_of_none():
    assert mean_interval([7.0]).value == 7
    with pytest.raises(ValueError, match="nothing"):
        mean_interval([])


@pytest.mark.parametrize("num_samples", range(1, 7))
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one(num_samples):
    """Every set of k of the n samples enumerated."""
    for num_right in range(num_samples + 1):
        samples = [number < num_right for number in range(num_samples)]
        for k in range(1, num_samples + 1):
            draws = list(itertools.combinations(samples, k))
            share = sum(any(draw) for draw in draws) / len(draws)
            assert pass_at_k(num_right, num_samples, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_is_unbiased():
    """For samples that are each right with chance p, its expectation over the number right is 1 - (1 - p)^k."""
    p, n = 0.3, 8
    for k in (1, 3, 8):
        expectation = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(c, n, k) for c in range(n + 1))
        assert expectation == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_pass_at_k_of_many_samples_is_exact():
    assert pass_at_k(1, 10_000, 100) == pytest.approx(0.01, rel=1e-12)
    assert pass_at_k(0, 10_000, 100) == 0
    assert pass_at_k(9_901, 10_000, 100) == 1


@pytest.mark.parametrize(("num_right", "num_samples", "k"), [(1, 4, 0), (1, 4, 5), (5, 4, 1), (-1, 4, 1), (0, 0, 1)])
def test_pass_at_k_refuses_what_cannot_be(num_right, num_samples, k):
    with pytest.raises(ValueError, match=f"pass@{k}"):
        pass_at_k(num_right, num_samples, k)
