"""Which formulas a recipe asks for: advantages and an objective, ours with its settings or functions of the user's own.

Legend: P prompts, G completions per prompt, N completion tokens of a stream.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from coterie.algorithms.advantages import group_advantages
from coterie.algorithms.clip import Objective, TokenTerms, ratio_clipped
from coterie.algorithms.normalised import normalised_then_summed
from coterie.algorithms.objectives import OBJECTIVES
from coterie.errors import UserError
from coterie.recipe import GRPO
from coterie.recipe.objectives import Loss
from coterie.recipe.settings import Advantage
from coterie.rewards.base import Reward
from coterie.types import Scored
from coterie.user_code import load_function


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


def make_objective(loss: Loss) -> Objective:
    """The objective that a recipe names, ours or the user's own, with its settings.

    Raises UserError where the user's function is missing, or asks for a keyword that is no setting of `loss`.
    """
    ours = OBJECTIVES.get(loss.objective)
    if ours is None:
        return Objective(own_objective(loss), partial(ratio_clipped, **loss.keywords))
    clipped = partial(ours.clipped, **loss.keywords) if ours.clipped is not None else None
    return Objective(partial(ours.loss, **loss.keywords), clipped)


def own_objective(loss: Loss) -> Callable[[TokenTerms], Tensor]:
    """The user's objective, terms -> one loss per token [N], with what it names of the `loss` section as keywords.

    UserError as `own_function`'s, and where an answer has another shape.
    """
    own = own_function(loss.objective, "loss.objective", loss.model_dump())

    def checked(terms: TokenTerms) -> Tensor:
        per_token = own(terms)
        if not isinstance(per_token, Tensor) or per_token.shape != terms.policy_logprobs.shape:
            given = tuple(per_token.shape) if isinstance(per_token, Tensor) else type(per_token).__name__
            wanted = tuple(terms.policy_logprobs.shape)
            raise UserError(f"loss.objective: returned {given}; a tensor with one loss per token, {wanted}, is needed")
        return per_token

    return checked


def own_advantages(function: str, settings: Advantage) -> Callable[[Tensor], Tensor]:
    """The user's advantages: rewards [P, G], NaN where one abstains -> a finite [P, G], 0 where the completion abstains.

    It gets what it names of the `advantage` section as keywords. UserError as `own_function`'s, and where an answer is something else.
    """
    own = own_function(function, "advantage.function", settings.model_dump())

    def checked(rewards: Tensor) -> Tensor:
        advantages = own(rewards.clone())
        if not isinstance(advantages, Tensor) or advantages.shape != rewards.shape:
            given = tuple(advantages.shape) if isinstance(advantages, Tensor) else type(advantages).__name__
            raise UserError(
                f"advantage.function: returned {given}; a tensor with one number per completion, {tuple(rewards.shape)}, is needed"
            )
        advantages = torch.where(rewards.isnan(), 0.0, advantages.detach().to(rewards.dtype))
        if not advantages.isfinite().all():
            raise UserError("advantage.function: returned numbers that are not finite")
        return advantages

    return checked


def own_function(name: str, setting: str, settings: Mapping[str, Any]) -> Callable[..., Any]:
    """The function that a setting names, given those of the settings that it takes as keyword-only arguments.

    UserError where it is missing, or needs one that does not exist.
    """
    function, chosen = load_function(name, setting), {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        if parameter.name in settings:
            chosen[parameter.name] = settings[parameter.name]
        elif parameter.default is parameter.empty:
            raise UserError(
                f"{setting}: {name} needs {parameter.name}, which is no setting; there are: {', '.join(settings)}"
            )
    return partial(function, **chosen)
