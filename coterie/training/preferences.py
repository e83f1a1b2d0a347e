"""Learning from preference pairs: DPO and the reward model, a loop each.

A pair is a group of two on the stream: the prompt once, then the preferred completion, then the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coterie.algorithms.preferences import bradley_terry_loss, dpo_loss
from coterie.algorithms.ratios import row_sum
from coterie.distributed.reduce import sum_numbers
from coterie.evals.evaluate import Evaluation
from coterie.evals.statistics import grouped, share_interval
from coterie.models.heads import Scorer
from coterie.models.logprobs import logprobs_of, token_logprobs
from coterie.models.policy import Policy
from coterie.recipe import DPO, Recipe
from coterie.rollouts.engine import Engine
from coterie.rollouts.pack import PromptRows, Row, make_stream
from coterie.runs.checkpoint import TrainState
from coterie.sections import section
from coterie.tasks.base import Encoded, Task
from coterie.training.evaluation import evaluate_on_the_way
from coterie.training.metrics import Clock, Tally
from coterie.training.problem import Problem
from coterie.training.session import Session
from coterie.training.step import make_optimiser, set_learning_rate, take_step
from coterie.types import Stream


def train_dpo(run: Session, problem: Problem, policy: Policy, reference: Policy, engine: Engine) -> None:
    """The loop: pairs -> stream -> log-probabilities of policy and reference -> loss -> step. Nothing is sampled."""
    recipe = run.recipe
    assert isinstance(recipe, DPO)
    optimiser = make_optimiser(policy, recipe.optimiser)
    state = TrainState({"model": policy}, {"optimiser": (policy, optimiser)})
    run.restore("train", state)
    for step in run.remaining("train", recipe.steps):
        clock = Clock()
        pairs = problem.task.preferences(recipe.prompts_per_step, seed=recipe.seed, step=step)
        streams = pair_streams(pairs, recipe.optimiser.micro_batch_tokens)
        reference_logprobs = logprobs_of(reference, streams, temperature=1.0)
        learning_rate = set_learning_rate(optimiser, step, recipe.steps, recipe.optimiser)
        tally = fit_dpo(policy, optimiser, streams, reference_logprobs, recipe)
        clock.lap("time/train_seconds")
        metrics = {**tally.values(), "optimiser/learning_rate": learning_rate, **clock.seconds}
        run.recorder.record("train", step, metrics, rows=pairs, pieces=problem.codec.pieces)
        run.console.say(_line("dpo", step, recipe.steps, metrics))
        evaluate_on_the_way(run, problem, engine, step)
        run.checkpoint("train", step, state, last=step == recipe.steps)


def fit_dpo(
    policy: Policy,
    optimiser: torch.optim.Optimizer,
    streams: Sequence[Stream],
    reference_logprobs: Sequence[Tensor],
    recipe: DPO,
) -> Tally:
    """One optimiser step on the mean loss over all pairs."""
    tally, settings = Tally(), recipe.preference
    (num_pairs,) = sum_numbers(sum(stream.num_rows for stream in streams) / 2)

    def loss_of(number: int, stream: Stream) -> Tensor:
        differences = token_logprobs(policy, stream) - reference_logprobs[number]
        chosen, rejected = row_sum(differences, stream.row, stream.num_rows).view(-1, 2).unbind(1)  # [pairs]
        losses = dpo_loss(chosen, rejected, beta=settings.beta, label_smoothing=settings.label_smoothing)
        _add_pair_metrics(tally, losses, settings.beta * chosen.detach(), settings.beta * rejected.detach())
        return losses.sum() / num_pairs

    tally.merge(take_step(optimiser, streams, loss_of, policy.device, recipe.optimiser.max_grad_norm))
    return tally


def train_reward_model(run: Session, problem: Problem, scorer: Scorer) -> None:
    """The loop: pairs -> stream -> scores -> Bradley-Terry loss -> step."""
    recipe = run.recipe
    optimiser = make_optimiser(scorer, recipe.optimiser)
    state = TrainState({"model": scorer}, {"optimiser": (scorer, optimiser)})
    run.restore("train", state)
    for step in run.remaining("train", recipe.steps):
        clock = Clock()
        pairs = problem.task.preferences(recipe.prompts_per_step, seed=recipe.seed, step=step)
        streams = pair_streams(pairs, recipe.optimiser.micro_batch_tokens)
        learning_rate = set_learning_rate(optimiser, step, recipe.steps, recipe.optimiser)
        tally = fit_reward_model(scorer, optimiser, streams, recipe.optimiser.max_grad_norm)
        clock.lap("time/train_seconds")
        metrics = {**tally.values(), "optimiser/learning_rate": learning_rate, **clock.seconds}
        run.recorder.record("train", step, metrics, rows=pairs, pieces=problem.codec.pieces)
        run.console.say(_line("reward model", step, recipe.steps, metrics))
        if recipe.evaluation.every and step % recipe.evaluation.every == 0 and step < recipe.steps:
            run.recorder.record_evaluation("train", step, evaluate_pairs(scorer, problem.task, recipe))
        run.checkpoint("train", step, state, last=step == recipe.steps)


def fit_reward_model(
    scorer: Scorer, optimiser: torch.optim.Optimizer, streams: Sequence[Stream], max_grad_norm: float
) -> Tally:
    """One optimiser step on the mean loss over all pairs."""
    tally = Tally()
    (num_pairs,) = sum_numbers(sum(stream.num_rows for stream in streams) / 2)

    def loss_of(number: int, stream: Stream) -> Tensor:
        chosen, rejected = scorer.scores(stream).view(-1, 2).unbind(1)  # [pairs]
        losses = bradley_terry_loss(chosen, rejected)
        _add_pair_metrics(tally, losses, chosen.detach(), rejected.detach())
        return losses.sum() / num_pairs

    tally.merge(take_step(optimiser, streams, loss_of, scorer.device, max_grad_norm))
    return tally


@section("evaluate")
@torch.no_grad()
def evaluate_pairs(scorer: Scorer, task: Task, recipe: Recipe) -> Evaluation:
    """How many held-out pairs the scorer puts in the right order. Equal scores count as wrong."""
    pairs = task.heldout_preferences(recipe.evaluation.prompts, seed=recipe.seed)
    right: list[bool] = []
    for stream in pair_streams(pairs, recipe.optimiser.micro_batch_tokens):
        chosen, rejected = scorer.scores(stream.to(scorer.device)).view(-1, 2).unbind(1)
        right += (chosen > rejected).tolist()
    by_prompt = grouped((tuple(prompt) for prompt, _, _ in pairs), map(float, right))
    return Evaluation({"pairs": {"accuracy": share_interval(by_prompt)}} if right else {}, {"accuracy": right}, 1)


def pair_streams(pairs: Sequence[Encoded], micro_batch_tokens: int) -> list[Stream]:
    """Pairs as micro-batches, each pair whole; one that does not fit stands alone."""
    parts: list[list[PromptRows]] = []
    room = 0
    for prompt, chosen, rejected in pairs:
        num_tokens = len(prompt) + len(chosen) + len(rejected)
        if num_tokens > room:
            parts.append([])
            room = micro_batch_tokens
        parts[-1].append((prompt, [Row.written(chosen), Row.written(rejected)]))
        room -= num_tokens
    return [make_stream(part) for part in parts]


def _add_pair_metrics(tally: Tally, losses: Tensor, chosen: Tensor, rejected: Tensor) -> None:
    tally.add_values("loss/total", losses.detach())
    tally.add_values("preference/accuracy", chosen > rejected)
    tally.add_values("preference/margin", chosen - rejected)
    tally.add_values("preference/chosen", chosen)
    tally.add_values("preference/rejected", rejected)


def _line(method: str, step: int, num_steps: int, metrics: dict[str, float]) -> str:
    return (
        f"{method} {step}/{num_steps}  loss {metrics['loss/total']:.3f}  "
        f"pairs right {metrics['preference/accuracy']:.0%}  margin {metrics['preference/margin']:.2f}  "
        f"{metrics['time/step_seconds']:.2f} s"
    )
