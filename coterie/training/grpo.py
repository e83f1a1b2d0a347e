"""Group-relative policy optimisation: the loop (R1).

prompts -> completions -> rewards -> advantages -> stream -> log-probabilities -> objective -> weights, a line each.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from coterie.algorithms.advantages import group_advantages, has_signal
from coterie.algorithms.kl import k3
from coterie.evals.evaluate import evaluate, heldout_prompts
from coterie.models.codec import Codec
from coterie.models.policy import Policy
from coterie.recipe import Recipe
from coterie.rewards.score import Reward, score
from coterie.rollouts.collect import collect
from coterie.rollouts.engine import Engine
from coterie.rollouts.pack import Row, make_stream, pack, split_by_tokens
from coterie.tasks.base import Task, draw
from coterie.training.metrics import Tally
from coterie.training.optimise import (
    UpdateSettings,
    learning_rate_at,
    optimise,
    reference_logprobs_of,
    set_learning_rate,
)
from coterie.training.run import Run
from coterie.types import Scored, Stream


def train_grpo(
    run: Run,
    recipe: Recipe,
    task: Task,
    rewards: Sequence[Reward],
    codec: Codec,
    policy: Policy,
    reference: Policy,
    engine: Engine,
    optimiser: torch.optim.Optimizer,
) -> None:
    """Every step samples, scores, updates, records, and where it is time evaluates and saves."""
    sampling, loss, seed = recipe.sampling, recipe.loss, recipe.seed
    settings = UpdateSettings.of(loss, recipe.kl, sampling.temperature, recipe.optimiser)
    heldout = heldout_prompts(task, recipe.evaluation.prompts, seed=seed)
    run.restore("grpo", policy, optimiser)
    for step in run.remaining("grpo", recipe.steps):
        clock = Clock()
        prompts = draw(task, recipe.prompts_per_step, seed=seed, step=step)
        groups = collect(
            engine, prompts, codec, sampling, num_completions=recipe.group_size, noise=(seed, "train", step)
        )
        clock.lap("time/sample_seconds")
        scored = score(groups, rewards, max_failed_share=recipe.max_failed_rewards)
        clock.lap("time/score_seconds")
        advantages = group_advantages(scored.rewards, scale=recipe.advantage.scale, epsilon=recipe.advantage.epsilon)
        streams, totals = pack(
            scored,
            advantages,
            max_length=sampling.max_new_tokens,
            micro_batch_tokens=recipe.optimiser.micro_batch_tokens,
            drop_silent=loss.kl_weight == 0,
        )
        watched = streams if loss.kl_weight else first_of_each_group(scored, recipe.optimiser.micro_batch_tokens)
        reference_logprobs = reference_logprobs_of(reference, watched, temperature=sampling.temperature)
        learning_rate = learning_rate_at(step, recipe.steps, recipe.optimiser)
        set_learning_rate(optimiser, learning_rate)
        tally = optimise(
            policy,
            optimiser,
            streams,
            totals,
            settings,
            reference_logprobs=reference_logprobs if loss.kl_weight else None,
            sampled_by_policy=True,
        )
        engine.load_weights(policy, step)
        clock.lap("time/train_seconds")
        tally.merge(rollout_metrics(scored))
        tally.merge(divergence_metrics(watched, reference_logprobs))
        metrics = {**tally.values(), "optimiser/learning_rate": learning_rate, **clock.seconds}
        run.record("grpo", step, metrics, scored, advantages, codec.pieces)
        run.console.say(metrics_line(step, recipe.steps, metrics, list(scored.parts)))
        if recipe.evaluation.every and step % recipe.evaluation.every == 0 and step < recipe.steps and heldout:
            evaluation = evaluate(
                engine, task, heldout, rewards, codec, sampling, num_samples=1, seed=seed, greedy=False
            )
            run.record_evaluation("grpo", step, evaluation)
        run.checkpoint("grpo", step, policy, optimiser, last=step == recipe.steps)


class Clock:
    """Seconds spent on the parts of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Put the time since the last lap under a name, and keep the whole."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
        self.seconds["time/step_seconds"] = now - self._start


def rollout_metrics(scored: Scored) -> Tally:
    """What the samples of a step were like (R36): rewards, groups without signal, entropy, lengths, truncation."""
    tally = Tally()
    valid = scored.valid
    completions = [completion for group in scored.groups for completion in group.completions]
    lengths = torch.tensor([len(completion.tokens) for completion in completions], dtype=torch.float64)
    tally.add_values("reward/mean", scored.rewards[valid])
    if valid.sum() > 1:
        tally.add("reward/std", scored.rewards[valid].std())
    for name, part in scored.parts.items():
        tally.add_values(f"reward/{name}", part[~part.isnan()])
    tally.add("reward/num_abstained", (~valid).sum())
    tally.add("reward/num_failed", len({(f.group, f.completion) for f in scored.failures}))
    tally.add_values("group/no_signal_share", ~has_signal(scored.rewards))
    tally.add_values("policy/entropy", torch.cat([completion.entropies for completion in completions]))
    tally.add_values("completion/tokens_mean", lengths)
    tally.add_maximum("completion/tokens_max", lengths)
    tally.add("completion/truncated_share", sum(c.ended == "length" for c in completions), len(completions))
    return tally


def divergence_metrics(streams: Sequence[Stream], reference_logprobs: Sequence[Tensor]) -> Tally:
    """KL of the policy that sampled to the reference, in nats per token."""
    tally = Tally()
    for stream, reference in zip(streams, reference_logprobs, strict=True):
        tally.add_values("policy/kl", k3(reference.cpu() - stream.sampler_logprobs))
    return tally


def first_of_each_group(scored: Scored, micro_batch_tokens: int) -> list[Stream]:
    """One completion of each group, to watch the KL on where the loss does not need it on all."""
    groups = [
        (group.prompt.tokens, [Row(c.tokens, c.logprobs, 0.0, c.support) for c in group.completions[:1]])
        for group in scored.groups
    ]
    return [make_stream(part) for part in split_by_tokens(groups, micro_batch_tokens)]


def metrics_line(step: int, num_steps: int, metrics: dict[str, float], parts: list[str]) -> str:
    """The line a person reads."""
    shown = [f"grpo {step}/{num_steps}", f"reward {metrics.get('reward/mean', float('nan')):.2f}"]
    if len(parts) > 1:
        shown += [f"{part} {metrics[f'reward/{part}']:.2f}" for part in parts if f"reward/{part}" in metrics]
    shown += [
        f"entropy {metrics['policy/entropy']:.2f}",
        f"kl {metrics.get('policy/kl', float('nan')):.3f}",
        f"length {metrics['completion/tokens_mean']:.0f}",
        f"no signal {metrics['group/no_signal_share']:.0%}",
        f"{metrics['time/step_seconds']:.2f} s",
    ]
    if metrics["completion/truncated_share"]:
        shown.append(f"cut {metrics['completion/truncated_share']:.0%}")
    if metrics["reward/num_failed"]:
        shown.append(f"failed rewards {metrics['reward/num_failed']:.0f}")
    return "  ".join(shown)
