"""What an engine is: it turns prompts into completions, with the log-probabilities of the distribution it sampled.

Legend: P prompts, G completions per prompt, R rows that are being decoded, V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from coterie.models.policy import Policy
from coterie.noise import mix, uniform
from coterie.recipe.settings import Sampling
from coterie.sections import section
from coterie.types import Completion

Done = Callable[[int, list[Completion]], None]


class Engine(Protocol):
    """Samples completions. `keys` [P, G] int64 seed the noise: equal keys, prompt and weights give equal tokens.

    A completion ends with one of `end_tokens`, with the token that completes one of `sampling.stop` in what `decode` makes of
    its last tokens, or at `sampling.max_new_tokens`. `done` is called with a prompt's number and its G completions as soon as it
    is known that all of them have ended.
    """

    policy: Policy

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Tensor,
        sampling: Sampling,
        end_tokens: Sequence[int],
        decode: Callable[[Sequence[int]], str] | None = None,
        done: Done | None = None,
    ) -> list[list[Completion]]: ...

    def load_weights(self, policy: Policy, version: int) -> None: ...


@dataclass(frozen=True)
class Sampled:
    """One token for each of R rows: tokens [R], and what `Completion` keeps of it. kept: bool [R, V], or None for all."""

    tokens: Tensor
    logprobs: Tensor
    entropies: Tensor
    kept: Tensor | None


@section("sample/draw")
def sample_tokens(logits: Tensor, keys: Tensor, positions: Tensor, sampling: Sampling) -> Sampled:
    """Draw one token a row: logits [R, V], keys [R], positions [R] (the token's number in its completion).

    Temperature 0 takes the likeliest token and reports the log-probability it has at temperature 1.
    """
    greedy = sampling.temperature == 0
    logits = logits.float() / (1.0 if greedy else sampling.temperature)
    if sampling.truncates:
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
        kept=kept if sampling.truncates else None,
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


class StopStrings:
    """Watches each row's text for the strings that end it."""

    def __init__(self, strings: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        self._strings, self._decode = strings, decode
        self._num_watched = 4 * max(map(len, strings))  # a character has four bytes at most, and a token at least one
        self._tails: dict[int, deque[int]] = {}

    @classmethod
    def of(cls, sampling: Sampling, decode: Callable[[Sequence[int]], str] | None) -> StopStrings | None:
        return cls(sampling.stop, decode) if sampling.stop and decode is not None else None

    def completed(self, rows: Tensor, live: Tensor, tokens: Tensor) -> Tensor:
        """Which rows hold a stop string, with the tokens they just drew: rows [R], live [R], tokens [R] -> bool [R]."""
        found = []
        for row, counts, token in zip(rows.tolist(), live.tolist(), tokens.tolist(), strict=True):
            if counts:
                tail = self._tails.setdefault(row, deque(maxlen=self._num_watched))
                tail.append(token)
            text = self._decode(list(tail)) if counts else ""
            found.append(any(string in text for string in self._strings))
        return torch.tensor(found, device=tokens.device)


@dataclass
class History:
    """What was drawn, step by step, until it is sorted into completions. Only live rows count; of others nothing is read."""

    rows: list[Tensor] = field(default_factory=list)
    live: list[Tensor] = field(default_factory=list)
    ended: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)
    entropies: list[Tensor] = field(default_factory=list)
    supports: list[Tensor] = field(default_factory=list)  # of the live rows of all steps, one after the other

    def add(self, rows: Tensor, live: Tensor, ended: Tensor, sampled: Sampled) -> None:
        """rows [R]: the number of each row in the whole job. live [R], ended [R]: bool."""
        drawn = (rows, live, ended, sampled.tokens, sampled.logprobs, sampled.entropies)
        kept_of = (self.rows, self.live, self.ended, self.tokens, self.logprobs, self.entropies)
        for column, values in zip(kept_of, drawn, strict=True):
            column.append(values)
        if sampled.kept is not None:
            kept = sampled.kept[live]
            self.supports += kept.nonzero()[:, 1].cpu().split(kept.sum(1).tolist())

    def completions(self, prompts: Sequence[int], num_completions: int) -> list[list[Completion]]:
        """Those of some prompts, by their numbers in ascending order, all of which have ended: a list of G each."""
        live = torch.cat(self.live)
        rows, ended, tokens, logprobs, entropies = (
            torch.cat(column)[live].cpu()
            for column in (self.rows, self.ended, self.tokens, self.logprobs, self.entropies)
        )
        chosen = torch.isin(rows // num_completions, torch.tensor(prompts)).nonzero().squeeze(1)
        order = chosen[torch.argsort(rows[chosen], stable=True)]
        sizes = rows[order].unique_consecutive(return_counts=True)[1].tolist()
        supports = [self.supports[i] for i in order.tolist()] if self.supports else None
        made, start = [], 0
        columns = (x[order].split(sizes) for x in (tokens, logprobs, entropies, ended))
        for of_row, of_logprobs, of_entropies, of_ended in zip(*columns, strict=True):
            stop = start + len(of_row)
            made.append(
                Completion(
                    tokens=of_row.tolist(),
                    logprobs=of_logprobs,
                    entropies=of_entropies,
                    ended="stop" if of_ended[-1] else "length",
                    support=supports[start:stop] if supports is not None else None,
                )
            )
            start = stop
        return [made[start : start + num_completions] for start in range(0, len(made), num_completions)]
