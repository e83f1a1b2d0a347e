"""Group advantages, and one reward for a whole sequence."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from coterie.algorithms.advantages import SCALES, group_advantages, group_std, has_signal
from coterie.algorithms.aggregate import aggregate
from coterie.algorithms.clip import clipped_loss
from coterie.types import BatchTotals

NAN = math.nan
NORMALISING = ("sample", "population", "batch")

rewards_of_any_shape = array_shapes(min_dims=2, max_dims=2, max_side=6).flatmap(
    lambda shape: arrays("float64", shape, elements=st.one_of(st.just(NAN), st.floats(-1e6, 1e6)))
)
groups = st.lists(st.integers(-100, 100), min_size=2, max_size=8)


def advantages_of(*rewards: list[float], scale: str, dtype: torch.dtype = torch.float64) -> list[list[float]]:
    return group_advantages(torch.tensor(rewards, dtype=dtype), scale=scale).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rewards", "scale", "printed"),
    [
        ([3.8, 5.2, 6.1], "sample", [-1.06, 0.14, 0.92]),
        ([6, 8, 9], "population", [-1.34, 0.27, 1.07]),
        ([6, 8, 9], "sample", [-1.09, 0.22, 0.87]),
        ([6, 8, 9], "none", [-1.67, 0.33, 1.33]),
    ],
)
def test_worked_examples_come_out_to_the_printed_digits(rewards, scale, printed, dtype):
    got = group_advantages(torch.tensor([rewards], dtype=dtype), scale=scale)[0]
    assert [round(a, 2) for a in got.tolist()] == printed


@pytest.mark.parametrize(
    ("rewards", "scale", "printed"), [([3.8, 5.2, 6.1], "sample", 1.16), ([6, 8, 9], "population", 1.25)]
)
def test_the_std_of_the_worked_examples_is_the_printed_one(rewards, scale, printed):
    """The std is what stands between the mean-only and the normalised advantage."""
    plain, scaled = (advantages_of(rewards, scale=s)[0][0] for s in ("none", scale))
    assert round(plain / scaled, 2) == printed


def test_default_scale_is_the_sample_std():
    rewards = torch.tensor([[6.0, 8.0, 9.0]])
    assert torch.equal(group_advantages(rewards), group_advantages(rewards, scale="sample"))


def test_batch_scale_takes_each_group_s_mean_and_the_batch_s_std():
    """0, 2, 4, 10: mean 4, squares 16 + 4 + 0 + 36 = 56, sample variance 56 / 3. Group means 1 and 7."""
    std = math.sqrt(56 / 3)
    expected = [[-1 / std, 1 / std], [-3 / std, 3 / std]]
    torch.testing.assert_close(
        torch.tensor(advantages_of([0, 2], [4, 10], scale="batch")), torch.tensor(expected), atol=1e-6, rtol=0
    )


def test_groups_do_not_look_at_one_another():
    together = advantages_of([0, 1, 1], [5, -7, 30], scale="sample")
    assert together == advantages_of([0, 1, 1], scale="sample") + advantages_of([5, -7, 30], scale="sample")


def test_epsilon_is_added_to_the_std():
    """Rewards 0 and 2 have the population std 1: with an epsilon of 1 the advantages are halved."""
    got = group_advantages(torch.tensor([[0.0, 2.0]], dtype=torch.float64), scale="population", epsilon=1.0)
    assert got.tolist() == [[-0.5, 0.5]]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("value", [0.95, 0.1, 1 / 3, 0.0, -2.7, 1e-7, 60000.0])
def test_flat_group_is_exactly_zero(value, size, dtype, scale):
    """The mean of 16 times 0.95 is not 0.95 in float32; its residue over a small epsilon must not become a signal.

    The second group has signal, so that no scale is degenerate for the batch.
    """
    rewards = torch.stack([torch.full((size,), value), torch.arange(size, dtype=torch.float32)]).to(dtype)
    assert (group_advantages(rewards, scale=scale)[0] == 0).all()


@given(value=st.floats(-(2.0**100), 2.0**100, width=32), size=st.integers(1, 24), scale=st.sampled_from(SCALES))
@settings(max_examples=100, deadline=None)
def test_any_flat_group_is_exactly_zero(value, size, scale):
    rewards = torch.full((2, size), value, dtype=torch.float32)
    assert (group_advantages(rewards, scale=scale) == 0).all()
    assert not has_signal(rewards).any()


@pytest.mark.parametrize("scale", SCALES)
def test_a_flat_group_with_an_abstention_is_exactly_zero(scale):
    rewards = torch.tensor([[0.95] * 7 + [NAN], [NAN] * 8, [0.0] * 7 + [1.0]])
    assert (group_advantages(rewards, scale=scale)[:2] == 0).all()


@pytest.mark.parametrize("scale", SCALES)
def test_one_or_no_valid_reward_gives_zero(scale):
    rewards = torch.tensor([[NAN, 3.0, NAN], [NAN, NAN, NAN], [5.0, NAN, NAN]])
    assert group_advantages(rewards, scale=scale).tolist() == [[0.0] * 3] * 3


@pytest.mark.parametrize("scale", SCALES)
def test_a_group_of_one_gives_zero(scale):
    assert advantages_of([4.0], [9.0], scale=scale) == [[0.0], [0.0]]


@pytest.mark.parametrize("scale", SCALES)
def test_an_abstention_leaves_the_mean_and_the_std(scale):
    """With or without the abstaining completion the others get the same."""
    with_nan = advantages_of([6, NAN, 8, 9], [1, 2, NAN, 4], scale=scale)
    without = advantages_of([6, 8, 9], [1, 2, 4], scale=scale)
    assert [with_nan[0][i] for i in (0, 2, 3)] == pytest.approx(without[0], rel=1e-12)
    assert [with_nan[1][i] for i in (0, 1, 3)] == pytest.approx(without[1], rel=1e-12)
    assert with_nan[0][1] == with_nan[1][2] == 0


@given(rewards=rewards_of_any_shape, scale=st.sampled_from(SCALES))
@settings(max_examples=150, deadline=None)
def test_nothing_but_finite_numbers_comes_out(rewards, scale):
    rewards = torch.from_numpy(rewards)
    advantages = group_advantages(rewards, scale=scale)
    assert advantages.shape == rewards.shape
    assert advantages.dtype == rewards.dtype
    assert advantages.isfinite().all()
    assert (advantages[rewards.isnan()] == 0).all()


@given(rewards=groups, scale=st.sampled_from(SCALES))
@settings(max_examples=150, deadline=None)
def test_advantages_sum_to_zero_and_keep_the_rewards_order(rewards, scale):
    got = advantages_of(rewards, scale=scale)[0]
    assert sum(got) == pytest.approx(0, abs=1e-9)
    for (r, a), (s, b) in itertools.combinations(zip(rewards, got, strict=True), 2):
        assert (r > s) == (a > b)
        assert (r < s) == (a < b)


@given(rewards=groups, constant=st.integers(-1000, 1000), scale=st.sampled_from(SCALES))
@settings(max_examples=100, deadline=None)
def test_adding_a_constant_changes_nothing(rewards, constant, scale):
    moved = [reward + constant for reward in rewards]
    assert advantages_of(moved, scale=scale)[0] == pytest.approx(advantages_of(rewards, scale=scale)[0], abs=1e-9)


@given(rewards=groups, factor=st.sampled_from([0.5, 4.0, 1024.0]), scale=st.sampled_from(NORMALISING))
@settings(max_examples=100, deadline=None)
def test_a_normalised_advantage_is_free_of_the_reward_s_unit(rewards, factor, scale):
    scaled = [reward * factor for reward in rewards]
    assert advantages_of(scaled, scale=scale)[0] == pytest.approx(advantages_of(rewards, scale=scale)[0], rel=1e-5)


@pytest.mark.parametrize("scale", NORMALISING)
@pytest.mark.parametrize("unit", [1e25, 1e37])
def test_very_large_rewards_are_normalised_like_small_ones(unit, scale):
    """Their squares overflow float32, they do not."""
    got = advantages_of([0.0, unit], [unit, 3 * unit], scale=scale, dtype=torch.float32)
    expected = advantages_of([0.0, 1.0], [1.0, 3.0], scale=scale)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", NORMALISING)
def test_rewards_at_both_ends_of_the_type_do_not_become_nan(scale):
    """The difference from the mean, -4e38, is more than float32 holds, though no reward is."""
    got = group_advantages(torch.tensor([[3e38, 3e38, -3e38]]), scale=scale)
    assert not got.isnan().any()


@given(data=st.data(), rewards=groups, scale=st.sampled_from(SCALES))
@settings(max_examples=100, deadline=None)
def test_the_order_of_a_group_does_not_matter(data, rewards, scale):
    order = data.draw(st.permutations(range(len(rewards))))
    moved = advantages_of([rewards[i] for i in order], scale=scale)[0]
    plain = advantages_of(rewards, scale=scale)[0]
    assert moved == pytest.approx([plain[i] for i in order], abs=1e-12)


@given(rewards=groups)
@settings(max_examples=50, deadline=None)
def test_the_two_stds_differ_by_the_root_of_g_over_g_minus_one(rewards):
    size = len(rewards)
    sample, population = (advantages_of(rewards, scale=scale)[0] for scale in ("sample", "population"))
    assert population == pytest.approx([a * math.sqrt(size / (size - 1)) for a in sample], rel=1e-5)


def test_integer_and_boolean_rewards_are_numbers():
    """0, 0, 1: mean 1/3, sample variance (1/9 + 1/9 + 4/9) / 2 = 1/3."""
    for rewards in (torch.tensor([[0, 0, 1]]), torch.tensor([[False, False, True]])):
        got = group_advantages(rewards)[0].tolist()
        assert got == pytest.approx([-(3**-0.5), -(3**-0.5), 2 * 3**-0.5], rel=1e-5)


def test_a_batch_without_prompts_has_no_advantages():
    assert group_advantages(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("scale", SCALES)
def test_the_rewards_are_left_as_they_were(scale):
    rewards = torch.tensor([[1.0, NAN, 3.0], [2.0, 2.0, 2.0]])
    before = rewards.clone()
    group_advantages(rewards, scale=scale)
    assert torch.equal(rewards.nan_to_num(-1), before.nan_to_num(-1))


@pytest.mark.parametrize(
    ("rewards", "scale", "message"),
    [
        (torch.zeros(2, 3), "std", "sample, population, none, batch"),
        (torch.zeros(3), "sample", "(3,)"),
        (torch.zeros(1, 2, 3), "sample", "(1, 2, 3)"),
        (torch.tensor([[1.0, math.inf]]), "sample", "infinite"),
        (torch.tensor([[1.0, -math.inf]]), "none", "infinite"),
    ],
)
def test_what_cannot_be_used_is_refused_with_what_was_given(rewards, scale, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        group_advantages(rewards, scale=scale)


def test_has_signal_counts_groups_whose_rewards_differ():
    rewards = torch.tensor([[0.0, 0.0], [0.0, 1.0], [NAN, 1.0], [NAN, NAN]])
    assert has_signal(rewards).tolist() == [False, True, False, False]
    assert has_signal(torch.tensor([[NAN, 1.0, 2.0]])).tolist() == [True]


def test_one_reward_a_sequence_needs_no_value_per_token():
    """Rewards 0 and 1, completions of 2 and 1 tokens, at ratio 1: a token's gradient is -A / (length B).

    Mean only, A is -1/2 and 1/2: 1/8 for each of the two tokens, and -1/4 for the one.
    """
    advantages = group_advantages(torch.tensor([[0.0, 1.0]], dtype=torch.float64), scale="none").flatten()
    row, lengths = torch.tensor([0, 0, 1]), torch.tensor([2, 1])
    log_ratio = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    per_token = clipped_loss(log_ratio.exp(), advantages[row], low=0.2, high=0.2)
    totals = BatchTotals(num_rows=2, num_tokens=3, max_length=9)
    aggregate(per_token, row, lengths, aggregation="sequence_mean", totals=totals).backward()
    assert log_ratio.grad.tolist() == pytest.approx([0.125, 0.125, -0.25], abs=1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_the_group_mean_stands_in_for_the_state_value(size):
    """Enumerated over every group: the expected gradient points where the expected reward's does.

    The mean holds the completion's own reward, which shortens it by exactly (G - 1) / G.
    """
    logits = torch.tensor([0.3, -1.0, 0.6], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    probabilities = logits.softmax(0)
    exact = torch.autograd.grad((probabilities * rewards).sum(), logits, retain_graph=True)[0]
    expected = torch.zeros(())
    for group in itertools.product(range(3), repeat=size):
        tokens = torch.tensor(group)
        advantages = group_advantages(rewards[tokens][None], scale="none")[0]
        chance = probabilities[tokens].prod().detach()
        expected = expected + chance * (advantages * logits.log_softmax(0)[tokens]).mean()
    got = torch.autograd.grad(expected, logits)[0]
    torch.testing.assert_close(got, exact * (size - 1) / size, atol=1e-12, rtol=0)


def test_the_std_leaves_out_abstentions_and_is_0_for_equal_ones():
    """The sample std of 1, 2, 4 is sqrt(7 / 3). Huge rewards do not overflow, and one reward alone has no std."""
    nan = math.nan
    rewards = torch.tensor(
        [[1, 2, 4, nan], [0.1, 0.1, 0.1, 0.1], [3, nan, nan, nan], [1e200, 3e200, nan, nan]], dtype=torch.float64
    )
    wanted = torch.tensor([math.sqrt(7 / 3), 0, nan, math.sqrt(2) * 1e200], dtype=torch.float64)
    found = group_std(rewards)
    torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-15, atol=0)
    assert found[1] == 0
