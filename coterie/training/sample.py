"""The first half of a step: prompts -> completions -> rewards.

Legend: P prompts, G completions per prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from coterie.recipe import GRPO, Sampled
from coterie.rewards.base import Reward
from coterie.rewards.score import score
from coterie.rollouts.collect import collect
from coterie.rollouts.engine import Engine
from coterie.stopping import may_stop
from coterie.tasks.draw import draw
from coterie.training.dynamic_sampling import until_signal
from coterie.training.metrics import Clock
from coterie.training.problem import Problem
from coterie.training.stages import with_overlong
from coterie.types import Group, Prompt, Scored


@dataclass(frozen=True)
class Drawn:
    """What a step sampled. scored: every group that was drawn. learned_groups: the places in it of those that are learned from.

    All of them are learned from, in order, unless dynamic sampling dropped some.
    """

    scored: Scored
    learned_groups: list[int]

    @property
    def learned(self) -> Scored:
        """The groups that are learned from."""
        if self._is_whole:
            return self.scored
        place = {group: number for number, group in enumerate(self.learned_groups)}
        failures = [replace(f, group=place[f.group]) for f in self.scored.failures if f.group in place]
        parts = {name: part[self.learned_groups] for name, part in self.scored.parts.items()}
        groups = [self.scored.groups[i] for i in self.learned_groups]
        return Scored(groups, self.scored.rewards[self.learned_groups], parts, failures)

    def spread(self, advantages: Tensor) -> Tensor:
        """Advantages of the learned groups -> of every group, 0 where it was dropped."""
        whole = advantages.new_zeros(self.scored.rewards.shape)
        whole[self.learned_groups] = advantages
        return whole

    def recorded(self, scored: Scored) -> Scored:
        """What is recorded: if no group was dropped, `scored`, as it was learned from (the KL included); else every group, without the KL."""
        return scored if self._is_whole else self.scored

    @property
    def _is_whole(self) -> bool:
        return len(self.learned_groups) == len(self.scored.groups)


def sample(recipe: Sampled, problem: Problem, engine: Engine, step: int, clock: Clock) -> Drawn:
    """The groups of a step: prompts are drawn, completed and scored; with dynamic sampling, until enough groups have a signal."""

    def completed(prompts: Sequence[Prompt], *attempt: int) -> Scored:
        return complete(recipe, problem, engine, prompts, (recipe.seed, "train", step, *attempt), clock)

    scored = completed(draw(problem.task, recipe.prompts_per_step, seed=recipe.seed, step=step))
    if isinstance(recipe, GRPO) and recipe.dynamic_sampling.rounds:
        return Drawn(*until_signal(recipe, problem.task, step, scored, completed))
    return Drawn(scored, list(range(len(scored.groups))))


def complete(
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
