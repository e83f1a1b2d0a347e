"""Weights for samples of another engine or of an older policy.

Legend: N completion tokens of a stream, B rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.algorithms.ratios import RATIOS


def importance_weights(
    old_logprobs: Tensor, sampler_logprobs: Tensor, row: Tensor, num_rows: int, *, level: str, kind: str, limit: float
) -> Tensor:
    """What corrects for samples that another engine or an older policy made: [N] each -> [N], no gradient.

    The weight is pi_old / pi_sampler per token, or of the whole completion ("sequence"). "truncate" takes at most `limit`;
    "mask" takes 0 where the weight is above `limit` or below 1 / `limit`.
    Source: truncation, IMPALA, arXiv 1802.01561; both on language models, https://fengyao.notion.site/off-policy-rl.
    """
    ratio = RATIOS[level]((old_logprobs - sampler_logprobs).detach(), row, num_rows)
    if kind == "truncate":
        return ratio.clamp(max=limit)
    return torch.where((ratio > limit) | (ratio < 1 / limit), 0.0, ratio)
