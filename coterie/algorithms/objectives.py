"""Policy objectives: one loss per token, to be aggregated elsewhere."""

import torch
from torch import Tensor


def clipped_loss(ratio: Tensor, advantages: Tensor, *, low: float | Tensor, high: float | Tensor) -> Tensor:
    """The clipped policy objective as a loss: ratio [N], advantages [N] -> [N].

    -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A). The bounds are numbers, or one per token [N]. Which of them acts
    depends on the sign of A alone: the upper one where A > 0, the lower one where A < 0.
    Source: PPO, arXiv 1707.06347, equation 7; two bounds: DAPO, arXiv 2503.14476, equation 8.
    """
    low, high = (torch.as_tensor(bound, dtype=ratio.dtype, device=ratio.device) for bound in (low, high))
    clipped = torch.clamp(ratio, 1 - low, 1 + high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    return torch.where(advantages == 0, 0.0, loss)  # and not 0 * inf


def clipped_at(
    ratio: Tensor, advantages: Tensor, *, low: float | Tensor, high: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Where each bound acts, so that the token has no gradient: (lower [N], upper [N]), bool."""
    return (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)
