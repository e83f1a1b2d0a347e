"""What counts as signal, which advantages a recipe asks for, and what a step says of its divergence."""

import math

import pytest
import torch

from coterie.algorithms.advantages import group_advantages
from coterie.recipe import make_recipe
from coterie.recipe.settings import Advantage, Overlong
from coterie.rewards.base import Reward
from coterie.rollouts.pack import Row, make_stream
from coterie.training.dynamic_sampling import groups_with_signal
from coterie.training.formulas import make_advantages
from coterie.training.stages import with_overlong
from coterie.training.step_metrics import divergence_metrics
from coterie.types import Completion, Group, Prompt, Scored

EACH = Advantage(combine="each")


def scored(rewards, **parts):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    completion = Completion([1], torch.zeros(1), torch.zeros(1), "stop")
    groups = [Group(Prompt(i, "q", [1]), [completion] * rewards.shape[1]) for i in range(len(rewards))]
    return Scored(groups, rewards, {name: torch.tensor(part, dtype=torch.float64) for name, part in parts.items()}, [])


def test_a_part_of_a_completion_that_abstains_is_no_signal():
    """The third completion failed in another reward: what this one gave it tells nobody apart."""
    flat_beside_one_that_abstains = scored([[1.0, 1.0, math.nan]], right=[[1.0, 1.0, 0.0]])
    assert groups_with_signal(flat_beside_one_that_abstains, EACH).tolist() == [False]
    two_that_differ = scored([[1.0, 0.0, math.nan]], right=[[1.0, 0.0, 0.0]])
    assert groups_with_signal(two_that_differ, EACH).tolist() == [True]


def test_normalised_rewards_are_summed_with_their_weights():
    right, short = [[1.0, 0.0, 0.0, 1.0]], [[0.0, 3.0, 1.0, 2.0]]
    given = scored([[0.0, 1.0, 2.0, 3.0]], right=right, short=short)
    recipe = make_recipe({"model": "m", "task": {"data": "d"}, "rewards": ["m:f"], "preset": "gdpo"})
    functions = [Reward("right", None, weight=2.0), Reward("short", None, weight=-0.25)]
    found = make_advantages(recipe, functions)(given)
    of_right, of_short = (group_advantages(torch.tensor(part, dtype=torch.float64)) for part in (right, short))
    swapped = make_advantages(recipe, [Reward("right", None, weight=-0.25), Reward("short", None, weight=2.0)])(given)
    assert found[0].argsort().tolist() == (2 * of_right - 0.25 * of_short)[0].argsort().tolist()
    assert found[0, 0] > found[0, 3] > 0 > found[0, 2] > found[0, 1]
    assert swapped[0].argsort().tolist() == (2 * of_short - 0.25 * of_right)[0].argsort().tolist()


def test_the_watched_kl_is_the_policy_s_from_its_own_samples():
    """The sampler gave each token 1/e and the reference 1/e^2, or the other way round: e^d - 1 - d with d = -1, and with 1."""
    for sampler, reference, expected in ((-1.0, -2.0, math.exp(-1)), (-2.0, -1.0, math.e - 2)):
        stream = make_stream([([1], [Row([2, 3], torch.full((2,), sampler))])])
        tally = divergence_metrics([stream], [torch.full((2,), reference)])
        assert tally.values()["policy/kl"] == pytest.approx(expected)


def test_what_reached_the_length_limit_abstains_or_loses():
    ends = [("stop", 10), ("length", 20), ("stop", 19)]
    completions = [Completion([1] * n, torch.zeros(n), torch.zeros(n), ended) for ended, n in ends]
    given = Scored([Group(Prompt(0, "q", [1]), completions)], torch.ones(1, 3, dtype=torch.float64), {}, [])
    assert with_overlong(given, Overlong(), 20) is given
    left_out = with_overlong(given, Overlong(treatment="leave_out"), 20)
    assert left_out.rewards.isnan().tolist() == [[False, True, False]]
    punished = with_overlong(given, Overlong(treatment="punish", margin=0.2, penalty=2.0), 20)
    assert punished.rewards[0].tolist() == pytest.approx([1.0, -1.0, 1 - 2 * 3 / 4])
