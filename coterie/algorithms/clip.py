"""The clipped objective, which most recipes learn from, and what every objective is given.

Legend: N completion tokens of a stream, B rows. A formula is a function of tensors; the function below it is the objective as a
recipe names it, which takes `TokenTerms` and, as keywords, the settings of its class in `coterie/recipe/objectives.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.algorithms.ratios import RATIOS


@dataclass(frozen=True)
class TokenTerms:
    """What an objective may look at, one entry per completion token.

    policy_logprobs [N]: log pi_theta, with gradient. old_logprobs [N]: log pi_old, the denominator of the ratio: the trainer's own
    before the first update, or the sampler's where they are taken as given. advantages [N], rewards [N]: each row's own, or per
    token where a value model gives them. row [N]: which of `num_rows` completions a token belongs to.
    reference_logprobs [N]: for the anchored objective, and wherever the loss has a KL to a reference; else None.
    """

    policy_logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    rewards: Tensor
    row: Tensor
    num_rows: int
    reference_logprobs: Tensor | None = None

    @property
    def log_ratio(self) -> Tensor:
        """log(pi_theta / pi_old) [N]."""
        return self.policy_logprobs - self.old_logprobs

    def ratio(self, kind: str) -> Tensor:
        """pi_theta / pi_old per token or per sequence, [N]: a name of `RATIOS`."""
        return RATIOS[kind](self.log_ratio, self.row, self.num_rows)

    def bounds(self, kind: str, low: float, high: float) -> tuple[float | Tensor, float | Tensor]:
        """The clip bounds: as given ("fixed"), or one per token that depends on pi_old ("dynamic")."""
        return (low, high) if kind == "fixed" else dynamic_bounds(self.old_logprobs, low=low, high=high)


def clipped_loss(ratio: Tensor, advantages: Tensor, *, low: float | Tensor, high: float | Tensor) -> Tensor:
    """The clipped policy objective as a loss: ratio [N], advantages [N] -> [N].

    -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A). The bounds are numbers, or one per token [N]. Which of them acts
    depends on the sign of A alone: the upper one where A > 0, the lower one where A < 0.
    Source: PPO, arXiv 1707.06347, equation 7; two bounds: DAPO, arXiv 2503.14476, equation 8.
    """
    low, high = (torch.as_tensor(bound, dtype=ratio.dtype, device=ratio.device) for bound in (low, high))
    clipped = torch.clamp(ratio, 1 - low, 1 + high)
    return unless_zero(advantages, -torch.minimum(ratio * advantages, clipped * advantages))


def dynamic_bounds(old_logprobs: Tensor, *, low: float, high: float, largest: float = 10.0) -> tuple[Tensor, Tensor]:
    """Clip bounds that give rare tokens more room: old_logprobs [N] -> (low [N], high [N]), for `clipped_loss`.

    With q = pi_old(token), the ratio r may move while |r - 1| * r * q stays within epsilon, so that
    1 - low = (1 + sqrt(max(1 - 4 low / q, 0))) / 2 and 1 + high = (1 + sqrt(1 + 4 high / q)) / 2, the latter at most
    `largest`. Source: DCPO, arXiv 2509.02333, section 3.1.
    """
    q = old_logprobs.detach().exp()
    lower = (1 + (1 - 4 * low / q).clamp(min=0).sqrt()) / 2
    upper = ((1 + (1 + 4 * high / q).sqrt()) / 2).clamp(max=largest)
    return 1 - lower, upper - 1


def clip(terms: TokenTerms, *, ratio: str, clip_low: float, clip_high: float, clip_bounds: str) -> Tensor:
    """The clipped loss with a kind of ratio and of bounds."""
    low, high = terms.bounds(clip_bounds, clip_low, clip_high)
    return clipped_loss(terms.ratio(ratio), terms.advantages, low=low, high=high)


Clipped = tuple[Tensor, Tensor]


def clipped_at(
    ratio: Tensor, advantages: Tensor, *, low: float | Tensor, high: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Where each bound acts, so that the token has no gradient: (lower [N], upper [N]), bool."""
    return (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)


def ratio_clipped(
    terms: TokenTerms, *, ratio: str, clip_low: float, clip_high: float, clip_bounds: str, **others: object
) -> Clipped:
    """The bounds hold the ratio, each for one sign of the advantage."""
    low, high = terms.bounds(clip_bounds, clip_low, clip_high)
    return clipped_at(terms.ratio(ratio), terms.advantages, low=low, high=high)


@dataclass(frozen=True)
class Objective:
    """A loss for each token, and where its bounds act: (lower [N], upper [N]), bool; None where it has none.

    Both take the settings of the objective as keywords.
    """

    loss: Callable[..., Tensor]
    clipped: Callable[..., Clipped] | None = None


def unless_zero(weights: Tensor, loss: Tensor) -> Tensor:
    """The loss, and exactly 0 where its weight is: 0 * inf would be no number."""
    return torch.where(weights == 0, 0.0, loss)
