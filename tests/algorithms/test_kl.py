"""KL to the reference: the three estimates, and their gradient against the exact sum over the vocabulary."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.algorithms.kl import ESTIMATORS, k3, kl_penalty

VOCABULARY = 5


def logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_kl(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The sum over the vocabulary that one account writes down: log-probabilities [..., V] -> [...]."""
    return (policy.exp() * (policy - reference)).sum(-1)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    # Probabilities 1/2 and 1/8: d = log(1/8) - log(1/2) = -log 4.
    [("k1", math.log(4)), ("k2", math.log(4) ** 2 / 2), ("k3", 1 / 4 - 1 + math.log(4))],
)
def test_values_by_hand(estimator, expected):
    policy, reference = torch.tensor([0.5]).double().log(), torch.tensor([0.125]).double().log()
    assert kl_penalty(policy, reference, estimator=estimator).item() == pytest.approx(expected, rel=1e-12)


def test_k1_may_be_negative_and_the_others_not():
    """Probabilities 1/8 and 1/2: d = log 4."""
    policy, reference = torch.tensor([0.125]).double().log(), torch.tensor([0.5]).double().log()
    values = [kl_penalty(policy, reference, estimator=name).item() for name in ("k1", "k2", "k3")]
    assert values == pytest.approx([-math.log(4), math.log(4) ** 2 / 2, 4 - 1 - math.log(4)], rel=1e-12)


def test_default_is_k3():
    policy, reference = torch.tensor([-1.0]), torch.tensor([-2.0])
    assert torch.equal(kl_penalty(policy, reference), kl_penalty(policy, reference, estimator="k3"))


@given(values=st.lists(st.floats(-40, 0, width=32), min_size=1, max_size=8), name=st.sampled_from(sorted(ESTIMATORS)))
@settings(max_examples=80, deadline=None)
def test_equal_policies_have_a_penalty_of_exactly_zero(values, name):
    logprobs = torch.tensor(values, dtype=torch.float32)
    sampler = logprobs - 0.3
    assert (kl_penalty(logprobs, logprobs, estimator=name) == 0).all()
    assert (kl_penalty(logprobs, logprobs, estimator=name, old_logprobs=sampler) == 0).all()


def test_k3_keeps_its_digits_for_nearly_equal_policies():
    """exp(d) - 1 - d is d^2 / 2 + d^3 / 6; in float32 the plain formula would lose all of it at d = 1e-4."""
    for d in (1e-4, -1e-4, 1e-3, -1e-3):
        assert k3(torch.tensor([d], dtype=torch.float32)).item() == pytest.approx(d * d / 2 + d**3 / 6, rel=5e-3)


def test_k2_and_k3_are_never_negative():
    differences = torch.cat([torch.linspace(-30, 30, 10001), torch.logspace(-12, 0, 10001)])
    for name in ("k2", "k3"):
        assert (ESTIMATORS[name](differences) >= 0).all()
        assert (ESTIMATORS[name](-differences) >= 0).all()


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_and_k2_is_not(name):
    policy, reference = logits(1, VOCABULARY).log_softmax(0), logits(2, VOCABULARY).log_softmax(0)
    exact = exact_kl(policy, reference).item()
    assert (policy.exp() * kl_penalty(policy, reference, estimator=name)).sum().item() == pytest.approx(
        exact, abs=1e-12
    )
    assert abs((policy.exp() * kl_penalty(policy, reference, estimator="k2")).sum().item() - exact) > 1e-3


