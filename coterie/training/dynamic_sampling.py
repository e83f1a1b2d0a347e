"""Dynamic sampling: groups without signal are dropped, and others drawn in their place.

Legend: P prompts, G completions per prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from coterie.algorithms.advantages import has_signal
from coterie.recipe import GRPO
from coterie.recipe.settings import Advantage
from coterie.tasks.base import Task
from coterie.tasks.draw import draw_again
from coterie.types import RewardFailure, Scored


def until_signal(
    recipe: GRPO, task: Task, step: int, scored: Scored, completed: Callable[..., Scored]
) -> tuple[Scored, list[int]]:
    """More groups for a step, until enough have a signal: every group that was drawn, and the places of those to learn from.

    scored: the groups that were drawn first. completed: (prompts, attempt) -> their groups. It ends when there are enough or the
    rounds of `dynamic_sampling` are spent. Where none has signal the last ones drawn are learned from, and the step learns nothing
    from their rewards.
    """
    wanted, start = recipe.prompts_per_step, 0
    places = _places_with_signal(scored, recipe.advantage, 0)
    for attempt in range(1, recipe.dynamic_sampling.rounds + 1):
        if len(places) >= wanted:
            break
        prompts = draw_again(task, wanted - len(places), seed=recipe.seed, step=step, attempt=attempt)
        new = completed(prompts, attempt)
        start = len(scored.groups)
        scored = _joined(scored, new)
        places += _places_with_signal(new, recipe.advantage, start)
    return scored, places or list(range(start, len(scored.groups)))


def groups_with_signal(scored: Scored, settings: Advantage) -> Tensor:
    """Which groups tell their completions apart, by the sum of the rewards or by any of them alone: bool [P]."""
    if settings.combine == "sum" or not scored.parts:
        return has_signal(scored.rewards)
    parts = [has_signal(part.masked_fill(~scored.valid, math.nan)) for part in scored.parts.values()]
    return torch.stack(parts).any(0)


def _joined(first: Scored, second: Scored) -> Scored:
    """The groups of one, then those of the other."""
    shift = len(first.groups)
    failures = [RewardFailure(f.reward, f.group + shift, f.completion, f.reason) for f in second.failures]
    parts = {name: torch.cat([part, second.parts[name]]) for name, part in first.parts.items()}
    rewards = torch.cat([first.rewards, second.rewards])
    return Scored([*first.groups, *second.groups], rewards, parts, [*first.failures, *failures])


def _places_with_signal(scored: Scored, settings: Advantage, start: int) -> list[int]:
    """The places of the groups that have one, counted from `start`."""
    return [start + i for i in groups_with_signal(scored, settings).nonzero().flatten().tolist()]
