"""The policy that the trained one is held near: frozen, moving after it, or replaced by it now and then."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from coterie.fast.half_body import HalfBody
from coterie.models.policy import Policy
from coterie.recipe.settings import Reference


def make_reference(policy: Policy, settings: Reference, *, only_read: bool = False) -> Policy:
    """The policy as it is now, without gradients. only_read: nothing is made of its weights but log-probabilities.

    A copy, unless the policy learns through an adapter, which at the start does nothing. Then the reference is the same
    model without it, or, where it moves, with a second adapter of its own.
    """
    if policy.adapter is None:
        reference = copy.deepcopy(policy)
        reference.model.requires_grad_(False)
        if only_read and not settings.moves and isinstance(reference.body, HalfBody):
            reference.body.keep_halves_alone()
        return reference
    return replace(policy, adapter=policy.adapter.copied("reference") if settings.moves else policy.adapter.off())


@torch.no_grad()
def move_reference(reference: Policy, policy: Policy, settings: Reference, step: int) -> None:
    """What a step changes in the reference: nothing, a little of the way to the policy, or all of it every k steps."""
    share = settings.share(step)
    pairs = zip(reference.named_parameters(), policy.named_parameters(), strict=True) if share else ()
    for (_, parameter), (_, trained) in pairs:
        parameter.lerp_(trained.to(parameter.dtype), share)
