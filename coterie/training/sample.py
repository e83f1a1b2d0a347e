"""The first half of a step: prompts -> completions -> rewards.

Legend: P prompts, G completions per prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from coterie.algorithms.advantages import has_signal
from coterie.recipe import GRPO, Sampled
from coterie.recipe.settings import Advantage
from coterie.rewards.base import Reward
from coterie.rewards.score import score
from coterie.rollouts.collect import collect
from coterie.rollouts.engine import Engine
from coterie.stopping import may_stop
from coterie.tasks.draw import draw, draw_again
from coterie.training.metrics import Clock
from coterie.training.problem import Problem
from coterie.training.stages import with_overlong
from coterie.types import Group, Prompt, RewardFailure, Scored


@dataclass(frozen=True)
class Drawn:
    """What a step sampled. scored: every group that was drawn. kept [P]: which of them are learned from, in order."""

    scored: Scored
    kept: list[int]

    @property
    def learned(self) -> Scored:
        """The groups that are learned from."""
        if len(self.kept) == len(self.scored.groups):
            return self.scored
        place = {group: number for number, group in enumerate(self.kept)}
        failures = [replace(f, group=place[f.group]) for f in self.scored.failures if f.group in place]
        parts = {name: part[self.kept] for name, part in self.scored.parts.items()}
        return Scored([self.scored.groups[i] for i in self.kept], self.scored.rewards[self.kept], parts, failures)

    def spread(self, advantages: Tensor) -> Tensor:
        """Advantages of the learned groups -> of every group, 0 where it was dropped."""
        whole = advantages.new_zeros(self.scored.rewards.shape)
        whole[self.kept] = advantages
        return whole

    def recorded(self, scored: Scored) -> Scored:
        """What is kept of the step: every group that was drawn, with the rewards as they were learned from where all are."""
        return scored if len(self.kept) == len(self.scored.groups) else self.scored


def sampling(recipe: Sampled, problem: Problem, engine: Engine) -> Callable[[int, Clock], Drawn]:
    """How the steps of a run get their groups: (step, clock) -> groups, sampled and scored."""
    if isinstance(recipe, GRPO) and recipe.dynamic_sampling.rounds:
        return partial(sample_until_signal, recipe, problem, engine)
    return partial(sample_once, recipe, problem, engine)


def sample_once(recipe: Sampled, problem: Problem, engine: Engine, step: int, clock: Clock) -> Drawn:
    """Draw, sample and score the groups of a step, and learn from all of them."""
    prompts = draw(problem.task, recipe.prompts_per_step, seed=recipe.seed, step=step)
    scored = sample(recipe, problem, engine, prompts, (recipe.seed, "train", step), clock)
    return Drawn(scored, list(range(len(scored.groups))))


def sample_until_signal(recipe: GRPO, problem: Problem, engine: Engine, step: int, clock: Clock) -> Drawn:
    """Dynamic sampling: groups without signal are dropped and others drawn in their place.

    It ends when there are enough or the rounds of `dynamic_sampling` are spent. Where none has signal the last ones drawn are kept, and
    the step learns nothing from their rewards.
    """
    wanted, seed = recipe.prompts_per_step, recipe.seed
    whole = sample_once(recipe, problem, engine, step, clock).scored
    kept = _places_with_signal(whole, recipe.advantage, 0)
    start = 0
    for attempt in range(1, recipe.dynamic_sampling.rounds + 1):
        if len(kept) >= wanted:
            break
        prompts = draw_again(problem.task, wanted - len(kept), seed=seed, step=step, attempt=attempt)
        new = sample(recipe, problem, engine, prompts, (seed, "train", step, attempt), clock)
        start = len(whole.groups)
        whole = _joined(whole, new)
        kept += _places_with_signal(new, recipe.advantage, start)
    return Drawn(whole, kept or list(range(start, len(whole.groups))))


def sample(
    recipe: Sampled,
    problem: Problem,
    engine: Engine,
    prompts: Sequence[Prompt],
    noise: tuple[int | str, ...],
    clock: Clock,
) -> Scored:
    """Completions of some prompts, with their rewards."""
    groups = collect(
        engine,
        prompts,
        problem.codec,
        recipe.sampling,
        num_completions=recipe.group_size,
        noise=noise,
        begin=beginning(problem.rewards, engine),
    )
    may_stop()
    clock.lap("time/sample_seconds")
    scored = score(groups, problem.rewards, max_failed_share=recipe.max_failed_rewards)
    may_stop()
    if isinstance(recipe, GRPO):
        scored = with_overlong(scored, recipe.overlong, recipe.sampling.max_new_tokens)
    clock.lap("time/score_seconds")
    return scored


def beginning(rewards: Sequence[Reward], engine: Engine) -> Callable[[Group], None] | None:
    """What starts the rewards on a group while others are sampled. None where none of them can."""
    spare_cores = engine.policy.device.type != "cpu"
    able = [reward for reward in rewards if reward.can_begin(spare_cores)]

    def begin(group: Group) -> None:
        for reward in able:
            reward.begin(group)

    return begin if able else None


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
