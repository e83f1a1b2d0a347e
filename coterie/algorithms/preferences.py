"""Losses on preference pairs: DPO, and the reward model's.

Legend: B pairs.
"""

import torch.nn.functional as F
from torch import Tensor


def dpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimisation: log(pi_theta / pi_ref) of the chosen and the rejected completions [B] -> [B].

    -log sigmoid(beta * (chosen - rejected)), and the reverse with the weight `label_smoothing`, the share of pairs that are
    the wrong way round. Source: arXiv 2305.18290, equation 7; smoothing: https://ericmitchell.ai/cdpo.pdf.
    """
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(chosen - rejected): scores [B] each -> [B]. Source: arXiv 2203.02155, equation 1."""
    return -F.logsigmoid(chosen - rejected)
