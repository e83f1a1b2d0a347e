"""Losses on preference pairs: DPO, and Bradley-Terry, of which a reward model is made."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.algorithms.preferences import bradley_terry_loss, dpo_loss


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x: float) -> float:
    """From the side on which exp does not overflow."""
    return 1 / (1 + math.exp(-x)) if x > -700 else math.exp(x)


@pytest.mark.parametrize(
    ("chosen", "rejected", "beta", "smoothing", "expected"),
    [
        (1.0, 1.0, 0.1, 0.0, math.log(2)),  # no margin: the odds are even
        (math.log(3), 0.0, 1.0, 0.0, math.log(4 / 3)),  # sigmoid(log 3) = 3/4
        (0.0, math.log(3), 1.0, 0.0, math.log(4)),  # the pair the wrong way round: 1/4
        (math.log(9), 0.0, 0.5, 0.0, math.log(4 / 3)),  # half of log 9 is log 3
        (math.log(3), 0.0, 1.0, 0.25, 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
        (0.0, math.log(3), 1.0, 0.25, 0.75 * math.log(4) + 0.25 * math.log(4 / 3)),
    ],
)
def test_dpo_by_hand(chosen, rejected, beta, smoothing, expected):
    got = dpo_loss(tensor(chosen), tensor(rejected), beta=beta, label_smoothing=smoothing)
    assert got.item() == pytest.approx(expected, rel=1e-14)


def test_dpo_from_four_log_probabilities_by_hand():
    """Chosen: 1/2 under the policy, 1/4 under the reference; rejected: 1/8 and 1/4. Ratios 2 and 1/2, margin log 4.

    With beta 1 the probability of the preference is 4/5.
    """
    policy, reference = tensor(1 / 2, 1 / 8).log(), tensor(1 / 4, 1 / 4).log()
    chosen, rejected = (policy - reference).split(1)
    assert dpo_loss(chosen, rejected, beta=1.0).item() == pytest.approx(math.log(5 / 4), rel=1e-14)


pairs = {
    "chosen": st.floats(-20, 20),
    "rejected": st.floats(-20, 20),
    "beta": st.floats(0.01, 2),
    "smoothing": st.floats(0, 0.49),
}


@given(**pairs)
@settings(max_examples=100, deadline=None)
def test_the_gradient_of_dpo_is_its_closed_form(chosen, rejected, beta, smoothing):
    """By the chosen log-ratio: beta * (sigmoid(margin) - (1 - smoothing)); by the rejected one the opposite.

    Unsmoothed that is -beta * sigmoid(-margin): a pair weighs as much as the implicit reward has it wrong.
    """
    ends = [tensor(x).requires_grad_() for x in (chosen, rejected)]
    loss = dpo_loss(*ends, beta=beta, label_smoothing=smoothing)
    got = [slope.item() for slope in torch.autograd.grad(loss.sum(), ends)]
    slope = beta * (sigmoid(beta * (chosen - rejected)) - (1 - smoothing))
    assert got == pytest.approx([slope, -slope], rel=1e-9, abs=1e-12)


@given(chosen=pairs["chosen"], rejected=pairs["rejected"], smoothing=pairs["smoothing"])
@settings(max_examples=50, deadline=None)
def test_smoothing_is_the_expectation_over_uncertain_labels(chosen, rejected, smoothing):
    """The share `smoothing` of pairs the wrong way round, and the rest the right way."""
    one, other = tensor(chosen), tensor(rejected)
    right, wrong = dpo_loss(one, other, beta=0.7), dpo_loss(other, one, beta=0.7)
    got = dpo_loss(one, other, beta=0.7, label_smoothing=smoothing)
    assert got.item() == pytest.approx((1 - smoothing) * right.item() + smoothing * wrong.item(), rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_with_smoothing_the_best_margin_is_finite(smoothing):
    """Where sigmoid(margin) is the share of right labels the gradient is zero; beyond it the loss rises again."""
    best = math.log((1 - smoothing) / smoothing) / 0.5
    chosen = tensor(best - 1, best, best + 1).requires_grad_()
    loss = dpo_loss(chosen, torch.zeros_like(chosen), beta=0.5, label_smoothing=smoothing)
    slopes = torch.autograd.grad(loss.sum(), chosen)[0].tolist()
    assert slopes[0] < -1e-3
    assert slopes[1] == pytest.approx(0, abs=1e-15)
    assert slopes[2] > 1e-3
    assert loss[1] < min(loss[0], loss[2])


def test_the_default_has_no_smoothing():
    one, other = tensor(0.3, -2.0), tensor(1.0, -5.0)
    assert torch.equal(dpo_loss(one, other, beta=0.2), dpo_loss(one, other, beta=0.2, label_smoothing=0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_at_extreme_margins_the_loss_is_linear_and_not_nan(margin, smoothing, dtype):
    """Though the sigmoid underflows: the loss is the margin that is wrong, and its slope is full or none."""
    chosen, rejected = (torch.tensor([x], dtype=dtype, requires_grad=True) for x in (margin / 2, -margin / 2))
    loss = dpo_loss(chosen, rejected, beta=1.0, label_smoothing=smoothing)
    weight = smoothing if margin > 0 else 1 - smoothing
    assert loss.item() == pytest.approx(weight * 1e4, rel=1e-6, abs=1e-12)
    slopes = [x.item() for x in torch.autograd.grad(loss.sum(), [chosen, rejected])]
    assert slopes == pytest.approx([math.copysign(weight, margin), -math.copysign(weight, margin)], rel=1e-6, abs=1e-12)


def test_pairs_do_not_look_at_one_another():
    chosen, rejected = tensor(1.0, -3.0, 1e4), tensor(0.5, 2.0, -1e4)
    together = dpo_loss(chosen, rejected, beta=0.3)
    alone = [dpo_loss(chosen[n : n + 1], rejected[n : n + 1], beta=0.3).item() for n in range(3)]
    assert together.tolist() == alone


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (5.0, 5.0, math.log(2)),
        (math.log(4), 0.0, math.log(5 / 4)),
        (-1.0, math.log(4) - 1, math.log(5)),
        (2.0, 0.0, 0.126928011042972),  # log(1 + e^-2)
    ],
)
def test_bradley_terry_by_hand(chosen, rejected, expected):
    assert bradley_terry_loss(tensor(chosen), tensor(rejected)).item() == pytest.approx(expected, rel=1e-13)


@given(chosen=pairs["chosen"], rejected=pairs["rejected"])
@settings(max_examples=60, deadline=None)
def test_bradley_terry_s_gradient_is_the_other_answer_s_chance(chosen, rejected):
    ends = [tensor(x).requires_grad_() for x in (chosen, rejected)]
    got = [slope.item() for slope in torch.autograd.grad(bradley_terry_loss(*ends).sum(), ends)]
    wrong = sigmoid(rejected - chosen)
    assert got == pytest.approx([-wrong, wrong], rel=1e-9)


@given(chosen=pairs["chosen"], rejected=pairs["rejected"], constant=st.integers(-1000, 1000))
@settings(max_examples=60, deadline=None)
def test_only_the_difference_of_two_scores_matters(chosen, rejected, constant):
    one, other = tensor(chosen), tensor(rejected)
    moved = bradley_terry_loss(one + constant, other + constant)
    assert moved.item() == pytest.approx(bradley_terry_loss(one, other).item(), rel=1e-9, abs=1e-12)


@given(chosen=pairs["chosen"], rejected=pairs["rejected"])
@settings(max_examples=60, deadline=None)
def test_the_two_answers_chances_sum_to_one(chosen, rejected):
    one, other = tensor(chosen), tensor(rejected)
    chances = [math.exp(-bradley_terry_loss(*pair).item()) for pair in ((one, other), (other, one))]
    assert sum(chances) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bradley_terry_is_linear_at_extreme_margins(dtype):
    chosen = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.zeros(2, dtype=dtype))
    assert loss.tolist() == [0.0, 1e4]
    assert torch.autograd.grad(loss.sum(), chosen)[0].tolist() == [0.0, -1.0]


def test_scores_trained_on_pairs_find_the_odds_of_preference():
    """One answer is preferred 3 times in 4, so that the scores end log 3 apart: the maximum of the likelihood."""
    scores = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    winner, loser = torch.tensor([0, 0, 0, 1]), torch.tensor([1, 1, 1, 0])
    for _ in range(60):
        slope = torch.autograd.grad(bradley_terry_loss(scores[winner], scores[loser]).mean(), scores)[0]
        scores = (scores - 2 * slope).detach().requires_grad_()
    assert (scores[0] - scores[1]).item() == pytest.approx(math.log(3), abs=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_bradley_terry_on_the_scaled_log_ratio(smoothing):
    """Its implicit reward is beta * log(pi_theta / pi_ref); smoothed, it is the mean over both labels."""
    chosen, rejected = tensor(0.4, -3.0, 2.0), tensor(1.0, -1.5, -9.0)
    scores = 0.3 * chosen, 0.3 * rejected
    mixed = (1 - smoothing) * bradley_terry_loss(*scores) + smoothing * bradley_terry_loss(*scores[::-1])
    got = dpo_loss(chosen, rejected, beta=0.3, label_smoothing=smoothing)
    torch.testing.assert_close(got, mixed, rtol=1e-13, atol=0)
