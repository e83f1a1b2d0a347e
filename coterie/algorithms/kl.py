"""KL(policy || reference): exact, and estimated from the log-probabilities of sampled tokens.

Source: http://joschu.net/blog/kl-approx.html. Written with d = log pi_ref - log pi_theta.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from coterie.algorithms.ratios import MAX_LOG_RATIO, capped_exp


def k1(difference: Tensor) -> Tensor:
    """-d: unbiased, can be negative."""
    return -difference


def k2(difference: Tensor) -> Tensor:
    """d^2 / 2: biased, never negative."""
    return difference.square() / 2


def k3(difference: Tensor) -> Tensor:
    """exp(d) - 1 - d: unbiased, never negative, exactly 0 for equal policies."""
    return torch.expm1(difference.clamp(max=MAX_LOG_RATIO)) - difference


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def kl_penalty(
    policy_logprobs: Tensor,
    reference_logprobs: Tensor,
    *,
    estimator: str = "k3",
    old_logprobs: Tensor | None = None,
) -> Tensor:
    """KL(policy || reference) at each sampled token: log-probabilities [N] -> [N], in nats.

    Without `old_logprobs` the value is right and the gradient is not: differentiating an estimate leaves out that the
    policy also chooses the token. With them, log pi_old of each token, it is weighted by pi_theta / pi_old, so that the expected
    gradient is that of the KL at each state, on the policy and off it. k2's own gradient is right already, so its weight has none.
    """
    difference = reference_logprobs - policy_logprobs
    penalty = ESTIMATORS[estimator](difference)
    if old_logprobs is None:
        return penalty
    weight = capped_exp(policy_logprobs - old_logprobs)
    if estimator == "k2":
        return weight.detach() * penalty
    if estimator == "k1":
        return weight * penalty
    # where d is large, exp(d) overflows beside a weight that vanishes: their product is taken in one exponential
    together = capped_exp(reference_logprobs - old_logprobs) - weight * (1 + difference)
    return torch.where(difference > 20, together, weight * k3(difference.clamp(max=20)))


def exact_kl(policy_logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(policy || reference) at each token, summed over the vocabulary: logits [N, V] each -> [N], in nats.

    Its gradient is that of the KL at each state. A token that neither can sample (-inf in both) adds nothing.
    """
    policy, reference = policy_logits.log_softmax(-1), reference_logits.log_softmax(-1)
    possible = policy > -torch.inf
    difference = torch.where(possible, policy, 0.0) - torch.where(possible, reference, 0.0)
    return (torch.where(possible, policy.exp(), 0.0) * difference).sum(-1)