def gradients(name: str, seed: int, *, on_policy: bool, corrected: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The expected gradient of the estimate under the sampler, enumerated, and that of the exact KL."""
    parameters = logits(seed, VOCABULARY).requires_grad_()
    policy = parameters.log_softmax(0)
    reference = logits(seed + 100, VOCABULARY).log_softmax(0)
    sampler = policy.detach() if on_policy else logits(seed + 200, VOCABULARY).log_softmax(0)
    penalty = kl_penalty(policy, reference, estimator=name, old_logprobs=sampler if corrected else None)
    expected = torch.autograd.grad((sampler.exp() * penalty).sum(), parameters, retain_graph=True)[0]
    return expected, torch.autograd.grad(exact_kl(policy, reference), parameters)[0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("name", ["k1", "k3"])
def test_the_corrected_gradient_is_that_of_the_exact_kl(name, on_policy, seed):
    expected, exact = gradients(name, seed, on_policy=on_policy, corrected=True)
    torch.testing.assert_close(expected, exact, atol=1e-9, rtol=0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("name", ["k1", "k3"])
def test_the_uncorrected_gradient_is_not(name, on_policy, seed):
    expected, exact = gradients(name, seed, on_policy=on_policy, corrected=False)
    assert (expected - exact).abs().max() > 1e-3


def test_the_uncorrected_k1_has_no_gradient_at_all_on_the_policy():
    """The expected gradient of log pi is zero: k1 as a plain loss holds nothing near anything."""
    expected, exact = gradients("k1", 0, on_policy=True, corrected=False)
    assert expected.abs().max() < 1e-12 < exact.abs().max()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("corrected", [True, False])
def test_k2_has_the_right_gradient_on_the_policy(corrected, seed):
    expected, exact = gradients("k2", seed, on_policy=True, corrected=corrected)
    torch.testing.assert_close(expected, exact, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_over_sequences_the_corrected_gradient_is_the_kl_s(name):
    """Two tokens, every sequence enumerated. The KL at a state weighs as much as the sampler visits it."""
    size = 3
    first, second = logits(7, size).requires_grad_(), logits(8, size, size).requires_grad_()
    policy_first, policy_second = first.log_softmax(0), second.log_softmax(1)
    reference_first, reference_second = logits(9, size).log_softmax(0), logits(10, size, size).log_softmax(1)
    sampler_first, sampler_second = logits(11, size).log_softmax(0), logits(12, size, size).log_softmax(1)
    estimated = torch.zeros(())
    for a, b in itertools.product(range(size), repeat=2):
        penalty = kl_penalty(
            torch.stack([policy_first[a], policy_second[a, b]]),
            torch.stack([reference_first[a], reference_second[a, b]]),
            estimator=name,
            old_logprobs=torch.stack([sampler_first[a], sampler_second[a, b]]),
        )
        estimated = estimated + (sampler_first[a] + sampler_second[a, b]).exp() * penalty.sum()
    exact = exact_kl(policy_first, reference_first)
    exact = exact + (sampler_first.exp() * exact_kl(policy_second, reference_second)).sum()
    for got, wanted in zip(
        torch.autograd.grad(estimated, [first, second], retain_graph=True),
        torch.autograd.grad(exact, [first, second]),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_on_the_policy_the_correction_does_not_change_the_value(name):
    policy, reference = logits(3, VOCABULARY).log_softmax(0), logits(4, VOCABULARY).log_softmax(0)
    plain = kl_penalty(policy, reference, estimator=name)
    assert torch.equal(kl_penalty(policy, reference, estimator=name, old_logprobs=policy), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [19.0, 21.0, 30.0, 45.0])
def test_corrected_k3_far_from_the_reference_keeps_its_gradient(distance, dtype):
    """pi_ref = pi_old = e^-1 and pi_theta far below: (pi_theta / pi_old) (e^d - 1 - d) is 1 less what vanishes."""
    policy = torch.tensor([-1.0 - distance], dtype=dtype, requires_grad=True)
    reference = torch.tensor([-1.0], dtype=dtype)
    (penalty,) = kl_penalty(policy, reference, estimator="k3", old_logprobs=reference)
    penalty.backward()
    weight = math.exp(-distance)
    assert penalty.item() == pytest.approx(1 - weight * (1 + distance), rel=1e-5)
    assert policy.grad.item() == pytest.approx(-weight * distance, rel=1e-4, abs=1e-7 if dtype == torch.float32 else 0)
