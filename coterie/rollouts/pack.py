"""From completions to the unpadded stream. The one shift by one, from a token to what predicts it, happens here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.types import BatchTotals, Scored, Stream


@dataclass(frozen=True)
class Row:
    """One completion on its way into a stream.

    tokens: n ids. logprobs [n]: the sampler's; zeros where nothing was sampled. support: as in Completion.
    """

    tokens: Sequence[int]
    logprobs: Tensor
    advantage: float = 0.0
    reward: float = 0.0
    support: Sequence[Tensor] | None = None

    @classmethod
    def written(cls, tokens: Sequence[int]) -> Row:
        """A completion that came with the data."""
        return cls(tokens, torch.zeros(len(tokens)))


PromptRows = tuple[Sequence[int], list[Row]]


def pack(
    scored: Scored, advantages: Tensor, *, max_length: int, micro_batch_tokens: int, drop_silent: bool
) -> tuple[list[Stream], BatchTotals]:
    """Scored groups and advantages [P, G] -> micro-batches as streams, and the denominators of the whole step.

    Completions that abstain are left out and not counted. With `drop_silent`, completions whose advantage is exactly zero
    are counted and left out: where nothing but the advantage gives a gradient, theirs is exactly zero.
    """
    valid, values, rewards = scored.valid.tolist(), advantages.tolist(), scored.rewards.tolist()
    groups: list[PromptRows] = []
    num_rows = num_tokens = 0
    for group, *of_group in zip(scored.groups, valid, values, rewards, strict=True):
        rows = []
        for completion, counts, advantage, reward in zip(group.completions, *of_group, strict=True):
            if not counts:
                continue
            num_rows += 1
            num_tokens += len(completion.tokens)
            if advantage != 0 or not drop_silent:
                rows.append(Row(completion.tokens, completion.logprobs, advantage, reward, completion.support))
        groups.append((group.prompt.tokens, rows))
    totals = BatchTotals(num_rows, num_tokens, max_length)
    return [make_stream(part) for part in split_by_tokens(groups, micro_batch_tokens)], totals


def split_by_tokens(groups: Sequence[PromptRows], max_tokens: int) -> list[list[PromptRows]]:
    """Cut groups into micro-batches of at most `max_tokens` stream tokens, in order.

    A group that does not fit is cut too, and its prompt stands in both; a row that does not fit stands alone.
    """
    parts: list[list[PromptRows]] = []
    room = 0
    for prompt, rows in groups:
        here: list[Row] = []  # this group's rows in the newest part: none as long as its prompt is not there
        for row in rows:
            if len(row.tokens) + (0 if here else len(prompt)) > room:
                parts.append([])
                room, here = max_tokens, []
            if not here:
                parts[-1].append((prompt, here))
                room -= len(prompt)
            here.append(row)
            room -= len(row.tokens)
    return parts


def make_stream(groups: Sequence[PromptRows]) -> Stream:
    """Lay groups out as one stream: each prompt once, then its completions."""
    rows = [row for _, of_prompt in groups for row in of_prompt]
    lengths = torch.tensor([len(row.tokens) for row in rows])
    tokens: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    for prompt, of_prompt in groups:
        tokens += prompt
        positions += range(len(prompt))
        last_of_prompt = len(tokens) - 1
        for row in of_prompt:
            # The token before predicts each token; before a completion's first stands the last of its prompt
            predictors += [last_of_prompt, *range(len(tokens), len(tokens) + len(row.tokens) - 1)]
            tokens += row.tokens
            positions += range(len(prompt), len(prompt) + len(row.tokens))
    support = None
    if any(row.support is not None for row in rows):
        assert all(row.support is not None for row in rows), "either every row has a support or none"
        support = [ids for row in rows for ids in row.support or ()]
    return Stream(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        segments=[(len(prompt), [len(row.tokens) for row in of_prompt]) for prompt, of_prompt in groups],
        targets=torch.tensor([token for row in rows for token in row.tokens]),
        predictors=torch.tensor(predictors),
        row=torch.arange(len(rows)).repeat_interleave(lengths),
        advantages=torch.tensor([row.advantage for row in rows], dtype=torch.float32),
        rewards=torch.tensor([row.reward for row in rows], dtype=torch.float32),
        sampler_logprobs=torch.cat([row.logprobs for row in rows]).float(),
        support=support,
    )
