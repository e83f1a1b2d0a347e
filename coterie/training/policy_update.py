"""The policy's update on a batch of samples: the objective, corrected for the sampler, with KL and entropy.

Legend: N completion tokens of a stream, B its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from coterie.algorithms.aggregate import aggregate
from coterie.algorithms.clip import Objective, TokenTerms
from coterie.algorithms.kl import kl_penalty
from coterie.distributed.reduce import sum_totals
from coterie.models.logprobs import TokenStatistics, token_statistics
from coterie.models.policy import Policy
from coterie.recipe import Sampled
from coterie.training.correction import corrected, correction_of
from coterie.training.formulas import make_objective
from coterie.training.metrics import Tally
from coterie.training.step import take_step
from coterie.training.step_metrics import add_ratio_metrics
from coterie.types import BatchTotals, Stream


def kl_weight_of(recipe: Sampled, loss_weights: Mapping[str, float]) -> float:
    """The weight of the KL in the loss: none where it is taken off the rewards."""
    return 0.0 if recipe.kl_in_reward else loss_weights["kl_weight"]


def holds_reference(recipe: Sampled, loss_weights: Mapping[str, float]) -> bool:
    """Whether the loss compares the policy with the reference at every token."""
    return kl_weight_of(recipe, loss_weights) > 0 or recipe.loss.needs_reference


@dataclass(frozen=True)
class Update:
    """What the loss of every micro-batch of a batch needs beside its stream: the arguments of `optimise`, and the step's totals."""

    policy: Policy
    recipe: Sampled
    loss_weights: Mapping[str, float]
    objective: Objective
    totals: BatchTotals
    reference: Policy | None
    reference_logprobs: Sequence[Tensor] | None
    token_advantages: Sequence[Tensor] | None


def optimise(
    policy: Policy,
    optimiser: torch.optim.Optimizer,
    streams: Sequence[Stream],
    totals: BatchTotals,
    recipe: Sampled,
    loss_weights: Mapping[str, float],
    *,
    objective: Objective | None = None,
    reference: Policy | None = None,
    reference_logprobs: Sequence[Tensor] | None = None,
    sampled_by_policy: bool = False,
    token_advantages: Sequence[Tensor] | None = None,
) -> tuple[Tally, list[Tensor]]:
    """One or more optimiser steps on a batch of samples, cut into micro-batches in any way.

    `loss_weights`: those of KL and entropy in this step, as `first_loss_weights` gives them or a controller has moved them.
    `objective`: the one that the recipe names, unless given. `reference_logprobs`: [N] for each stream, needed where
    `holds_reference` says so; `reference` itself only for the exact KL. `token_advantages`: [N] for each stream, in place of the
    streams' own, one per row. `sampled_by_policy`: pi_old is what these weights give before the first update, so its ratio is 1;
    else it is what the sampler recorded. A correction for the sampler makes pi_old the former, and weighs each token or row by how
    much likelier pi_old makes it than the sampler did.

    Returns the metrics, and where pi_old is the trainer's how far it lies from what the sampler recorded: [N] of each stream.
    """
    totals = sum_totals(totals)
    objective = objective or make_objective(recipe.loss)
    update = Update(policy, recipe, loss_weights, objective, totals, reference, reference_logprobs, token_advantages)
    tally, gaps = Tally(), list[Tensor]()
    own_old = sampled_by_policy or correction_of(recipe) is not None
    old_logprobs = None if own_old else [stream.sampler_logprobs.to(policy.device) for stream in streams]
    for _ in range(recipe.optimiser.updates_per_batch):
        losses, before = list[Tensor](), list[Tensor]()  # before: the policy's log-probabilities, [N] of each stream
        loss_of = partial(loss_of_stream, update, old_logprobs, tally, losses, before)
        tally.merge(take_step(optimiser, streams, loss_of, policy.device, recipe.optimiser.max_grad_norm))
        tally.add("loss/total", sum(losses))
        if old_logprobs is None:
            old_logprobs = before
            for old, stream in zip(old_logprobs, streams, strict=True):
                gaps.append((old - stream.sampler_logprobs.to(policy.device)).abs())
                tally.add_maximum("policy/sampler_gap_max", gaps[-1])
    return tally, gaps


def loss_of_stream(
    update: Update,
    old_logprobs: Sequence[Tensor] | None,
    tally: Tally,
    losses: list[Tensor],
    before: list[Tensor],
    number: int,
    stream: Stream,
) -> Tensor:
    """What a micro-batch adds to the loss of the step: a scalar. It is added to `losses`, and the policy's log-probabilities to `before`.

    old_logprobs: [N] of each stream; None where they are the policy's own, as they are now.
    """
    found = _statistics(update, stream)
    before.append(found.logprobs.detach())
    old = old_logprobs[number] if old_logprobs is not None else before[-1]
    terms = _terms(update, number, stream, found.logprobs, old)
    per_token = _loss_per_token(update, stream, terms, found, tally)  # [N]
    loss_settings = update.recipe.loss
    loss = aggregate(
        per_token, stream.row, stream.row_lengths, aggregation=loss_settings.aggregation, totals=update.totals
    )
    losses.append(loss.detach().double())
    add_ratio_metrics(tally, terms, update.objective, loss_settings.keywords.get("ratio", "token"))
    return loss


def _statistics(update: Update, stream: Stream) -> TokenStatistics:
    """Log-probabilities, and what the entropy bonus and the exact KL need where they have a weight."""
    recipe, loss_weights = update.recipe, update.loss_weights
    exact = kl_weight_of(recipe, loss_weights) > 0 and recipe.kl.estimator == "exact"
    return token_statistics(
        update.policy,
        stream,
        temperature=recipe.sampling.temperature,
        entropy=loss_weights["entropy_weight"] > 0,
        reference=update.reference if exact else None,
    )


def _terms(update: Update, number: int, stream: Stream, policy_logprobs: Tensor, old_logprobs: Tensor) -> TokenTerms:
    """What the objective sees of a stream."""
    advantages, reference_logprobs = update.token_advantages, update.reference_logprobs
    return TokenTerms(
        policy_logprobs=policy_logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages[number] if advantages is not None else stream.advantages[stream.row],
        rewards=stream.rewards[stream.row],
        row=stream.row,
        num_rows=stream.num_rows,
        reference_logprobs=None if reference_logprobs is None else reference_logprobs[number].to(old_logprobs.device),
    )


def _loss_per_token(update: Update, stream: Stream, terms: TokenTerms, found: TokenStatistics, tally: Tally) -> Tensor:
    """The objective, corrected for the sampler; plus the KL, less the entropy, each with its weight: [N]."""
    per_token = update.objective.loss(terms)
    correction, kl_weight = correction_of(update.recipe), kl_weight_of(update.recipe, update.loss_weights)
    if correction is not None:
        per_token = corrected(per_token, terms, stream, correction, tally)
    if found.exact_kls is not None:
        per_token = per_token + kl_weight * found.exact_kls
    elif kl_weight:
        assert terms.reference_logprobs is not None
        estimator = update.recipe.kl.estimator
        penalty = kl_penalty(
            terms.policy_logprobs, terms.reference_logprobs, estimator=estimator, old_logprobs=terms.old_logprobs
        )
        per_token = per_token + kl_weight * penalty
    if found.entropies is not None:
        per_token = per_token - update.loss_weights["entropy_weight"] * found.entropies
    return per_token
