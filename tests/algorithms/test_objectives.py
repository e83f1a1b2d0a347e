"""The clipped policy objective: min(ratio A, clip(ratio, 1 - low, 1 + high) A), as a loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.algorithms.clip import clipped_at, clipped_loss
from coterie.algorithms.ratios import RATIOS

LOW, HIGH = 0.2, 0.3


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "acts"),
    [
        # A > 0: only the upper bound acts.
        (0.5, 2.0, -1.0, ""),  # below the range, not clipped: min(1, 1.6)
        (1.0, 2.0, -2.0, ""),
        (1.2, 2.0, -2.4, ""),
        (1.5, 2.0, -2.6, "high"),  # min(3, 1.3 * 2)
        # A < 0: only the lower bound acts.
        (0.5, -2.0, 1.6, "low"),  # min(-1, 0.8 * -2)
        (0.9, -2.0, 1.8, ""),
        (1.0, -2.0, 2.0, ""),
        (1.5, -2.0, 3.0, ""),  # above the range, not clipped: min(-3, -2.6)
        # A = 0: nothing.
        (0.5, 0.0, 0.0, ""),
        (1.0, 0.0, 0.0, ""),
        (1.5, 0.0, 0.0, ""),
    ],
)
def test_every_sign_and_region_by_hand(ratio, advantage, loss, acts):
    ratio = tensor(ratio).requires_grad_()
    got = clipped_loss(ratio, tensor(advantage), low=LOW, high=HIGH)
    assert got.item() == pytest.approx(loss, abs=1e-12)
    got.sum().backward()
    assert ratio.grad.item() == (0 if acts else -advantage)
    low, high = clipped_at(ratio, tensor(advantage), low=LOW, high=HIGH)
    assert (low.item(), high.item()) == (acts == "low", acts == "high")


def test_equal_bounds_are_ppo_s_clip():
    ratio, advantages = torch.meshgrid(torch.linspace(0.1, 3, 59), torch.tensor([-2.0, -0.5, 0.0, 1.0]), indexing="ij")
    ppo = -torch.min(ratio * advantages, ratio.clip(0.8, 1.2) * advantages)
    torch.testing.assert_close(clipped_loss(ratio, advantages, low=0.2, high=0.2), ppo)


def test_a_higher_upper_bound_moves_only_what_is_clipped_above():
    """A decoupled upper bound (DAPO) leaves negative advantages, and ratios inside, as they were."""
    ratio, advantages = tensor(0.5, 1.1, 1.5, 0.5, 1.1, 1.5), tensor(1, 1, 1, -1, -1, -1)
    one, two = (clipped_loss(ratio, advantages, low=0.2, high=high) for high in (0.2, 0.28))
    assert (one != two).tolist() == [False, False, True, False, False, False]
    assert two[2].item() == pytest.approx(-1.28)


def test_bounds_may_differ_by_token():
    """What a bound that depends on the token's own probability is built on."""
    ratio, advantages = tensor(1.5, 1.5, 0.5, 0.5), tensor(1, 1, -1, -1)
    low, high = tensor(0.1, 0.1, 0.1, 0.4), tensor(0.1, 0.6, 0.1, 0.1)
    loss = clipped_loss(ratio, advantages, low=low, high=high)
    assert loss.tolist() == pytest.approx([-1.1, -1.5, 0.9, 0.6])
    below, above = clipped_at(ratio, advantages, low=low, high=high)
    assert below.tolist() == [False, False, True, True]
    assert above.tolist() == [True, False, False, False]


def test_a_bound_per_token_of_equal_numbers_is_the_number():
    ratio, advantages = torch.linspace(0.3, 2, 40, dtype=torch.float64), tensor(*[-1, 1] * 20)
    per_token = clipped_loss(ratio, advantages, low=torch.full((40,), 0.2), high=torch.full((40,), 0.3))
    torch.testing.assert_close(per_token, clipped_loss(ratio, advantages, low=0.2, high=0.3), atol=1e-7, rtol=0)


