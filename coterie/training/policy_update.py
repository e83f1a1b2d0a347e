"""The policy's update on a batch of samples: the objective, corrected for the sampler, with KL and entropy.

Legend: N completion tokens of a stream, B its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coterie.algorithms.aggregate import aggregate
from coterie.algorithms.kl import k3, kl_penalty
from coterie.algorithms.objectives import OBJECTIVES, TokenTerms, clipped_at
from coterie.algorithms.ratios import importance_weights
from coterie.distributed.reduce import sum_totals
from coterie.errors import UserError
from coterie.models.logprobs import token_statistics
from coterie.models.policy import Policy
from coterie.recipe import Recipe
from coterie.recipe.settings import KL, Correction, Loss
from coterie.training.keywords import chosen_keywords
from coterie.training.metrics import Tally
from coterie.training.step import take_step
from coterie.types import BatchTotals, Stream
from coterie.user_code import load_function

Objective = Callable[[TokenTerms], Tensor]


@dataclass(frozen=True)
class UpdateSettings:
    """What an update on one batch of samples needs to know.

    kl_weight, entropy_weight: those of this step, which a controller may have moved. The KL's acts here only where its place
    is the loss.
    """

    loss: Loss
    kl: KL = field(default_factory=KL)
    kl_weight: float = 0.0
    entropy_weight: float = 0.0
    correction: Correction = field(default_factory=Correction)
    temperature: float = 1.0
    num_updates: int = 1
    max_grad_norm: float = 1.0

    @classmethod
    def of(cls, recipe: Recipe, *, kl_weight: float, entropy_weight: float, temperature: float) -> UpdateSettings:
        optimiser = recipe.optimiser
        return cls(
            recipe.loss,
            recipe.kl,
            kl_weight if recipe.kl.place == "loss" else 0.0,
            entropy_weight,
            recipe.correction,
            temperature,
            optimiser.updates_per_batch,
            optimiser.max_grad_norm,
        )

    @property
    def holds_reference(self) -> bool:
        """Whether the loss compares the policy with the reference at every token."""
        return self.kl_weight > 0 or self.loss.objective == "anchored"

    @property
    def exact_kl(self) -> bool:
        return self.kl_weight > 0 and self.kl.estimator == "exact"


def load_objective(loss: Loss) -> Objective:
    """The objective that a recipe names, ours or the user's own, with those of the `loss` settings that it takes as keywords.

    Raises UserError where the user's function is missing, or asks for a keyword that is no such setting.
    """
    function = OBJECTIVES.get(loss.objective)
    if function is None:
        function = load_function(loss.objective, "loss.objective")
    keywords = chosen_keywords(function, loss.model_dump(), f"loss.objective: {loss.objective}")
    return lambda terms: function(terms, **keywords)


def optimise(
    policy: Policy,
    optimiser: torch.optim.Optimizer,
    streams: Sequence[Stream],
    totals: BatchTotals,
    settings: UpdateSettings,
    *,
    objective: Objective | None = None,
    reference: Policy | None = None,
    reference_logprobs: Sequence[Tensor] | None = None,
    sampled_by_policy: bool = False,
    token_advantages: Sequence[Tensor] | None = None,
    gaps: list[Tensor] | None = None,
) -> Tally:
    """One or more optimiser steps on a batch of samples, cut into micro-batches in any way.

    `objective`: the one that `settings` names, unless given. `reference_logprobs`: [N] for each stream, needed where the KL
    has a weight in the loss and where the objective asks for them; `reference` itself only for the exact KL.
    `token_advantages`: [N] for each stream, in place of the streams' own, one per row.
    `sampled_by_policy`: the samples come from these very weights. Then pi_old is what the first update computes, and the
    ratio starts at exactly 1; how far the sampler's own log-probabilities lie from it is the metric
    "policy/sampler_gap_max". A correction for the sampler makes pi_old the same, and weighs each token or row by how much
    likelier pi_old makes it than the sampler did. `gaps`: an empty list, which gets that distance for each token, [N] of each
    stream.
    """
    objective = objective or load_objective(settings.loss)
    totals = sum_totals(totals)
    recompute = sampled_by_policy or settings.correction.kind != "none"
    tally = Tally()
    old_logprobs = [stream.sampler_logprobs.to(policy.device) for stream in streams]
    for update in range(settings.num_updates):
        losses: list[Tensor] = []

        def loss_of(number: int, stream: Stream, first: bool = update == 0, losses: list[Tensor] = losses) -> Tensor:
            statistics = token_statistics(
                policy,
                stream,
                temperature=settings.temperature,
                entropy=settings.entropy_weight > 0,
                reference=reference if settings.exact_kl else None,
            )
            if first and recompute:
                old_logprobs[number] = statistics.logprobs.detach()
                gap = (old_logprobs[number] - stream.sampler_logprobs).abs()
                tally.add_maximum("policy/sampler_gap_max", gap)
                if gaps is not None:
                    gaps.append(gap)
            of_rows = stream.row
            given = token_advantages[number] if token_advantages is not None else None
            terms = TokenTerms(
                policy_logprobs=statistics.logprobs,
                old_logprobs=old_logprobs[number],
                advantages=given if given is not None else stream.advantages[of_rows],
                rewards=stream.rewards[of_rows],
                row=of_rows,
                num_rows=stream.num_rows,
                reference_logprobs=(
                    reference_logprobs[number].to(policy.device) if reference_logprobs is not None else None
                ),
            )
            per_token = _loss_per_token(
                terms, stream, settings, objective, statistics.entropies, statistics.exact_kls, tally
            )
            aggregation = settings.loss.aggregation
            loss = aggregate(per_token, of_rows, stream.row_lengths, aggregation=aggregation, totals=totals)
            losses.append(loss.detach().double())
            _add_ratio_metrics(terms, settings, tally)
            return loss

        tally.merge(take_step(optimiser, streams, loss_of, policy.device, settings.max_grad_norm))
        tally.add("loss/total", sum(losses))
    return tally


def _loss_per_token(
    terms: TokenTerms,
    stream: Stream,
    settings: UpdateSettings,
    objective: Objective,
    entropies: Tensor | None,
    exact_kls: Tensor | None,
    tally: Tally,
) -> Tensor:
    """The objective, corrected for the sampler; plus the KL, less the entropy, each with its weight: [N]."""
    per_token = _checked(objective(terms), terms)
    if settings.correction.kind != "none":
        correction = settings.correction
        weights = importance_weights(
            terms.old_logprobs,
            stream.sampler_logprobs,
            terms.row,
            terms.num_rows,
            level=correction.level,
            kind=correction.kind,
            limit=correction.limit,
        )
        tally.add_values("policy/correction_mean", weights)
        tally.add_values("policy/correction_cut_share", (weights == 0) | (weights >= correction.limit))
        per_token = weights * per_token
    if exact_kls is not None:
        per_token = per_token + settings.kl_weight * exact_kls
    elif settings.kl_weight:
        assert terms.reference_logprobs is not None
        penalty = kl_penalty(
            terms.policy_logprobs,
            terms.reference_logprobs,
            estimator=settings.kl.estimator,
            sampler_logprobs=terms.old_logprobs,
        )
        per_token = per_token + settings.kl_weight * penalty
    if entropies is not None:
        per_token = per_token - settings.entropy_weight * entropies
    return per_token


def _checked(per_token: Tensor, terms: TokenTerms) -> Tensor:
    """An objective's answer, which may be a user's: one loss per token."""
    if not isinstance(per_token, Tensor) or per_token.shape != terms.policy_logprobs.shape:
        given = tuple(per_token.shape) if isinstance(per_token, Tensor) else type(per_token).__name__
        wanted = tuple(terms.policy_logprobs.shape)
        raise UserError(f"loss.objective: returned {given}; a tensor with one loss per token, {wanted}, is needed")
    return per_token


@torch.no_grad()
def _add_ratio_metrics(terms: TokenTerms, settings: UpdateSettings, tally: Tally) -> None:
    """How far the policy is from the one that sampled, and how often each clip bound acts."""
    loss = settings.loss
    ratio = terms.ratio(loss.ratio)
    low, high = terms.bounds(loss.clip_bounds, loss.clip_low, loss.clip_high)
    if loss.objective == "gmpo":  # its bounds are on the logarithm
        at_low, at_high = clipped_at(1 + terms.log_ratio, terms.advantages, low=low, high=high)
    elif loss.objective == "cispo":  # a bound holds the weight, whatever the advantage's sign
        at_low, at_high = ratio < 1 - low, ratio > 1 + high
    else:
        at_low, at_high = clipped_at(ratio, terms.advantages, low=low, high=high)
    if loss.objective in ("clip", "dual_clip", "cispo", "gmpo") or ":" in loss.objective:
        tally.add_values("policy/clip_low_share", at_low)
        tally.add_values("policy/clip_high_share", at_high)
    tally.add_values("policy/ratio_mean", ratio)
    tally.add_maximum("policy/ratio_max", ratio)
    tally.add_values("policy/kl_to_sampler", k3(-terms.log_ratio))
