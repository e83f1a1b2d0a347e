"""Which advantages a recipe asks for: ours with its settings, or the user's own function.

Legend: P prompts, G completions per prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from coterie.algorithms.advantages import group_advantages, normalised_then_summed
from coterie.errors import UserError
from coterie.recipe import GRPO
from coterie.recipe.settings import Advantage
from coterie.rewards.base import Reward
from coterie.training.keywords import own_function
from coterie.types import Scored

Advantages = Callable[[Scored], Tensor]


def load_advantages(recipe: GRPO, rewards: Sequence[Reward]) -> Advantages:
    """How scored groups become advantages [P, G]: the recipe's settings, or the user's own function.

    That has `group_advantages`' signature: rewards [P, G], NaN where one abstains -> [P, G], with what it names of the `advantage`
    section as keywords. Raises UserError where it is missing, or asks for a keyword that is no such setting.
    """
    settings = recipe.advantage
    if settings.function is not None:
        own = own_function(settings.function, "advantage.function", settings.model_dump())
        return lambda scored: _checked(own(scored.rewards.clone()), scored.rewards)
    if settings.combine == "sum":
        return lambda scored: group_advantages(
            scored.rewards, baseline=settings.baseline, scale=settings.scale, epsilon=settings.epsilon
        )
    weights = {reward.name: reward.weight for reward in rewards}
    return lambda scored: _each(scored, weights, settings)


def _each(scored: Scored, weights: Mapping[str, float], settings: Advantage) -> Tensor:
    parts = [part.masked_fill(~scored.valid, math.nan) for part in scored.parts.values()]
    of_parts = [weights.get(name, 1.0) for name in scored.parts]
    return normalised_then_summed(
        parts, of_parts, baseline=settings.baseline, scale=settings.scale, epsilon=settings.epsilon
    )


def _checked(advantages: Tensor, rewards: Tensor) -> Tensor:
    """A user's advantages: a finite [P, G], and 0 where the completion abstains."""
    if not isinstance(advantages, Tensor) or advantages.shape != rewards.shape:
        given = tuple(advantages.shape) if isinstance(advantages, Tensor) else type(advantages).__name__
        raise UserError(
            f"advantage.function: returned {given}; a tensor with one number per completion, {tuple(rewards.shape)}, is needed"
        )
    advantages = torch.where(rewards.isnan(), 0.0, advantages.detach().to(rewards.dtype))
    if not advantages.isfinite().all():
        raise UserError("advantage.function: returned numbers that are not finite")
    return advantages
