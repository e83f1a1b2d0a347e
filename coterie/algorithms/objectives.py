"""The objectives beside the clipped one, and the table of all by name: one loss per token, to be aggregated elsewhere.

Legend: N completion tokens of a stream, B rows. As in `clip.py`, a formula is a function of tensors, and below it stands the objective.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.algorithms.clip import (
    Clipped,
    Objective,
    TokenTerms,
    clip,
    clipped_at,
    clipped_loss,
    ratio_clipped,
    unless_zero,
)
from coterie.algorithms.ratios import capped_exp, row_mean, row_sum


def dual_clipped_loss(
    ratio: Tensor, advantages: Tensor, *, low: float | Tensor, high: float | Tensor, ceiling: float
) -> Tensor:
    """`clipped_loss`, bounded where A < 0 as well: there the loss is at most -ceiling * A. [N], [N] -> [N].

    Without it a token that became far likelier although it was bad has a loss without limit.
    Source: arXiv 1912.09729, equation 5; there the ceiling is 3.
    """
    loss = clipped_loss(ratio, advantages, low=low, high=high)
    return torch.where(advantages < 0, torch.minimum(loss, -ceiling * advantages), loss)


def dual_clip(
    terms: TokenTerms, *, ratio: str, clip_low: float, clip_high: float, clip_bounds: str, clip_ceiling: float
) -> Tensor:
    """The same, bounded at `clip_ceiling` where A < 0."""
    low, high = terms.bounds(clip_bounds, clip_low, clip_high)
    return dual_clipped_loss(terms.ratio(ratio), terms.advantages, low=low, high=high, ceiling=clip_ceiling)


def cispo_loss(
    policy_logprobs: Tensor, ratio: Tensor, advantages: Tensor, *, low: float | Tensor, high: float | Tensor
) -> Tensor:
    """-stop_gradient(clip(ratio, 1 - low, 1 + high)) * A * log pi_theta: [N] each -> [N].

    The weight is clipped and not the token, so that every token keeps a gradient.
    Source: MiniMax-M1, arXiv 2506.13585, equation 4.
    """
    low, high = (torch.as_tensor(bound, dtype=ratio.dtype, device=ratio.device) for bound in (low, high))
    weight = torch.clamp(ratio.detach(), 1 - low, 1 + high)
    return unless_zero(advantages, -weight * advantages * policy_logprobs)


def cispo(terms: TokenTerms, *, ratio: str, clip_low: float, clip_high: float) -> Tensor:
    """Every token's log-probability, weighted by a ratio whose own gradient is stopped."""
    return cispo_loss(terms.policy_logprobs, terms.ratio(ratio), terms.advantages, low=clip_low, high=clip_high)


def sapo_loss(ratio: Tensor, advantages: Tensor, *, positive: float, negative: float) -> Tensor:
    """-(4 / tau) * sigmoid(tau * (ratio - 1)) * A, tau being `positive` where A > 0 and `negative` elsewhere: [N] -> [N].

    A soft gate in place of the clip: its slope in the ratio is A at 1 and falls off on both sides.
    Source: SAPO, arXiv 2511.20347, section 3.
    """
    tau = torch.where(advantages > 0, ratio.new_tensor(positive), ratio.new_tensor(negative))
    return unless_zero(advantages, -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * advantages)


def sapo(terms: TokenTerms, *, ratio: str, gate_positive: float, gate_negative: float) -> Tensor:
    """The soft gate, one slope for each sign of the advantage."""
    return sapo_loss(terms.ratio(ratio), terms.advantages, positive=gate_positive, negative=gate_negative)


def gmpo_loss(
    log_ratio: Tensor, advantages: Tensor, row: Tensor, num_rows: int, *, low: float | Tensor, high: float | Tensor
) -> Tensor:
    """-A * the geometric mean over the completion of its clipped token ratios, for each of its tokens: [N] -> [N].

    log_ratio [N] is clipped per token and only where that makes the objective smaller: from above at `high` where A > 0,
    from below at -`low` where A < 0. The bounds are on the logarithm. Source: GMPO, arXiv 2507.20673, equation 4.
    """
    low, high = (torch.as_tensor(bound, dtype=log_ratio.dtype, device=log_ratio.device) for bound in (low, high))
    clipped = torch.where(advantages > 0, torch.minimum(log_ratio, high), torch.maximum(log_ratio, -low))
    return unless_zero(advantages, -capped_exp(row_mean(clipped, row, num_rows))[row] * advantages)


