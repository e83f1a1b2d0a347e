"""Estimates of KL(policy || reference) from the log-probabilities of sampled tokens.

Source: http://joschu.net/blog/kl-approx.html. Written with d = log pi_ref - log pi_theta.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def k1(difference: Tensor) -> Tensor:
    """-d: unbiased, can be negative."""
    return -difference


def k2(difference: Tensor) -> Tensor:
    """d^2 / 2: biased, never negative."""
    return difference.square() / 2


def k3(difference: Tensor) -> Tensor:
    """exp(d) - 1 - d: unbiased, never negative, exactly 0 for equal policies."""
    return torch.expm1(difference) - difference


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def kl_penalty(
    policy_logprobs: Tensor,
    reference_logprobs: Tensor,
    *,
    estimator: str = "k3",
    sampler_logprobs: Tensor | None = None,
) -> Tensor:
    """KL(policy || reference) at each sampled token: log-probabilities [N] -> [N], in nats.

    Without `sampler_logprobs` the value is right and the gradient is not: differentiating an estimate leaves out that the
    policy also chooses the token. With them, each is weighted by pi_theta / pi_old, so that the expected gradient is that of
    the KL at each state, on the policy and off it. k2's own gradient is right on the policy, so its weight has none.
    """
    penalty = ESTIMATORS[estimator](reference_logprobs - policy_logprobs)
    if sampler_logprobs is None:
        return penalty
    weight = (policy_logprobs - sampler_logprobs).exp()
    return (weight.detach() if estimator == "k2" else weight) * penalty
