"""Attention of the architectures whose scores are more than products: Gemma 2's soft cap, GPT-OSS's sinks, the slopes of BLOOM and MPT.

Legend: R sequences, L queries of each, H heads, K key-value heads, E width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.models.attention import AttentionSettings


def scored_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, settings: AttentionSettings) -> Tensor:
    """Masked attention, score by score: q [R, H, L, E], k and v [R, K, keys, E] -> [R, H, L, E]. The mask is added, with the slopes in it."""
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores, cap = q @ k.transpose(2, 3), settings.softcap
    scores = torch.tanh(scores * (settings.scaling / cap)) * cap if cap is not None else scores * settings.scaling
    return attention_weights(scores + mask, settings.sinks).to(q.dtype) @ v


def attention_weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """The softmax of masked scores [R, H, L, keys], in float32, beside the sinks [H] where there are any."""
    scores = scores.float()
    if sinks is None:
        return scores.softmax(-1)
    beside = sinks.float().view(-1, 1, 1).expand(len(scores), -1, scores.shape[2], 1)
    return torch.cat([scores, beside], -1).softmax(-1)[..., :-1]
