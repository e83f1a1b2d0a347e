"""Which advantages a recipe asks for: ours with its settings, or the user's own function.

Legend: P prompts, G completions per prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from coterie.algorithms.advantages import group_advantages, normalised_then_summed
from coterie.recipe import GRPO
from coterie.recipe.settings import Advantage
from coterie.rewards.base import Reward
from coterie.training.own_functions import own_advantages
from coterie.types import Scored


def make_advantages(recipe: GRPO, rewards: Sequence[Reward]) -> Callable[[Scored], Tensor]:
    """How scored groups become advantages [P, G]: the recipe's settings, or the user's own function.

    Raises UserError where that function is missing, or asks for a keyword that is no setting of `advantage`.
    """
    settings = recipe.advantage
    if settings.function is not None:
        own = own_advantages(settings.function, settings)
        return lambda scored: own(scored.rewards)
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
