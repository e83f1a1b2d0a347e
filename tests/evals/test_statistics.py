"""Evaluation statistics: intervals against published values, pass@k against enumeration."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.evals.statistics import (
    difference_interval,
    grouped,
    mean_interval,
    pass_at_k,
    share_interval,
    student_quantile,
    wilson,
)

Z95 = 1.959963984540054


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_newcombe_s_table(successes, count, low, high):
    """R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert tuple(round(end, 4) for end in wilson(successes / count, count, Z95)) == (low, high)


@given(data=st.data(), count=st.integers(1, 10_000))
@settings(max_examples=100, deadline=None)
def test_wilson_s_ends_are_where_the_score_test_just_rejects(data, count):
    """(share - p)^2 = z^2 p (1 - p) / n at both ends p: the definition, which the closed form solves."""
    share = data.draw(st.integers(0, count)) / count
    low, high = wilson(share, count, Z95)
    rounding = 1e-12
    assert 0 <= low <= share + rounding
    assert share - rounding <= high <= 1
    for end in (low, high):
        assert (share - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / count, rel=1e-4, abs=1e-12)


def test_a_share_that_rounding_moved_past_its_bound_ends_there():
    """Equal values just at a bound may have a mean that is one unit in the last place beyond it."""
    for count in range(1, 200):
        assert wilson(-1e-17, count, Z95)[0] == 0
        assert wilson(1 + 2.3e-16, count, Z95)[1] == 1


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (9, 2.262157), (10, 2.228139), (29, 2.045230), (120, 1.979930)],
)  # fmt: skip
def test_student_s_quantiles_are_the_tables(freedom, quantile):
    assert student_quantile(freedom) == pytest.approx(quantile, abs=1e-6)
    assert student_quantile(100_000) == pytest.approx(Z95, abs=3e-5)


def test_an_accuracy_with_one_sample_of_each_prompt_is_wilson_s():
    estimate = share_interval([[1.0]] * 6 + [[0.0]] * 4)
    assert (estimate.low, estimate.high) == pytest.approx(wilson(0.6, 10, Z95))
    assert (estimate.value, estimate.count) == (0.6, 10)


def test_an_accuracy_with_two_samples_of_each_prompt_by_hand():
    """Prompts' shares 1, 1, 1/2, 1/2, 1/2, 1/2, 0, 0: mean 1/2, population variance 1/8 of at most 1/4, half alike.

    As 7 / (1/2) / (1 - 1/16) = 14.93 observations, with a quantile half way from 1.960 to t of 7 degrees, 2.364624.
    """
    estimate = share_interval([[1.0, 1.0]] * 2 + [[0.0, 1.0]] * 4 + [[0.0, 0.0]] * 2)
    wanted = wilson(0.5, 7 / 0.5 / (1 - 0.5 / 8), (Z95 + 2.364624) / 2)
    assert (estimate.low, estimate.high) == pytest.approx(wanted, abs=2e-4)  # exp(-8) more alike


def test_samples_that_only_repeat_their_prompt_tell_nothing_more():
    once = share_interval([[1.0]] * 6 + [[0.0]] * 4)
    often = share_interval([[1.0] * 8] * 6 + [[0.0] * 8] * 4)
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    assert often.count == 80


def test_an_accuracy_mirrors_and_follows_its_bounds():
    values = [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    plain = share_interval(values)
    mirrored = share_interval([[1 - value for value in prompt] for prompt in values])
    assert (plain.low, plain.high) == pytest.approx((1 - mirrored.high, 1 - mirrored.low))
    moved = share_interval([[4 * value - 1 for value in prompt] for prompt in values], low=-1, high=3)
    assert (moved.low, moved.high) == pytest.approx((4 * plain.low - 1, 4 * plain.high - 1))


@pytest.mark.parametrize("num_prompts", [1, 2, 3, 10])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_prompts_that_are_all_alike_leave_an_interval(num_prompts, value):
    """By the rule of three and its kin, 3 prompts without a wrong one say little of the others."""
    estimate = share_interval([[value] * 4] * num_prompts)
    assert 0 <= estimate.low <= value <= estimate.high <= 1
    assert estimate.high - estimate.low > 0.25
    reward = mean_interval([[7 * value] * 4] * num_prompts)
    assert reward.high - reward.low > 0.25
    same = difference_interval([[0.0]] * num_prompts)
    assert (same.low, same.high) == (-same.high, pytest.approx(same.high))
    assert same.high > 0.25


def test_mean_interval_by_hand():
    """Prompts' means 2, 4, 6: mean 4, sample variance 4, standard error 2 / sqrt 3, t of two degrees of freedom."""
    estimate = mean_interval([[1.0, 3.0], [4.0, 4.0], [6.0, 6.0]])
    half = 4.302653 * 2 / math.sqrt(3)
    assert (estimate.value, estimate.count) == (4, 6)
    assert (estimate.low, estimate.high) == pytest.approx((4 - half, 4 + half), rel=1e-6)
    assert mean_interval([[1.0], [3.0], [5.0]], low=0, high=6).low == 0


def test_prompts_with_fewer_values_count_for_less_by_hand():
    """1, 1, 1 and 0: mean 3/4; (3 - 9/4)^2 + (0 - 3/4)^2 = 9/8, times (2/4)^2: variance 9/32 of each prompt about the mean."""
    estimate = mean_interval([[1.0, 1.0, 1.0], [], [0.0]])
    half = 12.706205 * math.sqrt(9 / 32 / 2)
    assert (estimate.low, estimate.high) == pytest.approx((0.75 - half, 0.75 + half))


def test_a_difference_by_hand():
    """Differences 1, 0, 0, 1, 0, 1, 1, 1: mean 5/8, variance 15/56; e^-10 of what is unseen hardly widens it."""
    estimate = difference_interval([[1.0], [0.0], [0.0], [1.0], [0.0], [1.0], [1.0], [1.0]])
    half = 2.364624 * math.sqrt(15 / 56 / 8)
    assert estimate.low == pytest.approx(5 / 8 - half, abs=1e-6)
    assert estimate.high == 1


def test_the_mean_of_nothing_is_refused():
    for interval in (share_interval, mean_interval, difference_interval):
        with pytest.raises(ValueError, match="nothing"):
            interval([[], []])


def test_equal_keys_are_one_prompt():
    assert grouped("abab", [1, 2, 3, 4]) == [[1, 3], [2, 4]]


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
