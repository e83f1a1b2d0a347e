"""The optimiser's side of training: schedules, one exact step over micro-batches, the policy update.

Legend: N completion tokens of a stream, B its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.algorithms.aggregate import aggregate
from coterie.algorithms.kl import k3, kl_penalty
from coterie.algorithms.objectives import clipped_at, clipped_loss
from coterie.algorithms.ratios import RATIOS
from coterie.models.logprobs import token_logprobs
from coterie.models.policy import Policy
from coterie.recipe import KL, ColdStart, Loss, Optimiser
from coterie.training.metrics import Tally
from coterie.types import BatchTotals, Stream


@dataclass(frozen=True)
class UpdateSettings:
    """What an update on one batch of samples needs to know."""

    loss: Loss
    kl_estimator: str = "k3"
    temperature: float = 1.0
    num_updates: int = 1
    max_grad_norm: float = 1.0

    @classmethod
    def of(cls, loss: Loss, kl: KL, temperature: float, optimiser: Optimiser) -> UpdateSettings:
        return cls(loss, kl.estimator, temperature, optimiser.updates_per_batch, optimiser.max_grad_norm)


def learning_rate_at(step: int, num_steps: int, settings: Optimiser | ColdStart) -> float:
    """The learning rate of a step, numbered from 1: linear warm-up, then the schedule down to `final_share`."""
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    done = (step - 1 - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps)
    final = getattr(settings, "final_share", 0.0)
    shapes = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    share = shapes[settings.schedule]
    return settings.learning_rate * (share if settings.schedule == "constant" else final + (1 - final) * share)


def make_optimiser(policy: Policy, settings: Optimiser | None = None) -> torch.optim.Optimizer:
    """AdamW over all parameters that are trained, in the model's order."""
    settings = settings or Optimiser()
    parameters = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=True,
    )


def optimise(
    policy: Policy,
    optimiser: torch.optim.Optimizer,
    streams: Sequence[Stream],
    totals: BatchTotals,
    settings: UpdateSettings,
    *,
    reference_logprobs: Sequence[Tensor] | None = None,
    sampled_by_policy: bool = False,
) -> Tally:
    """One or more optimiser steps on a batch of samples, cut into micro-batches in any way.

    `reference_logprobs`: [N] for each stream, needed where the KL has a weight. `sampled_by_policy`: the samples come from
    these very weights. Then pi_old is what the first update computes, and the ratio starts at exactly 1; how far the
    sampler's own log-probabilities lie from it, through rounding, is the metric "policy/sampler_gap_max".
    """
    tally = Tally()
    old_logprobs = [stream.sampler_logprobs.to(policy.device) for stream in streams]
    for update in range(settings.num_updates):
        losses: list[float] = []

        def loss_of(
            number: int,
            stream: Stream,
            policy_logprobs: Tensor,
            first: bool = update == 0,
            losses: list[float] = losses,
        ) -> Tensor:
            if first and sampled_by_policy:
                old_logprobs[number] = policy_logprobs.detach()
                tally.add_maximum("policy/sampler_gap_max", (old_logprobs[number] - stream.sampler_logprobs).abs())
            reference = reference_logprobs[number] if reference_logprobs is not None else None
            loss = _policy_loss(stream, policy_logprobs, old_logprobs[number], reference, totals, settings, tally)
            losses.append(loss.item())
            return loss

        tally.merge(take_step(policy, optimiser, streams, loss_of, settings.temperature, settings.max_grad_norm))
        tally.add("loss/total", sum(losses))
    return tally


def _policy_loss(
    stream: Stream,
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    totals: BatchTotals,
    settings: UpdateSettings,
    tally: Tally,
) -> Tensor:
    """This micro-batch's share of the loss of the optimiser step, and its metrics."""
    loss, row, row_lengths = settings.loss, stream.row, stream.row_lengths
    log_ratio = policy_logprobs - old_logprobs
    ratio = RATIOS[loss.ratio](log_ratio, row, stream.num_rows)  # [N]
    advantages = stream.advantages[row]  # [N]
    per_token = clipped_loss(ratio, advantages, low=loss.clip_low, high=loss.clip_high)
    if loss.kl_weight:
        assert reference_logprobs is not None
        penalty = kl_penalty(
            policy_logprobs, reference_logprobs, estimator=settings.kl_estimator, sampler_logprobs=old_logprobs
        )
        per_token = per_token + loss.kl_weight * penalty
    total = aggregate(per_token, row, row_lengths, aggregation=loss.aggregation, totals=totals)
    with torch.no_grad():
        low, high = clipped_at(ratio, advantages, low=loss.clip_low, high=loss.clip_high)
        tally.add_values("policy/clip_low_share", low)
        tally.add_values("policy/clip_high_share", high)
        tally.add_values("policy/ratio_mean", ratio)
        tally.add_maximum("policy/ratio_max", ratio)
        tally.add_values("policy/kl_to_sampler", k3(-log_ratio))
    return total


def take_step(
    policy: Policy,
    optimiser: torch.optim.Optimizer,
    streams: Sequence[Stream],
    loss_of: Callable[[int, Stream, Tensor], Tensor],
    temperature: float,
    max_grad_norm: float,
) -> Tally:
    """Backward over every micro-batch, clip the gradient's norm, step. `loss_of(number, stream, logprobs [N])` -> scalar.

    The gradient is the sum over micro-batches. A loss or gradient that is not finite never reaches the weights: the step
    is skipped and counted.
    """
    tally = Tally()
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for parameter in parameters:  # zeros and not None, so that a batch without signal is a step with no gradient
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
    finite = True
    for number, stream in enumerate(streams):
        on_device = stream.to(policy.device)
        loss = loss_of(number, on_device, token_logprobs(policy, on_device, temperature=temperature))
        finite = finite and bool(loss.isfinite())
        if not finite:
            break
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    finite = finite and bool(norm.isfinite())
    if finite:
        optimiser.step()
        tally.add("optimiser/grad_norm", norm)
    tally.add("optimiser/skipped_share", 0.0 if finite else 1.0)
    return tally


def set_learning_rate(optimiser: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = learning_rate


@torch.no_grad()
def reference_logprobs_of(reference: Policy, streams: Sequence[Stream], *, temperature: float) -> list[Tensor]:
    """The reference's log-probabilities of each stream's tokens: [N] each."""
    return [token_logprobs(reference, stream.to(reference.device), temperature=temperature) for stream in streams]
