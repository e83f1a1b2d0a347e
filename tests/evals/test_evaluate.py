"""Held-out figures and their intervals, from scored groups."""

import pytest
import torch

from coterie.evals.evaluate import Evaluation, estimates_of
from coterie.evals.statistics import share_interval
from coterie.rewards.base import Reward
from coterie.rewards.score import score
from coterie.types import Completion, Group, Prompt


def groups_of(*rows, prompts=None):
    """Groups whose completions have these texts."""
    zeros = torch.zeros(2)
    names = prompts or [f"p{number}" for number in range(len(rows))]
    return [
        Group(Prompt(0, name, [1]), [Completion([1, 2], zeros, zeros, "stop", text) for text in texts])
        for name, texts in zip(names, rows, strict=True)
    ]


def value(completions):
    return [float(text) for text in completions]


def figures(groups, *rewards):
    scored = score(groups, rewards)
    right = (scored.rewards > 0.5).flatten().tolist()
    return estimates_of(scored, {"accuracy": right}, rewards, 10)


def test_a_reward_of_right_and_wrong_has_the_accuracy_s_interval():
    for rows in (("00", "00", "00"), ("11", "11", "11"), ("01", "11", "00", "00")):
        found = figures(groups_of(*rows), Reward("right", value))
        assert found["reward"] == found["accuracy"]
        assert 0 <= found["reward"].low < found["reward"].high <= 1
        assert found["reward"].high - found["reward"].low > 0.3


def test_weights_stretch_the_interval_within_what_the_sum_can_be():
    groups = groups_of("00", "00", "01")
    plain, weighted = figures(groups, Reward("a", value)), figures(groups, Reward("a", value, 2.0), Reward("b", value))
    assert weighted["reward"].low == pytest.approx(3 * plain["reward"].low)
    assert weighted["reward"].high == pytest.approx(3 * plain["reward"].high)
    lost = figures(groups, Reward("penalty", lambda completions: [-float(text) for text in completions]))["reward"]
    assert (lost.low, lost.high) == (pytest.approx(-plain["reward"].high), pytest.approx(-plain["reward"].low))


def test_a_reward_without_bounds_is_not_given_any():
    found = figures(groups_of("59", "99", "97"), Reward("score", value))["reward"]
    assert found.high > 9
    assert found.low < 7


def test_equal_prompts_are_one():
    rows = ("11", "00", "11", "00", "10", "11")
    found = figures(groups_of(*rows, prompts=list("abcabc")), Reward("right", value))
    assert found["accuracy"] == share_interval([[1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]])


def test_a_prompt_whose_completions_abstain_is_no_prompt():
    some = Reward("some", lambda completions: [None if text == "2" else float(text) for text in completions])
    found = figures(groups_of("11", "20", "22", "01"), some)
    assert found["reward"] == share_interval([[1, 1], [0], [0, 1]])


def test_lengths_stay_within_the_limit_and_are_never_certain():
    found = figures(groups_of("11", "00"), Reward("right", value))["tokens"]
    assert 1 <= found.low < 2 < found.high <= 10


def evaluation(*shares, prompts="abcd"):
    return Evaluation({}, {"accuracy": [bool(int(r)) for row in shares for r in row]}, len(shares[0]), list(prompts))


def test_pass_at_k_and_the_paired_difference_go_by_prompt():
    one, two = evaluation("1100", "1111", "0000", "1000"), evaluation("0000", "1111", "0000", "0000")
    passed = one.pass_estimates()
    assert list(passed) == [1, 2, 4]
    assert passed[1].value == pytest.approx((2 + 4 + 0 + 1) / 16)
    assert passed[4] == share_interval([[1], [1], [0], [1]])
    difference = one.accuracy_above(two)
    assert difference.value == pytest.approx(3 / 16)
    assert -1 <= difference.low < 3 / 16 < difference.high <= 1
    assert difference.count == 4
    same = two.accuracy_above(two)
    assert same.low < -0.3
    assert Evaluation({}, {}, 2, []).accuracy_above(Evaluation({}, {}, 2, [])) is None
