"""The policy that the trained one is held near: frozen, moving after it, or replaced by it now and then (R11)."""

from __future__ import annotations

import copy

import torch

from coterie.models.policy import Policy
from coterie.recipe import Reference


def frozen_copy(policy: Policy) -> Policy:
    """The policy as it is now, without gradients."""
    frozen = copy.deepcopy(policy)
    frozen.model.requires_grad_(False)
    return frozen


@torch.no_grad()
def move_reference(reference: Policy, policy: Policy, settings: Reference, step: int) -> None:
    """What a step changes in the reference: nothing, a little of the way to the policy, or all of it every k steps."""
    if settings.kind == "frozen" or (settings.kind == "replaced" and step % settings.every):
        return
    share = 1 - settings.decay if settings.kind == "moving" else 1.0
    pairs = zip(reference.model.parameters(), policy.model.parameters(), strict=True)
    for held, trained in pairs:
        held.lerp_(trained.to(held.dtype), share)
