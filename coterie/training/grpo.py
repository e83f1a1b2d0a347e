"""Group-relative policy optimisation: the loop.

sample (draw, collect, score) -> with_kl -> advantages_of -> pack -> update (token_statistics, objective, aggregate, take_step)

Each arrow is a line of the loop; the brackets name what that line calls.
"""

from __future__ import annotations

from functools import partial
from typing import TypedDict

from coterie.models.policy import Policy
from coterie.recipe import GRPO
from coterie.rollouts.engine import Engine
from coterie.rollouts.pack import pack
from coterie.runs.checkpoint import TrainState
from coterie.training.evaluation import evaluate_on_the_way
from coterie.training.formulas import make_advantages, make_objective
from coterie.training.gap import rounding_at_the_gap
from coterie.training.loss_weights import adapt, controlled, first_loss_weights
from coterie.training.metrics import Clock
from coterie.training.policy_update import holds_reference, optimise
from coterie.training.problem import Problem
from coterie.training.reference import move_reference
from coterie.training.sample import sample
from coterie.training.session import Session
from coterie.training.stages import with_kl
from coterie.training.step import make_optimiser, set_learning_rate
from coterie.training.step_metrics import grpo_metrics, metrics_line
from coterie.training.watch import watch_reference


def train_grpo(run: Session, problem: Problem, policy: Policy, reference: Policy, engine: Engine) -> None:
    """Every step samples, scores, updates, records, and where it is time evaluates and saves."""
    recipe = run.recipe
    assert isinstance(recipe, GRPO)
    objective, advantages_of = make_objective(recipe.loss), make_advantages(recipe, problem.rewards)
    optimiser, loss_weights = make_optimiser(policy, recipe.optimiser), first_loss_weights(recipe)
    update = partial(optimise, policy, optimiser, objective=objective, reference=reference, sampled_by_policy=True)
    moving = {"reference": reference} if recipe.reference.moves else {}
    state = TrainState({"model": policy, **moving}, {"optimiser": (policy, optimiser)}, loss_weights)
    run.restore("train", state)
    for step in run.remaining("train", recipe.steps):
        clock = Clock()
        drawn = sample(recipe, problem, engine, step, clock)
        scored = with_kl(drawn.learned, policy, reference, recipe, loss_weights["kl_weight"])
        advantages = advantages_of(scored)  # [P, G]
        streams, totals = pack(scored, advantages, **packing(recipe))
        in_loss = holds_reference(recipe, loss_weights)
        watched, logprobs = watch_reference(reference, recipe, scored, streams if in_loss else None, step)
        learning_rate = set_learning_rate(optimiser, step, recipe.steps, recipe.optimiser)
        tally, gaps = update(streams, totals, recipe, loss_weights, reference_logprobs=logprobs if in_loss else None)
        move_reference(reference, policy, recipe.reference, step)
        clock.lap("time/train_seconds")
        tally.merge(grpo_metrics(recipe, drawn, scored, watched, logprobs))
        rounding = rounding_at_the_gap(policy, streams, gaps, temperature=recipe.sampling.temperature)
        metrics = {**tally.values(), **rounding, **controlled(recipe, loss_weights, learning_rate), **clock.seconds}
        adapt(loss_weights, recipe, metrics)
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
