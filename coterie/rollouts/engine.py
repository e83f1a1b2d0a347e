"""Engines: they turn prompts into completions, with the log-probabilities of the distribution they sampled.

Legend: P prompts, G completions per prompt, R rows that are being decoded, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.models.policy import Policy
from coterie.noise import mix, uniform
from coterie.recipe.settings import Sampling
from coterie.rollouts.truncation import support_of
from coterie.sections import section
from coterie.types import Completion

Done = Callable[[int, list[Completion]], None]


@dataclass(frozen=True)
class Job:
    """The arguments of `Engine.generate`. keys [P, G] and end_tokens are on the policy's device."""

    prompts: Sequence[Sequence[int]]
    keys: Tensor
    sampling: Sampling
    end_tokens: Tensor
    decode: Callable[[Sequence[int]], str] | None
    done: Done | None

    @property
    def num_completions(self) -> int:
        return self.keys.shape[1]


class Engine(ABC):
    """Samples completions with a policy's own weights; it holds none of its own."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Tensor,
        sampling: Sampling,
        end_tokens: Sequence[int],
        decode: Callable[[Sequence[int]], str] | None = None,
        done: Done | None = None,
    ) -> list[list[Completion]]:
        """G completions of each prompt: keys [P, G] int64 -> P lists of G. Equal keys, prompt and weights give equal tokens.

        A completion ends with one of `end_tokens`, with the token that completes one of `sampling.stop` in what `decode` makes of
        its last tokens, or at `sampling.max_new_tokens`. `done` is called with a prompt's number and its completions as soon as it
        is known that all of them have ended.

        Raises UserError where a sequence's positions could change while it is sampled.
        """
        for prompt in prompts:
            self.policy.lengths.check(len(prompt), sampling.max_new_tokens)
        device = self.policy.device
        ends = torch.tensor(list(end_tokens), device=device)
        return self.sample(Job(prompts, keys.to(device), sampling, ends, decode, done))

    @abstractmethod
    def sample(self, job: Job) -> list[list[Completion]]:
        """The completions of `generate`."""


@dataclass(frozen=True)
class SampledTokens:
    """One token for each of R rows, [R], and of the distribution that it was drawn from its log-probability and entropy, [R].

    support: bool [R, V], which tokens could be drawn, or None where all could."""

    tokens: Tensor
    logprobs: Tensor
    entropies: Tensor
    support: Tensor | None = None


@section("sample/draw")
def sample_tokens(logits: Tensor, keys: Tensor, positions: Tensor, sampling: Sampling) -> SampledTokens:
    """Draw one token a row: logits [R, V], keys [R], positions [R] (the token's number in its completion).

    Temperature 0 takes the likeliest token and reports the log-probability it has at temperature 1.
    """
    greedy = sampling.temperature == 0
    logits = logits.float() / (1.0 if greedy else sampling.temperature)
    support = None
    if sampling.truncates:
        support = support_of(logits, sampling.top_k, sampling.top_p, sampling.min_p)
        logits = logits.masked_fill(~support, -torch.inf)
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
    return SampledTokens(
        tokens=tokens,
        logprobs=logits.gather(1, tokens[:, None]).squeeze(1) - normaliser,
        entropies=-(probabilities * logprobs.masked_fill(probabilities == 0, 0.0)).sum(1),
        support=support,
    )


def _last_possible(probabilities: Tensor) -> Tensor:
    """The highest token id with a probability: [R, V] -> [R]."""
    return probabilities.shape[1] - 1 - (probabilities > 0).flip(1).int().argmax(1)


class Ends:
    """The ends of a job's rows: an end token, or a stop string in the text of the last tokens, which it keeps by row."""

    def __init__(self, job: Job) -> None:
        self._tokens, self._decode = job.end_tokens, job.decode
        self._strings = job.sampling.stop if job.decode is not None else ()
        # A character has four bytes at most, and a token at least one
        self._num_watched = 4 * max(map(len, self._strings), default=0)
        self._tails: dict[int, deque[int]] = {}

    @property
    def reads_text(self) -> bool:
        return bool(self._strings)

    def reached(self, rows: Tensor, live: Tensor, tokens: Tensor) -> Tensor:
        """Which rows end with the tokens they just drew: rows [R], their numbers in the job, live [R], tokens [R] -> bool [R]."""
        ended = torch.isin(tokens, self._tokens)
        if not self._strings:
            return ended
        drawn = zip(rows.tolist(), live.tolist(), tokens.tolist(), strict=True)
        found = [counts and self._completes(row, token) for row, counts, token in drawn]
        return ended | torch.tensor(found, device=tokens.device)

    def _completes(self, row: int, token: int) -> bool:
        assert self._decode is not None
        tail = self._tails.setdefault(row, deque(maxlen=self._num_watched))
        tail.append(token)
        text = self._decode(list(tail))
        return any(string in text for string in self._strings)
