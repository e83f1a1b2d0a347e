"""Which tokens may be sampled: top-k, top-p, min-p.

Legend: R rows that are being decoded, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def support_of(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Which tokens truncation keeps: bool [R, V]. Top-p keeps the fewest likeliest tokens whose mass reaches p; min-p those
    that are at least that share as likely as the likeliest."""
    order = torch.argsort(logits, dim=1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    by_rank = rank.expand_as(order) < (top_k or logits.shape[1])
    if top_p < 1:
        probabilities = logits.gather(1, order).masked_fill(~by_rank, -torch.inf).softmax(1)
        by_rank = by_rank & (probabilities.cumsum(1) - probabilities < top_p)
    support = torch.zeros_like(by_rank).scatter(1, order, by_rank)
    if min_p > 0:
        support &= logits >= logits.amax(1, keepdim=True) + math.log(min_p)
    return support
