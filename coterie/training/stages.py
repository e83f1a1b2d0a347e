"""What a recipe adds between rewards and advantages: a reward that falls with length, the KL in the reward.

Legend: P prompts, G completions per prompt, N completion tokens of a stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from coterie.algorithms.kl import ESTIMATORS
from coterie.algorithms.ratios import row_sum
from coterie.models.logprobs import logprobs_of, token_statistics
from coterie.models.policy import Policy
from coterie.recipe import Sampled
from coterie.recipe.settings import Overlong
from coterie.sections import section
from coterie.training.watch import streams_of
from coterie.types import Scored, Stream


def with_overlong(scored: Scored, settings: Overlong, limit: int) -> Scored:
    """Completions at the length limit: as they are, abstaining, or with a reward that falls over the last tokens.

    Source: DAPO, arXiv 2503.14476, equation 13.
    """
    return _TREATMENTS[settings.treatment](scored, settings, limit)


def _left_out(scored: Scored, settings: Overlong, limit: int) -> Scored:
    cut = [c.ended == "length" for group in scored.groups for c in group.completions]
    return replace(scored, rewards=scored.rewards.masked_fill(torch.tensor(cut).view(scored.rewards.shape), math.nan))


def _punished(scored: Scored, settings: Overlong, limit: int) -> Scored:
    margin = max(1.0, settings.margin * limit)
    sizes = [float(len(c.tokens)) for group in scored.groups for c in group.completions]
    too_long = ((torch.tensor(sizes, dtype=torch.float64) - (limit - margin)) / margin).clamp(0, 1)
    return with_part(scored, "overlong", (-settings.penalty * too_long).view(scored.rewards.shape))


_TREATMENTS: dict[str, Callable[[Scored, Overlong, int], Scored]] = {
    "keep": lambda scored, settings, limit: scored,
    "leave_out": _left_out,
    "punish": _punished,
}


def with_kl(scored: Scored, policy: Policy, reference: Policy, recipe: Sampled, weight: float) -> Scored:
    """The KL to the reference in the reward, where a recipe has it there: -weight * its sum over each completion, a part of its own."""
    if not recipe.kl_in_reward or not scored.valid.any():
        return scored
    streams = streams_of(scored, recipe.optimiser.micro_batch_tokens)
    temperature, estimator = recipe.sampling.temperature, recipe.kl.estimator
    with section("reference"):
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


def with_part(scored: Scored, name: str, values: Tensor) -> Scored:
    """Another part of the reward, [P, G], added to the sum where the completion has one."""
    return replace(scored, rewards=scored.rewards + values, parts={**scored.parts, name: values})
