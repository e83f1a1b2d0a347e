"""What an engine is: it turns prompts into completions, with the log-probabilities of the distribution it sampled.

Legend: P prompts, G completions per prompt, R rows that are being decoded, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from coterie.models.policy import Policy
from coterie.noise import mix, uniform
from coterie.recipe import Sampling
from coterie.types import Completion


class Engine(Protocol):
    """Samples completions. `keys` [P, G] int64 seed the noise: equal keys, prompt and weights give equal tokens."""

    def generate(
        self, prompts: Sequence[Sequence[int]], keys: Tensor, sampling: Sampling, end_tokens: Sequence[int]
    ) -> list[list[Completion]]: ...

    def load_weights(self, policy: Policy, version: int) -> None: ...


@dataclass(frozen=True)
class Sampled:
    """One token for each of R rows: tokens [R], and what `Completion` keeps of it."""

    tokens: Tensor
    logprobs: Tensor
    entropies: Tensor
    support: list[Tensor] | None


def sample_tokens(logits: Tensor, keys: Tensor, positions: Tensor, sampling: Sampling) -> Sampled:
    """Draw one token a row: logits [R, V], keys [R], positions [R] (the token's number in its completion).

    Temperature 0 takes the likeliest token and reports the log-probability it has at temperature 1.
    """
    greedy = sampling.temperature == 0
    logits = logits.float() / (1.0 if greedy else sampling.temperature)
    truncated = not greedy and (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0)
    if truncated:
        kept = _kept(logits, sampling.top_k, sampling.top_p, sampling.min_p)
        logits = logits.masked_fill(~kept, -torch.inf)
    normaliser = logits.logsumexp(1)  # [R]
    logprobs = logits - normaliser[:, None]
    probabilities = logprobs.exp()
    if greedy:
        tokens = logits.argmax(1)
    else:
        cumulative = probabilities.cumsum(1, dtype=torch.float64)
        thresholds = uniform(mix(keys, positions)) * cumulative[:, -1]
        tokens = torch.searchsorted(cumulative, thresholds[:, None], right=True).squeeze(1)
        tokens = torch.minimum(tokens, _last_possible(probabilities))  # rounding may put a threshold at the very end
    return Sampled(
        tokens=tokens,
        logprobs=logits.gather(1, tokens[:, None]).squeeze(1) - normaliser,
        entropies=-(probabilities * logprobs.masked_fill(probabilities == 0, 0.0)).sum(1),
        support=[row.nonzero().squeeze(1).cpu() for row in kept] if truncated else None,
    )


def _kept(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Which tokens truncation keeps: bool [R, V]. Top-p keeps the fewest likeliest tokens whose mass reaches p; min-p those
    that are at least that share as likely as the likeliest."""
    order = torch.argsort(logits, dim=1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    by_rank = rank.expand_as(order) < (top_k or logits.shape[1])
    if top_p < 1:
        probabilities = logits.gather(1, order).masked_fill(~by_rank, -torch.inf).softmax(1)
        by_rank = by_rank & (probabilities.cumsum(1) - probabilities < top_p)
    kept = torch.zeros_like(by_rank).scatter(1, order, by_rank)
    if min_p > 0:
        kept &= logits >= logits.amax(1, keepdim=True) + math.log(min_p)
    return kept


def _last_possible(probabilities: Tensor) -> Tensor:
    """The highest token id with a probability: [R, V] -> [R]."""
    return probabilities.shape[1] - 1 - (probabilities > 0).flip(1).int().argmax(1)


@dataclass
class History:
    """What was drawn, step by step, until it is sorted into completions."""

    rows: list[Tensor] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)

    def add(self, rows: Tensor, sampled: Sampled) -> None:
        self.rows.append(rows)
        self.sampled.append(sampled)

    def completions(self, num_prompts: int, num_completions: int, end_tokens: set[int]) -> list[list[Completion]]:
        rows = torch.cat(self.rows).cpu()
        order = torch.argsort(rows, stable=True)
        sizes = torch.bincount(rows, minlength=num_prompts * num_completions).tolist()
        tokens, logprobs, entropies = (
            torch.cat([getattr(step, name) for step in self.sampled]).cpu()[order].split(sizes)
            for name in ("tokens", "logprobs", "entropies")
        )
        supports: list[list[Tensor] | None] = [None] * len(sizes)
        if self.sampled[0].support is not None:
            flat = [ids for step in self.sampled for ids in step.support or ()]
            sorted_ids = iter([flat[i] for i in order.tolist()])
            supports = [[next(sorted_ids) for _ in range(size)] for size in sizes]
        made = [
            Completion(
                tokens=of_row.tolist(),
                logprobs=logprobs[i],
                entropies=entropies[i],
                ended="stop" if of_row[-1].item() in end_tokens else "length",
                support=supports[i],
            )
            for i, of_row in enumerate(tokens)
        ]
        return [made[i * num_completions : (i + 1) * num_completions] for i in range(num_prompts)]
