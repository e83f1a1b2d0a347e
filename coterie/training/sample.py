"""The first half of a step: prompts -> completions -> rewards -> advantages, with what a recipe adds on the way.

Legend: P prompts, G completions per prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie.algorithms.advantages import has_signal
from coterie.algorithms.kl import ESTIMATORS
from coterie.algorithms.ratios import row_sum
from coterie.faults import strikes
from coterie.models.codec import Codec
from coterie.models.logprobs import logprobs_of, token_statistics
from coterie.models.policy import Policy
from coterie.recipe import Recipe
from coterie.recipe.settings import Advantage, Overlong
from coterie.rewards.base import Reward
from coterie.rewards.score import score
from coterie.rollouts.collect import collect
from coterie.rollouts.engine import Engine
from coterie.rollouts.pack import Row, make_stream, split_by_tokens
from coterie.sections import section
from coterie.stopping import may_stop
from coterie.tasks.base import Task, draw, draw_again
from coterie.training.metrics import Clock
from coterie.types import Group, RewardFailure, Scored, Stream


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


def sample_step(
    recipe: Recipe, task: Task, rewards: Sequence[Reward], codec: Codec, engine: Engine, step: int, clock: Clock
) -> Drawn:
    """Draw, sample and score the groups of a step.

    With `redraw.rounds` groups without signal are dropped and others drawn in their place, until there are enough or the
    rounds are spent. Where none has signal the last ones drawn are kept, and the step learns nothing from their rewards.
    """
    wanted = recipe.prompts_per_step
    scored: Scored | None = None
    kept: list[int] = []
    for attempt in range(recipe.redraw.rounds + 1):
        if attempt == 0:
            prompts = draw(task, wanted, seed=recipe.seed, step=step)
        else:
            prompts = draw_again(task, wanted - len(kept), seed=recipe.seed, step=step, attempt=attempt)
        noise = (recipe.seed, "train", step, *((attempt,) if attempt else ()))
        groups = collect(
            engine,
            prompts,
            codec,
            recipe.sampling,
            num_completions=recipe.group_size,
            noise=noise,
            begin=beginning(rewards, engine),
        )
        strikes("after_sample")
        may_stop()
        clock.lap("time/sample_seconds")
        new = score(groups, rewards, max_failed_share=recipe.max_failed_rewards)
        may_stop()
        new = with_overlong(new, recipe.overlong, recipe.sampling.max_new_tokens)
        clock.lap("time/score_seconds")
        start = len(scored.groups) if scored is not None else 0
        scored = _joined(scored, new) if scored is not None else new
        if recipe.redraw.rounds == 0:
            return Drawn(scored, list(range(len(scored.groups))))
        kept += [start + i for i in groups_with_signal(new, recipe.advantage).nonzero().flatten().tolist()]
        if len(kept) >= wanted:
            break
    assert scored is not None
    return Drawn(scored, kept or list(range(start, len(scored.groups))))


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


def with_overlong(scored: Scored, settings: Overlong, limit: int) -> Scored:
    """Completions at the length limit: as they are, abstaining, or with a reward that falls over the last tokens.

    Source: DAPO, arXiv 2503.14476, equation 13.
    """
    if settings.treatment == "keep":
        return scored
    completions = [completion for group in scored.groups for completion in group.completions]
    if settings.treatment == "leave_out":
        cut = torch.tensor([c.ended == "length" for c in completions]).view(scored.rewards.shape)
        return replace(scored, rewards=scored.rewards.masked_fill(cut, math.nan))
    margin = max(1.0, settings.margin * limit)
    lengths = torch.tensor([float(len(c.tokens)) for c in completions], dtype=torch.float64)
    too_long = ((lengths - (limit - margin)) / margin).clamp(0, 1)
    return with_part(scored, "overlong", (-settings.penalty * too_long).view(scored.rewards.shape))


@section("reference")
def with_kl(scored: Scored, policy: Policy, reference: Policy, recipe: Recipe, *, weight: float) -> Scored:
    """The KL to the reference in the reward: -weight * its sum over each completion, as a part of its own."""
    if not scored.valid.any():
        return scored
    streams = streams_of(scored, recipe.optimiser.micro_batch_tokens)
    temperature, estimator = recipe.sampling.temperature, recipe.kl.estimator
    reference_logprobs = logprobs_of(reference, streams, temperature=temperature) if estimator != "exact" else None
    found = kl_of(streams, policy, reference, reference_logprobs, estimator=estimator, temperature=temperature)
    sums = (row_sum(kl.cpu().double(), s.row, s.num_rows) for s, kl in zip(streams, found, strict=True))
    totals = iter(torch.cat(list(sums)).tolist())
    values = [next(totals) if valid else math.nan for valid in scored.valid.flatten().tolist()]
    return with_part(scored, "kl", -weight * torch.tensor(values, dtype=torch.float64).view(scored.rewards.shape))


@section("reference")
@torch.no_grad()
def kl_of(
    streams: Sequence[Stream],
    policy: Policy,
    reference: Policy,
    reference_logprobs: Sequence[Tensor] | None,
    *,
    estimator: str,
    temperature: float,
) -> list[Tensor]:
    """The KL of the policy that sampled to the reference at each token of each stream: [N] each, on the policy's device.

    reference_logprobs: [N] for each stream, which all but the exact KL are made of.
    """
    found = []
    for number, stream in enumerate(stream.to(policy.device) for stream in streams):
        if estimator == "exact":
            exact = token_statistics(policy, stream, temperature=temperature, reference=reference).exact_kls
            assert exact is not None
            found.append(exact)
        else:
            assert reference_logprobs is not None
            logprobs = reference_logprobs[number].to(policy.device)
            found.append(ESTIMATORS[estimator](logprobs - stream.sampler_logprobs))
    return found


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


def with_part(scored: Scored, name: str, values: Tensor) -> Scored:
    """Another part of the reward, [P, G], added to the sum where the completion has one."""
    return replace(scored, rewards=scored.rewards + values, parts={**scored.parts, name: values})


def _joined(first: Scored, second: Scored) -> Scored:
    """The groups of one, then those of the other."""
    shift = len(first.groups)
    failures = [RewardFailure(f.reward, f.group + shift, f.completion, f.reason) for f in second.failures]
    parts = {name: torch.cat([part, second.parts[name]]) for name, part in first.parts.items()}
    rewards = torch.cat([first.rewards, second.rewards])
    return Scored([*first.groups, *second.groups], rewards, parts, [*first.failures, *failures])
