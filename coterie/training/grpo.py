"""Group-relative policy optimisation: the loop.

prompts -> completions -> rewards -> advantages -> stream -> log-probabilities -> objective -> weights, a line each.
"""

from __future__ import annotations

from functools import partial
from typing import TypedDict

from torch import Tensor

from coterie.models.policy import Policy
from coterie.recipe import GRPO
from coterie.rollouts.engine import Engine
from coterie.rollouts.pack import pack
from coterie.runs.checkpoint import TrainState
from coterie.training.advantages import load_advantages
from coterie.training.evaluation import evaluate_on_the_way
from coterie.training.gap import rounding_at_the_gap
from coterie.training.metrics import Clock
from coterie.training.policy_update import holds_reference, load_objective, optimise
from coterie.training.problem import Problem
from coterie.training.reference import move_reference, watch_reference
from coterie.training.sample import groups_with_signal, sampling
from coterie.training.session import Session
from coterie.training.stages import kl_stage
from coterie.training.step import make_optimiser, set_learning_rate
from coterie.training.step_metrics import (
    divergence_metrics,
    dynamic_sampling_metrics,
    metrics_line,
    penalty_metrics,
    rollout_metrics,
)
from coterie.training.weights import adapt, controlled, first_weights


def train_grpo(run: Session, problem: Problem, policy: Policy, reference: Policy, engine: Engine) -> None:
    """Every step samples, scores, updates, records, and where it is time evaluates and saves."""
    recipe, temperature = run.recipe, run.recipe.sampling.temperature
    assert isinstance(recipe, GRPO)
    objective, advantages_of = load_objective(recipe.loss), load_advantages(recipe, problem.rewards)
    sample, with_kl = sampling(recipe, problem, engine), kl_stage(recipe, policy, reference)
    optimiser, weights = make_optimiser(policy, recipe.optimiser), first_weights(recipe)
    update = partial(optimise, policy, optimiser, objective=objective, reference=reference, sampled_by_policy=True)
    moving = {"reference": reference} if recipe.reference.moves else {}
    state = TrainState({"model": policy, **moving}, {"optimiser": (policy, optimiser)}, weights)
    run.restore("train", state)
    for step in run.remaining("train", recipe.steps):
        clock, gaps = Clock(), list[Tensor]()
        drawn = sample(step, clock)
        scored = with_kl(drawn.learned, weights["kl_weight"])
        advantages = advantages_of(scored)  # [P, G]
        streams, totals = pack(scored, advantages, **packing(recipe))
        watched = watch_reference(reference, recipe, scored, streams, step, held=holds_reference(recipe, weights))
        learning_rate = set_learning_rate(optimiser, step, recipe.steps, recipe.optimiser)
        tally = update(streams, totals, recipe, weights, reference_logprobs=watched.held, gaps=gaps)
        move_reference(reference, policy, recipe.reference, step)
        clock.lap("time/train_seconds")
        tally.merge(rollout_metrics(drawn.scored, groups_with_signal(drawn.scored, recipe.advantage)))
        tally.merge(dynamic_sampling_metrics(drawn), penalty_metrics(scored))
        tally.merge(divergence_metrics(watched.streams, watched.logprobs))
        rounding = rounding_at_the_gap(policy, streams, gaps, temperature=temperature)
        metrics = {**tally.values(), **rounding, **controlled(recipe, weights, learning_rate), **clock.seconds}
        adapt(weights, recipe, metrics)
        run.recorder.record(
            "train", step, metrics, drawn.recorded(scored), drawn.spread(advantages), problem.codec.pieces
        )
        run.console.say(metrics_line("grpo", step, recipe.steps, metrics, scored.parts))
        evaluate_on_the_way(run, problem, engine, step)
        run.checkpoint("train", step, state, last=step == recipe.steps)


class Packing(TypedDict):
    """How scored groups are cut into streams: the keywords of `pack`."""

    max_length: int
    micro_batch_tokens: int
    drop_silent: bool


def packing(recipe: GRPO) -> Packing:
    """A completion whose advantage is 0 is dropped where nothing else gives it a gradient."""
    return {
        "max_length": recipe.sampling.max_new_tokens,
        "micro_batch_tokens": recipe.optimiser.micro_batch_tokens,
        "drop_silent": only_advantages_act(recipe),
    }


def only_advantages_act(recipe: GRPO) -> bool:
    """Whether a completion whose advantage is 0 has no gradient at all, so that it can be left out."""
    loss, entropy = recipe.loss, recipe.entropy
    return loss.by_advantage and not loss.kl_weight and not entropy.weight and entropy.target is None
