"""Where a step compares the policy with the reference.

Legend: N completion tokens of a stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from coterie.models.logprobs import logprobs_of
from coterie.models.policy import Policy
from coterie.recipe import Recipe
from coterie.rollouts.pack import Row, make_stream, split_by_tokens
from coterie.types import Scored, Stream


def watch_reference(
    reference: Policy, recipe: Recipe, scored: Scored, streams: Sequence[Stream] | None, step: int
) -> tuple[Sequence[Stream], list[Tensor]]:
    """Where a step compares the policy with the reference: streams, and the reference's log-probabilities of each, [N].

    streams: those that are learned from, where the loss needs the reference at every token; None for a few groups, for the record.
    """
    if streams is None:
        streams = streams_of(scored, recipe.optimiser.micro_batch_tokens, only=some_groups(scored, step))
    return streams, logprobs_of(reference, streams, temperature=recipe.sampling.temperature)


def some_groups(scored: Scored, step: int) -> range:
    """Which groups a step's KL is watched on where nothing else needs the reference: a few whole ones, others each step.

    They hold about as many completions as there are groups, and each of their prompts is run once for all of them.
    """
    num_groups, group_size = scored.rewards.shape
    every = min(num_groups, max(1, group_size))
    return range(step % every, num_groups, every)


def streams_of(scored: Scored, micro_batch_tokens: int, *, only: Iterable[int] | None = None) -> list[Stream]:
    """The valid completions, of all groups or of some, as streams without advantages."""
    groups = []
    valid = scored.valid.tolist()
    for number in only if only is not None else range(len(scored.groups)):
        group = scored.groups[number]
        rows = [
            Row(c.tokens, c.logprobs, support=c.support)
            for c, counts in zip(group.completions, valid[number], strict=True)
            if counts
        ]
        groups.append((group.prompt.tokens, rows))
    return [make_stream(part) for part in split_by_tokens(groups, micro_batch_tokens)]
