"""Supervised fine-tuning on a task's demonstrations: the cold start, or a method of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.algorithms.aggregate import aggregate
from coterie.distributed.reduce import sum_totals
from coterie.models.logprobs import token_logprobs
from coterie.models.policy import Policy
from coterie.recipe.settings import ColdStart
from coterie.rollouts.pack import Row, make_stream, split_by_tokens
from coterie.runs.checkpoint import TrainState
from coterie.training.metrics import Tally
from coterie.training.problem import Problem
from coterie.training.session import Session
from coterie.training.step import make_optimiser, set_learning_rate, take_step
from coterie.types import BatchTotals, Stream


def train_sft(run: Session, problem: Problem, policy: Policy, *, stage: str, settings: ColdStart) -> None:
    """The loop: demonstrations -> stream -> log-probabilities -> mean negative log-likelihood -> step."""
    recipe = run.recipe
    optimiser = make_optimiser(policy, recipe.optimiser)
    state = TrainState({"model": policy}, {"optimiser": (policy, optimiser)})
    run.restore(stage, state)
    for step in run.remaining(stage, settings.steps):
        pairs = problem.task.demonstrations(settings.rows_per_step, seed=recipe.seed, step=step)
        groups = [(prompt, [Row.written(answer)]) for prompt, answer in pairs]
        streams = [make_stream(part) for part in split_by_tokens(groups, recipe.optimiser.micro_batch_tokens)]
        learning_rate = set_learning_rate(optimiser, step, settings.steps, settings)
        tally = fit(policy, optimiser, streams, max_grad_norm=recipe.optimiser.max_grad_norm)
        metrics = {**tally.values(), "optimiser/learning_rate": learning_rate}
        run.recorder.record(stage, step, metrics, rows=pairs, pieces=problem.codec.pieces)
        if step == 1 or step % 20 == 0 or step == settings.steps:
            run.console.say(f"sft {step}/{settings.steps}  loss {metrics['loss/total']:.3f}  lr {learning_rate:.1e}")
        run.checkpoint(stage, step, state, last=step == settings.steps)


def fit(policy: Policy, optimiser: torch.optim.Optimizer, streams: list[Stream], *, max_grad_norm: float) -> Tally:
    """One optimiser step on the mean negative log-likelihood of every target token."""
    counts = BatchTotals(sum(s.num_rows for s in streams), sum(len(s.targets) for s in streams), max_length=1)
    totals = sum_totals(counts)
    losses: list[Tensor] = []

    def loss_of(number: int, stream: Stream) -> Tensor:
        losses_of_tokens = -token_logprobs(policy, stream)
        loss = aggregate(losses_of_tokens, stream.row, stream.row_lengths, aggregation="token_mean", totals=totals)
        losses.append(loss.detach().double())
        return loss

    tally = take_step(optimiser, streams, loss_of, policy.device, max_grad_norm)
    tally.add("loss/total", sum(losses))
    return tally
