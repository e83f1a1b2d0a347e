"""What 95 % intervals hold: simulated evaluations, whose truth is known. docs/evaluation.md has the figures."""

import math

import pytest
import torch

from coterie.evals.statistics import difference_interval, mean_interval, pass_at_k, share_interval

NUM_RUNS = 2000
BETWEEN = (0.0, 0.1, 0.3, 0.7)  # the correlation of two samples of a prompt


def chances(mean, correlation, shape, generator):
    """What share of a prompt's samples is right in the long run: Beta with that mean, and 1 / (a + b + 1) = correlation."""
    if correlation == 0:
        return torch.full(shape, mean)
    a, b = (share * (1 - correlation) / correlation for share in (mean, 1 - mean))
    one, two = (torch._standard_gamma(torch.full(shape, value), generator=generator) for value in (a, b))
    return one / (one + two).clamp_min(1e-30)


def samples(mean, correlation, num_prompts, num_samples, seed=1):
    """[runs, P, n], 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    right = chances(mean, correlation, (NUM_RUNS, num_prompts, 1), generator)
    return (torch.rand(NUM_RUNS, num_prompts, num_samples, generator=generator) < right).double()


def held(estimates, truth):
    return sum(e.low <= truth + 1e-12 and truth - 1e-12 <= e.high for e in estimates) / NUM_RUNS


def grid(prompts, num_samples, means):
    return [
        pytest.param(p, n, mean, between, id=f"{p} prompts, {n} samples, mean {mean}, correlation {between}")
        for p in prompts
        for n in num_samples
        for mean in means
        for between in (BETWEEN if n > 1 else (0.0,))
    ]


@pytest.mark.parametrize(("num_prompts", "num_samples", "mean", "between"), grid((10, 20), (1, 2, 8), (0.3, 0.5)))
def test_accuracy_intervals_hold_however_alike_the_samples_are(num_prompts, num_samples, mean, between):
    """A count is discrete: of one sample of 10 prompts no interval holds exactly 95 of 100, and Wilson's holds 92 or 98."""
    drawn = samples(mean, between, num_prompts, num_samples)
    least, most = (0.93, 0.975) if num_samples > 1 else (0.91, 0.985)
    assert least <= held(map(share_interval, drawn.tolist()), mean) <= most


@pytest.mark.slow
@pytest.mark.parametrize(("num_prompts", "num_samples", "mean", "between"), grid((30, 100), (2, 8), (0.3, 0.5, 0.8)))
def test_with_more_prompts_accuracy_intervals_hold_as_is_said(num_prompts, num_samples, mean, between):
    drawn = samples(mean, between, num_prompts, num_samples)
    assert 0.93 <= held(map(share_interval, drawn.tolist()), mean) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("num_prompts", "num_samples", "mean", "between"), grid((10, 20, 30), (2, 8), (0.05, 0.9)))
def test_a_rare_outcome_is_not_missed_for_its_few_prompts(num_prompts, num_samples, mean, between):
    """Where it is in one prompt or none its variance can't be seen: these intervals are too wide before they are too narrow."""
    drawn = samples(mean, between, num_prompts, num_samples)
    assert held(map(share_interval, drawn.tolist()), mean) >= 0.93


@pytest.mark.parametrize(("num_prompts", "between"), [(10, 0.1), (20, 0.3), (30, 0.7)])
def test_pass_at_k_is_held(num_prompts, between):
    n, k, mean = 8, 4, 0.3
    right = samples(mean, between, num_prompts, n).sum(-1).int().tolist()
    a, b = (share * (1 - between) / between for share in (mean, 1 - mean))
    truth = 1 - math.prod((b + i) / (a + b + i) for i in range(k))  # the mean of (1 - p)^k
    found = [share_interval([[pass_at_k(number, n, k)] for number in run]) for run in right]
    assert 0.93 <= held(found, truth) <= 0.98


@pytest.mark.parametrize("num_prompts", [10, 20, 30])
@pytest.mark.parametrize("num_samples", [1, 2, 8])
def test_a_paired_difference_is_held(num_prompts, num_samples):
    """Two models that are right together more often than not, one by 0.1."""
    generator = torch.Generator().manual_seed(2)
    shape = (NUM_RUNS, num_prompts, 1)
    shared = chances(0.5, 0.4, shape, generator)
    one, two = shared * 0.9 + 0.1, shared * 0.8 + 0.05  # 0.55 and 0.45 in the mean
    drawn = [torch.rand(NUM_RUNS, num_prompts, num_samples, generator=generator) < share for share in (one, two)]
    differences = (drawn[0].double().mean(-1) - drawn[1].double().mean(-1)).unsqueeze(-1)
    assert 0.935 <= held(map(difference_interval, differences.tolist()), 0.1) <= 0.97


@pytest.mark.parametrize("num_prompts", [10, 20, 30])
@pytest.mark.parametrize("num_samples", [2, 8])
@pytest.mark.parametrize("between", [0.2, 1.0, 3.0])
def test_a_reward_without_bounds_is_held(num_prompts, num_samples, between):
    generator = torch.Generator().manual_seed(3)
    of_prompts = 2 + between * torch.randn(NUM_RUNS, num_prompts, 1, generator=generator)
    drawn = of_prompts + torch.randn(NUM_RUNS, num_prompts, num_samples, generator=generator)
    assert 0.935 <= held(map(mean_interval, drawn.tolist()), 2) <= 0.965
