"""What the native engine drew, step by step, until it is sorted into completions.

Legend: R rows of a step, G completions per prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coterie.rollouts.engine import SampledTokens
from coterie.types import Completion


class Transcript:
    """The tokens that were drawn, step by step, until they are sorted into completions. Only live rows count; of others nothing is read."""

    def __init__(self) -> None:
        self._steps: list[tuple[Tensor, ...]] = []
        self._supports: list[Tensor] = []  # of the live rows of all steps, one after the other

    def add(self, rows: Tensor, live: Tensor, ended: Tensor, sampled: SampledTokens) -> None:
        """rows [R]: the number of each row in the whole job. live [R], ended [R]: bool."""
        self._steps.append((live, rows, ended, sampled.tokens, sampled.logprobs, sampled.entropies))
        if sampled.support is not None:
            support = sampled.support[live]
            self._supports += support.nonzero()[:, 1].cpu().split(support.sum(1).tolist())

    def completions(self, prompts: Sequence[int], num_completions: int) -> list[list[Completion]]:
        """The completions of some prompts, by their numbers in ascending order, all of which have ended: a list of G each."""
        live, *columns = map(torch.cat, zip(*self._steps, strict=True))
        rows, *columns = (column[live].cpu() for column in columns)
        chosen = torch.isin(rows // num_completions, torch.tensor(prompts)).nonzero().squeeze(1)
        order = chosen[torch.argsort(rows[chosen], stable=True)]
        sizes = rows[order].unique_consecutive(return_counts=True)[1].tolist()
        made = []
        for of_row in zip(*(x.split(sizes) for x in (order, *(column[order] for column in columns))), strict=True):
            places, ended, tokens, logprobs, entropies = of_row
            made.append(
                Completion(
                    tokens=tokens.tolist(),
                    logprobs=logprobs,
                    entropies=entropies,
                    ended="stop" if ended[-1] else "length",
                    support=[self._supports[i] for i in places.tolist()] if self._supports else None,
                )
            )
        return [made[start : start + num_completions] for start in range(0, len(made), num_completions)]