def gmpo(terms: TokenTerms, *, clip_low: float, clip_high: float) -> Tensor:
    """The geometric mean; its ratio is per token by definition."""
    return gmpo_loss(terms.log_ratio, terms.advantages, terms.row, terms.num_rows, low=clip_low, high=clip_high)


def policy_gradient_loss(ratio: Tensor, advantages: Tensor) -> Tensor:
    """-ratio * A, nothing clipped: [N], [N] -> [N]. On the policy its gradient is that of -A * log pi_theta (REINFORCE)."""
    return unless_zero(advantages, -ratio * advantages)


def policy_gradient(terms: TokenTerms, *, ratio: str) -> Tensor:
    """REINFORCE with a kind of ratio."""
    return policy_gradient_loss(terms.ratio(ratio), terms.advantages)


def anchor_logprobs(policy_logprobs: Tensor, reference_logprobs: Tensor, *, alpha: float) -> Tensor:
    """log of pi_bar = alpha * pi_theta + (1 - alpha) * pi_ref, made on the fly: [N], [N] -> [N].

    Raises ValueError for alpha outside [0, 1): at 1 the anchor is the policy itself, and nothing would be learned.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha is {alpha}; 0 <= alpha < 1 is needed: at 1 the gradient is zero everywhere")
    from_reference = reference_logprobs + torch.log1p(torch.tensor(-alpha, dtype=torch.float64)).to(policy_logprobs)
    if alpha == 0:
        return from_reference
    from_policy = policy_logprobs + torch.tensor(alpha, dtype=torch.float64).log().to(policy_logprobs)
    return torch.logaddexp(from_policy, from_reference)


def anchored_loss(
    policy_logprobs: Tensor, reference_logprobs: Tensor, weights: Tensor, *, alpha: float, beta: float
) -> Tensor:
    """-weight * log sigmoid(beta * (log pi_theta - log pi_bar)): [N] each, or [B] each for whole sequences.

    The log-ratio can't exceed -log(alpha). With z the log-ratio, the gradient is
    -weight * beta * sigmoid(-beta * z) * (1 - alpha) * pi_ref / pi_bar times that of log pi_theta.
    """
    anchor = anchor_logprobs(policy_logprobs, reference_logprobs, alpha=alpha)
    return unless_zero(weights, -weights * F.logsigmoid(beta * (policy_logprobs - anchor)))


def anchored(
    terms: TokenTerms, *, anchor_alpha: float, anchor_beta: float, anchor_level: str, anchor_weight: str
) -> Tensor:
    """The anchored loss: per sequence as it was first written ("sequence") or per token, weighted by the raw reward or the advantage.

    A sequence's loss stands at each of its tokens, so that "sequence_mean" gives it back whole.
    """
    assert terms.reference_logprobs is not None
    weights = terms.rewards if anchor_weight == "reward" else terms.advantages
    policy, reference, row = terms.policy_logprobs, terms.reference_logprobs, terms.row
    if anchor_level == "token":
        return anchored_loss(policy, reference, weights, alpha=anchor_alpha, beta=anchor_beta)
    policy, reference = (row_sum(x, row, terms.num_rows) for x in (policy, reference))  # [B]
    weights = row_mean(weights, row, terms.num_rows)
    loss = anchored_loss(policy, reference, weights, alpha=anchor_alpha, beta=anchor_beta)
    return loss[row]


def weight_clipped(terms: TokenTerms, *, ratio: str, clip_low: float, clip_high: float) -> Clipped:
    """A bound holds the weight, whatever the advantage's sign."""
    weight = terms.ratio(ratio)
    return weight < 1 - clip_low, weight > 1 + clip_high


def log_ratio_clipped(terms: TokenTerms, *, clip_low: float, clip_high: float) -> Clipped:
    """The bounds hold the logarithm of each token's ratio."""
    return clipped_at(1 + terms.log_ratio, terms.advantages, low=clip_low, high=clip_high)


OBJECTIVES: dict[str, Objective] = {
    "clip": Objective(clip, ratio_clipped),
    "dual_clip": Objective(dual_clip, ratio_clipped),
    "cispo": Objective(cispo, weight_clipped),
    "sapo": Objective(sapo),
    "gmpo": Objective(gmpo, log_ratio_clipped),
    "policy_gradient": Objective(policy_gradient),
    "anchored": Objective(anchored),
}