ratios_and_bounds = {
    "ratio": st.lists(st.floats(0.01, 5), min_size=1, max_size=8),
    "advantage": st.floats(-3, 3).map(
        lambda a: a if abs(a) > 1e-6 else 0.0
    ),  # halves of subnormal numbers are not exact
    "low": st.floats(0.01, 1),
    "high": st.floats(0.01, 3),
}


@given(**ratios_and_bounds)
@settings(max_examples=100, deadline=None)
def test_the_loss_is_the_formula_and_a_pessimistic_bound(ratio, advantage, low, high):
    got = clipped_loss(tensor(*ratio), torch.full((len(ratio),), advantage).double(), low=low, high=high).tolist()
    advantage = float(torch.tensor(advantage))
    for value, loss in zip(ratio, got, strict=True):
        clipped = max(1 - low, min(1 + high, value))
        assert loss == pytest.approx(-min(value * advantage, clipped * advantage), abs=1e-12)
        assert loss >= -value * advantage - 1e-12


@given(**ratios_and_bounds, dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=150, deadline=None)
def test_the_gradient_is_zero_exactly_where_a_bound_acts(ratio, advantage, low, high, dtype):
    """What is counted as clipped is what does not learn; the rest learns in full."""
    inside = [v for v in ratio if min(abs(v - 1 + low), abs(v - 1 - high)) > 1e-6]  # a bound is rounded to the type
    values = torch.tensor(inside, dtype=dtype, requires_grad=True)
    advantages = torch.full_like(values, advantage).detach()
    clipped_loss(values, advantages, low=low, high=high).sum().backward()
    below, above = clipped_at(values, advantages, low=low, high=high)
    assert not (below & above).any()
    assert torch.equal(values.grad, torch.where(below | above, 0.0, -advantages))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_at_the_bound_learns_and_one_just_outside_not(advantage, dtype):
    """With the bounds 0.75 and 1.5, which no type rounds."""
    bounds = torch.tensor([0.75, 1.5], dtype=dtype)
    outside = bounds.nextafter(torch.tensor([0.0, 9.0], dtype=dtype))
    values = torch.cat([bounds, outside]).requires_grad_()
    advantages = torch.full_like(values, advantage).detach()
    clipped_loss(values, advantages, low=0.25, high=0.5).sum().backward()
    below, above = clipped_at(values, advantages, low=0.25, high=0.5)
    assert below.tolist() == [False, False, advantage < 0, False]
    assert above.tolist() == [False, False, False, advantage > 0]
    assert torch.equal(values.grad, torch.where(below | above, 0.0, -advantages))


@given(**ratios_and_bounds)
@settings(max_examples=50, deadline=None)
def test_the_gradient_is_the_finite_difference(ratio, advantage, low, high):
    step = 1e-6
    values = [v for v in ratio if min(abs(v - 1 + low), abs(v - 1 - high)) > 1e-4]  # away from the kinks

    def loss(shift: float) -> torch.Tensor:
        return clipped_loss(tensor(*values) + shift, tensor(*[advantage] * len(values)), low=low, high=high)

    at = tensor(*values).requires_grad_()
    clipped_loss(at, tensor(*[advantage] * len(values)), low=low, high=high).sum().backward()
    torch.testing.assert_close(at.grad, (loss(step) - loss(-step)) / (2 * step), atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", ["token", "sequence"])
def test_a_clipped_token_whose_ratio_overflows_has_no_gradient(name):
    """exp(100) is infinite in float32; with A > 0 the upper bound acts, so the loss is -1.3 A and the gradient 0."""
    log_ratio = torch.full((1,), 100.0, requires_grad=True)
    ratio = RATIOS[name](log_ratio, torch.tensor([0]), 1)
    loss = clipped_loss(ratio, torch.tensor([2.0]), low=LOW, high=HIGH)
    assert loss.item() == pytest.approx(-2.6)
    loss.backward()
    assert log_ratio.grad.item() == 0


def test_no_advantage_is_no_loss_though_the_ratio_overflows():
    loss = clipped_loss(torch.tensor([torch.inf]), torch.tensor([0.0]), low=LOW, high=HIGH)
    assert loss.item() == 0
