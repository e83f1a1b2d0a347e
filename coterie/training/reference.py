"""The policy that the trained one is held near: frozen, moving after it, or replaced by it now and then."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie.models.logprobs import logprobs_of
from coterie.models.policy import Policy
from coterie.recipe import Recipe
from coterie.recipe.settings import Reference
from coterie.training.stages import streams_of
from coterie.types import Scored, Stream


def make_reference(policy: Policy, settings: Reference) -> Policy:
    """The policy as it is now, without gradients.

    A copy, unless the policy learns through an adapter, which at the start does nothing. Then the reference is the same
    model without it, or, where it moves, with a second adapter of its own.
    """
    if policy.adapter is None:
        reference = copy.deepcopy(policy)
        reference.model.requires_grad_(False)
        return reference
    return replace(policy, adapter=policy.adapter.copied("reference") if settings.moves else policy.adapter.off())


@torch.no_grad()
def move_reference(reference: Policy, policy: Policy, settings: Reference, step: int) -> None:
    """What a step changes in the reference: nothing, a little of the way to the policy, or all of it every k steps."""
    share = settings.share(step)
    pairs = zip(reference.named_parameters(), policy.named_parameters(), strict=True) if share else ()
    for (_, held), (_, trained) in pairs:
        held.lerp_(trained.to(held.dtype), share)


@dataclass(frozen=True)
class Watched:
    """Where a step compares policy and reference: streams, and the reference's log-probabilities of each, [N].

    held: the same for the streams that are learned from, where the loss needs them.
    """

    streams: Sequence[Stream]
    logprobs: Sequence[Tensor]
    held: Sequence[Tensor] | None


def watch_reference(
    reference: Policy, recipe: Recipe, scored: Scored, streams: Sequence[Stream], step: int, *, held: bool
) -> Watched:
    """The reference on the streams that are learned from, where the loss needs it there, else on a few groups for the record."""
    if not held:
        streams = streams_of(scored, recipe.optimiser.micro_batch_tokens, only=some_groups(scored, step))
    logprobs = logprobs_of(reference, streams, temperature=recipe.sampling.temperature)
    return Watched(streams, logprobs, logprobs if held else None)


def some_groups(scored: Scored, step: int) -> range:
    """Which groups a step's KL is watched on where nothing else needs the reference: a few whole ones, others each step.

    They hold about as many completions as there are groups, and each of their prompts is run once for all of them.
    """
    num_groups, group_size = scored.rewards.shape
    every = min(num_groups, max(1, group_size))
    return range(step % every, num_groups, every)
