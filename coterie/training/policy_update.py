"""The policy's update on a batch of samples: the objective, corrected for the sampler, with KL and entropy.

Legend: N completion tokens of a stream, B its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from coterie.algorithms.aggregate import aggregate
from coterie.algorithms.kl import k3, kl_penalty
from coterie.algorithms.objectives import OBJECTIVES, Objective, TokenTerms, ratio_clipped
from coterie.algorithms.ratios import importance_weights
from coterie.distributed.reduce import sum_totals
from coterie.errors import UserError
from coterie.models.logprobs import TokenStatistics, token_statistics
from coterie.models.policy import Policy
from coterie.recipe import GRPO, Sampled
from coterie.recipe.objectives import Loss
from coterie.recipe.settings import Correction
from coterie.training.keywords import own_function
from coterie.training.metrics import Tally
from coterie.training.step import take_step
from coterie.types import BatchTotals, Stream


def load_objective(loss: Loss) -> Objective:
    """The objective that a recipe names, ours or the user's own, with its settings.

    Raises UserError where the user's function is missing, or asks for a keyword that is no setting of `loss`.
    """
    ours = OBJECTIVES.get(loss.objective)
    if ours is not None:
        clipped = partial(ours.clipped, **loss.keywords) if ours.clipped is not None else None
        return Objective(partial(ours.loss, **loss.keywords), clipped)
    own = own_function(loss.objective, "loss.objective", loss.model_dump())
    return Objective(own, partial(ratio_clipped, **loss.keywords))


def kl_weight_of(recipe: Sampled, weights: Mapping[str, float]) -> float:
    """The weight of the KL in the loss: none where it is taken off the rewards."""
    return 0.0 if recipe.kl_in_reward else weights["kl_weight"]


def holds_reference(recipe: Sampled, weights: Mapping[str, float]) -> bool:
    """Whether the loss compares the policy with the reference at every token."""
    return kl_weight_of(recipe, weights) > 0 or recipe.loss.needs_reference


def optimise(
    policy: Policy,
    optimiser: torch.optim.Optimizer,
    streams: Sequence[Stream],
    totals: BatchTotals,
    recipe: Sampled,
    weights: Mapping[str, float],
    *,
    objective: Objective | None = None,
    reference: Policy | None = None,
    reference_logprobs: Sequence[Tensor] | None = None,
    sampled_by_policy: bool = False,
    token_advantages: Sequence[Tensor] | None = None,
    gaps: list[Tensor] | None = None,
) -> Tally:
    """One or more optimiser steps on a batch of samples, cut into micro-batches in any way.

    `weights`: those of KL and entropy in this step, as `first_weights` gives them or a controller has moved them. `objective`: the
    one that the recipe names, unless given. `reference_logprobs`: [N] for each stream, needed where `holds_reference` says so;
    `reference` itself only for the exact KL. `token_advantages`: [N] for each stream, in place of the streams' own, one per row.
    `sampled_by_policy`: the samples come from these very weights. Then pi_old is what the first update computes, and the ratio
    starts at exactly 1; how far the sampler's own log-probabilities lie from it is the metric "policy/sampler_gap_max". A correction
    for the sampler makes pi_old the same, and weighs each token or row by how much likelier pi_old makes it than the sampler did.
    `gaps`: an empty list, which gets that distance for each token, [N] of each stream.
    """
    objective = objective or load_objective(recipe.loss)
    totals = sum_totals(totals)
    recompute = sampled_by_policy or correction_of(recipe) is not None
    tally, gaps = Tally(), gaps if gaps is not None else []
    old_logprobs = [stream.sampler_logprobs.to(policy.device) for stream in streams]
    for update in range(recipe.optimiser.updates_per_batch):
        losses: list[Tensor] = []

        def loss_of(number: int, stream: Stream, first: bool = update == 0, losses: list[Tensor] = losses) -> Tensor:
            found = _statistics(policy, stream, recipe, weights, reference)
            if first and recompute:
                old_logprobs[number] = found.logprobs.detach()
                gaps.append((old_logprobs[number] - stream.sampler_logprobs).abs())
                tally.add_maximum("policy/sampler_gap_max", gaps[-1])
            advantages = token_advantages[number] if token_advantages is not None else None
            held = reference_logprobs[number].to(policy.device) if reference_logprobs is not None else None
            terms = _terms(found.logprobs, old_logprobs[number], stream, advantages, held)
            per_token = _loss_per_token(terms, stream, recipe, weights, objective, found, tally)
            aggregation = recipe.loss.aggregation
            loss = aggregate(per_token, stream.row, stream.row_lengths, aggregation=aggregation, totals=totals)
            losses.append(loss.detach().double())
            _add_ratio_metrics(terms, objective, recipe.loss.keywords.get("ratio", "token"), tally)
            return loss

        tally.merge(take_step(optimiser, streams, loss_of, policy.device, recipe.optimiser.max_grad_norm))
        tally.add("loss/total", sum(losses))
    return tally


def _statistics(
    policy: Policy, stream: Stream, recipe: Sampled, weights: Mapping[str, float], reference: Policy | None
) -> TokenStatistics:
    """Log-probabilities, and what the entropy bonus and the exact KL need where they have a weight."""
    exact = kl_weight_of(recipe, weights) > 0 and recipe.kl.estimator == "exact"
    return token_statistics(
        policy,
        stream,
        temperature=recipe.sampling.temperature,
        entropy=weights["entropy_weight"] > 0,
        reference=reference if exact else None,
    )


def correction_of(recipe: Sampled) -> Correction | None:
    """How the samples are weighed for another sampler, if they are."""
    return recipe.correction if isinstance(recipe, GRPO) and recipe.correction.acts else None


def _terms(
    policy_logprobs: Tensor, old_logprobs: Tensor, stream: Stream, advantages: Tensor | None, held: Tensor | None
) -> TokenTerms:
    """What the objective sees of a stream. advantages [N]: in place of its rows'. held [N]: the reference's log-probabilities."""
    return TokenTerms(
        policy_logprobs=policy_logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages if advantages is not None else stream.advantages[stream.row],
        rewards=stream.rewards[stream.row],
        row=stream.row,
        num_rows=stream.num_rows,
        reference_logprobs=held,
    )


def _loss_per_token(
    terms: TokenTerms,
    stream: Stream,
    recipe: Sampled,
    weights: Mapping[str, float],
    objective: Objective,
    found: TokenStatistics,
    tally: Tally,
) -> Tensor:
    """The objective, corrected for the sampler; plus the KL, less the entropy, each with its weight: [N]."""
    per_token = _checked(objective.loss(terms), terms)
    correction, kl_weight = correction_of(recipe), kl_weight_of(recipe, weights)
    if correction is not None:
        importance = importance_weights(
            terms.old_logprobs,
            stream.sampler_logprobs,
            terms.row,
            terms.num_rows,
            level=correction.level,
            kind=correction.kind,
            limit=correction.limit,
        )
        tally.add_values("policy/correction_mean", importance)
        tally.add_values("policy/correction_cut_share", (importance == 0) | (importance >= correction.limit))
        per_token = importance * per_token
    if found.exact_kls is not None:
        per_token = per_token + kl_weight * found.exact_kls
    elif kl_weight:
        assert terms.reference_logprobs is not None
        penalty = kl_penalty(
            terms.policy_logprobs,
            terms.reference_logprobs,
            estimator=recipe.kl.estimator,
            old_logprobs=terms.old_logprobs,
        )
        per_token = per_token + kl_weight * penalty
    if found.entropies is not None:
        per_token = per_token - weights["entropy_weight"] * found.entropies
    return per_token


def _checked(per_token: Tensor, terms: TokenTerms) -> Tensor:
    """An objective's answer, which may be a user's: one loss per token."""
    if not isinstance(per_token, Tensor) or per_token.shape != terms.policy_logprobs.shape:
        given = tuple(per_token.shape) if isinstance(per_token, Tensor) else type(per_token).__name__
        wanted = tuple(terms.policy_logprobs.shape)
        raise UserError(f"loss.objective: returned {given}; a tensor with one loss per token, {wanted}, is needed")
    return per_token


@torch.no_grad()
def _add_ratio_metrics(terms: TokenTerms, objective: Objective, kind: str, tally: Tally) -> None:
    """How far the policy is from the one that sampled, by a kind of ratio, and how often each clip bound acts."""
    ratio = terms.ratio(kind)
    if objective.clipped is not None:
        at_low, at_high = objective.clipped(terms)
        tally.add_values("policy/clip_low_share", at_low)
        tally.add_values("policy/clip_high_share", at_high)
    tally.add_values("policy/ratio_mean", ratio)
    tally.add_maximum("policy/ratio_max", ratio)
    tally.add_values("policy/kl_to_sampler", k3(-terms.log_ratio))
