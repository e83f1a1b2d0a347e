"""Whether the gap between sampler and trainer is rounding, or two different models (the metric policy/sampler_gap_max).

Legend: N completion tokens of a stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from coterie.models.logprobs import token_logprobs
from coterie.models.policy import Policy
from coterie.models.rounding import TIMES, epsilon_of, rounding_of
from coterie.rollouts.pack import Row, make_stream
from coterie.types import Stream


def rounding_at_the_gap(
    policy: Policy, streams: Sequence[Stream], gaps: Sequence[Tensor], *, temperature: float
) -> dict[str, float]:
    """How far rounding alone moves the log-probability of the worst token, in nats, as the metric policy/sampler_rounding.

    gaps: [N] for each stream. The row that has this token is run by itself through the unmodified model, as it is and with each
    result rounded otherwise. Nothing where even the largest gap is too small to ask: a hundredth, or what half precision makes of a small model.
    """
    worth = max(0.01, 64 * epsilon_of(policy))
    largest = [gap.max().item() if len(gap) else 0.0 for gap in gaps]
    if not largest or not math.isfinite(sum(largest)) or max(largest) <= worth:
        return {}
    number = largest.index(max(largest))
    stream, place = streams[number].to(policy.device), int(gaps[number].argmax())
    alone, first = _row_alone(stream, int(stream.row[place]))
    plain = replace(policy, served="padded", body=None)
    _, moved = rounding_of(policy.model, lambda: token_logprobs(plain, alone, temperature=temperature))
    return {"policy/sampler_rounding": max(worth, TIMES * moved[place - first].item())}


def _row_alone(stream: Stream, row: int) -> tuple[Stream, int]:
    """A stream of one row of another, and which of that one's N is its first."""
    prompt, tokens = stream.rows()[row]
    first = int((stream.row == row).nonzero()[0])
    length = len(tokens) - prompt
    support = stream.support[first : first + length] if stream.support is not None else None
    written = Row(tokens[prompt:].tolist(), torch.zeros(length), support=support)
    return make_stream([(tokens[:prompt].tolist(), [written])]).to(stream.row.device), first
