"""Proximal policy optimisation with a trained value model: the loop.

It differs from GRPO's in one thing: what a token's advantage is measured against. There the group's mean, here what a second
model, trained beside the policy, expected at that token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from coterie.algorithms.advantages import has_signal
from coterie.algorithms.values import clipped_value_loss, generalised_advantages
from coterie.distributed.reduce import sum_numbers, sum_totals
from coterie.models.heads import Scorer
from coterie.models.logprobs import logprobs_of
from coterie.models.policy import Policy
from coterie.recipe import PPO
from coterie.rollouts.engine import Engine
from coterie.rollouts.pack import pack
from coterie.runs.checkpoint import TrainState
from coterie.sections import section
from coterie.training.evaluation import evaluate_on_the_way
from coterie.training.formulas import make_objective
from coterie.training.gap import rounding_at_the_gap
from coterie.training.loss_weights import adapt, controlled, first_loss_weights
from coterie.training.metrics import Clock, Tally
from coterie.training.policy_update import optimise
from coterie.training.problem import Problem
from coterie.training.sample import sample
from coterie.training.session import Session
from coterie.training.stages import kl_of
from coterie.training.step import make_optimiser, set_learning_rate, take_step
from coterie.training.step_metrics import divergence_metrics, metrics_line, rollout_metrics
from coterie.types import BatchTotals, Stream


def train_ppo(run: Session, problem: Problem, policy: Policy, reference: Policy, engine: Engine) -> None:
    """Every step samples, scores, values, updates both models, records, and where it is time evaluates and saves."""
    recipe, temperature = run.recipe, run.recipe.sampling.temperature
    assert isinstance(recipe, PPO)
    objective = make_objective(recipe.loss)
    value, loss_weights = Scorer.from_policy(reference), first_loss_weights(recipe)
    optimiser = make_optimiser(policy, recipe.optimiser)
    value_optimiser = make_optimiser(value, recipe.optimiser, recipe.value.learning_rate)
    update = partial(optimise, policy, optimiser, objective=objective, reference=reference, sampled_by_policy=True)
    state = TrainState(
        {"model": policy, "value": value},
        {"optimiser": (policy, optimiser), "value_optimiser": (value, value_optimiser)},
        loss_weights,
    )
    run.restore("train", state)
    for step in run.remaining("train", recipe.steps):
        clock, tally, gaps = Clock(), Tally(), list[Tensor]()
        scored = sample(recipe, problem, engine, step, clock).scored
        streams, totals = pack(
            scored,
            torch.zeros_like(scored.rewards),
            max_length=recipe.sampling.max_new_tokens,
            micro_batch_tokens=recipe.optimiser.micro_batch_tokens,
            drop_silent=False,
        )
        reference_logprobs = logprobs_of(reference, streams, temperature=temperature)
        penalties = penalties_of(streams, policy, reference, reference_logprobs, recipe, loss_weights["kl_weight"])
        old_values = [values_of(value, stream) for stream in streams]
        advantages, returns = advantages_and_returns(streams, old_values, penalties, recipe)
        learning_rate = set_learning_rate(optimiser, step, recipe.steps, recipe.optimiser)
        if step > recipe.value.warmup_steps:
            given = {"reference_logprobs": reference_logprobs, "token_advantages": whitened(advantages)}
            tally, gaps = update(streams, totals, recipe, loss_weights, **given)
        tally.merge(fit_values(value, value_optimiser, streams, totals, old_values, returns, recipe))
        clock.lap("time/train_seconds")
        tally.merge(
            rollout_metrics(scored, has_signal(scored.rewards)), divergence_metrics(streams, reference_logprobs)
        )
        rounding = rounding_at_the_gap(policy, streams, gaps, temperature=temperature)
        metrics = {**tally.values(), **rounding, **controlled(recipe, loss_weights, learning_rate), **clock.seconds}
        adapt(loss_weights, recipe, metrics)
        of_rows = mean_of_rows(scored.valid, streams, advantages)
        run.recorder.record("train", step, metrics, scored, of_rows, problem.codec.pieces)
        run.console.say(metrics_line("ppo", step, recipe.steps, metrics, scored.parts))
        evaluate_on_the_way(run, problem, engine, step)
        run.checkpoint("train", step, state, last=step == recipe.steps)


def penalties_of(
    streams: Sequence[Stream],
    policy: Policy,
    reference: Policy,
    reference_logprobs: Sequence[Tensor],
    recipe: PPO,
    weight: float,
) -> list[Tensor] | None:
    """What the KL takes off the reward at each token, [N] of each stream; None where the recipe has none there."""
    if not recipe.kl_in_reward:
        return None
    estimator, temperature = recipe.kl.estimator, recipe.sampling.temperature
    kls = kl_of(streams, policy, reference, reference_logprobs, estimator=estimator, temperature=temperature)
    return [weight * kl for kl in kls]


@section("value")
@torch.no_grad()
def values_of(value: Scorer, stream: Stream) -> Tensor:
    """What the value model expects before each token: [N]."""
    return value.values(stream.to(value.device))


def advantages_and_returns(
    streams: Sequence[Stream], values: Sequence[Tensor], penalties: Sequence[Tensor] | None, recipe: PPO
) -> tuple[list[Tensor], list[Tensor]]:
    """Per token: the completion's reward at its last token, less the KL's penalty at each; then GAE. [N] each."""
    advantages, returns = [], []
    for number, stream in enumerate(streams):
        stream = stream.to(values[number].device)
        lengths = stream.row_lengths
        token_rewards = torch.zeros_like(values[number]) if penalties is None else -penalties[number].float()
        token_rewards[lengths.cumsum(0) - 1] += stream.rewards
        of_stream = generalised_advantages(
            token_rewards, values[number], lengths, discount=recipe.value.discount, gae_lambda=recipe.value.gae_lambda
        )
        advantages.append(of_stream[0])
        returns.append(of_stream[1])
    return advantages, returns


def whitened(advantages: Sequence[Tensor], epsilon: float = 1e-8) -> list[Tensor]:
    """Mean 0 and std 1 over all tokens of the step, of all processes."""
    count, total = sum_numbers(sum(len(a) for a in advantages), sum(a.double().sum().item() for a in advantages))
    mean = total / max(1, count)
    (squares,) = sum_numbers(sum((a.double() - mean).square().sum().item() for a in advantages))
    std = math.sqrt(squares / max(1, count - 1))
    return [((a.double() - mean) / (std + epsilon)).to(a.dtype) for a in advantages]


@section("value")
def fit_values(
    value: Scorer,
    optimiser: torch.optim.Optimizer,
    streams: Sequence[Stream],
    totals: BatchTotals,
    old_values: Sequence[Tensor],
    returns: Sequence[Tensor],
    recipe: PPO,
) -> Tally:
    """As many steps of the value model as the policy takes, on the mean clipped squared error of every token."""
    tally = Tally()
    totals = sum_totals(totals)
    for _ in range(recipe.optimiser.updates_per_batch):
        losses: list[Tensor] = []

        def loss_of(number: int, stream: Stream, losses: list[Tensor] = losses) -> Tensor:
            values = value.values(stream)
            per_token = clipped_value_loss(values, old_values[number], returns[number], clip=recipe.value.clip)
            loss = per_token.sum() / totals.num_tokens
            losses.append(loss.detach().double())
            return loss

        step = take_step(optimiser, streams, loss_of, value.device, recipe.optimiser.max_grad_norm)
        tally.add("value/skipped_share", step.sums["optimiser/skipped_share"])
        tally.add("value/loss", sum(losses))
    if not streams:
        return tally
    target, guess = torch.cat(list(returns)).double(), torch.cat(list(old_values)).double()
    if len(target) > 1 and target.var() > 0:
        tally.add("value/explained_variance", 1 - (target - guess).var() / target.var())
    tally.add_values("value/mean", guess)
    return tally


def mean_of_rows(valid: Tensor, streams: Sequence[Stream], advantages: Sequence[Tensor]) -> Tensor:
    """Each completion's mean advantage, for the record: [P, G], 0 where it abstained."""
    means = [
        torch.zeros(s.num_rows, dtype=torch.float64).index_add(0, s.row, a.cpu().double()) / s.row_lengths
        for s, a in zip(streams, advantages, strict=True)
    ]
    whole = torch.zeros(valid.shape, dtype=torch.float64)
    if means:
        whole[valid] = torch.cat(means)
    return whole
