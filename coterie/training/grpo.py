"""Group-relative policy optimisation: the loop.

prompts -> completions -> rewards -> advantages -> stream -> log-probabilities -> objective -> weights, a line each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from coterie.algorithms.advantages import group_std
from coterie.algorithms.controllers import adapted_entropy_weight, adapted_kl_weight
from coterie.algorithms.kl import k3
from coterie.evals.evaluate import evaluate, heldout_prompts
from coterie.models.codec import Codec
from coterie.models.logprobs import logprobs_of
from coterie.models.policy import Policy
from coterie.recipe import Recipe
from coterie.rewards.base import Reward
from coterie.rollouts.engine import Engine
from coterie.rollouts.pack import pack
from coterie.tasks.base import Task
from coterie.training.advantages import load_advantages
from coterie.training.checkpoint import TrainState
from coterie.training.gap import rounding_at_the_gap
from coterie.training.metrics import Clock, Tally
from coterie.training.policy_update import UpdateSettings, load_objective, optimise
from coterie.training.reference import move_reference
from coterie.training.run import Run
from coterie.training.sample import Drawn, groups_with_signal, sample_step, some_groups, streams_of, with_kl
from coterie.training.step import learning_rate_at, make_optimiser, set_learning_rate
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
) -> None:
    """Every step samples, scores, updates, records, and where it is time evaluates and saves."""
    temperature, budget = recipe.sampling.temperature, recipe.optimiser.micro_batch_tokens
    objective, advantages_of = load_objective(recipe.loss), load_advantages(recipe, rewards)
    optimiser = make_optimiser(policy, recipe.optimiser)
    weights = {"kl_weight": recipe.loss.kl_weight, "entropy_weight": recipe.entropy.weight}
    moving = {"reference": reference} if recipe.reference.kind != "frozen" else {}
    state = TrainState({"model": policy, **moving}, {"optimiser": (policy, optimiser)}, weights)
    run.restore("train", state)
    for step in run.remaining("train", recipe.steps):
        clock = Clock()
        drawn = sample_step(recipe, task, rewards, codec, engine, step, clock)
        scored = drawn.learned
        if recipe.loss.kl_weight and recipe.kl.place == "reward":
            scored = with_kl(scored, policy, reference, recipe, weight=weights["kl_weight"])
        advantages = advantages_of(scored)  # [P, G]
        settings = UpdateSettings.of(recipe, **weights, temperature=temperature)
        held = settings.kl_weight > 0 or recipe.loss.objective == "anchored"
        streams, totals = pack(
            scored,
            advantages,
            max_length=recipe.sampling.max_new_tokens,
            micro_batch_tokens=budget,
            drop_silent=only_advantages_act(recipe),
        )
        watched = streams if held else streams_of(scored, budget, only=some_groups(scored, step))
        reference_logprobs = logprobs_of(reference, watched, temperature=temperature)
        learning_rate = learning_rate_at(step, recipe.steps, recipe.optimiser)
        set_learning_rate(optimiser, learning_rate)
        gaps = list[Tensor]()
        tally = optimise(
            policy,
            optimiser,
            streams,
            totals,
            settings,
            objective=objective,
            reference=reference,
            reference_logprobs=reference_logprobs if held else None,
            sampled_by_policy=True,
            gaps=gaps,
        )
        move_reference(reference, policy, recipe.reference, step)
        engine.load_weights(policy, step)
        clock.lap("time/train_seconds")
        tally.merge(rollout_metrics(drawn.scored, groups_with_signal(drawn.scored, recipe.advantage)))
        tally.merge(redraw_metrics(drawn))
        if "kl" in scored.parts:
            tally.add_values("reward/kl", scored.parts["kl"][scored.valid])
        tally.merge(divergence_metrics(watched, reference_logprobs))
        metrics = {
            **tally.values(),
            **rounding_at_the_gap(policy, streams, gaps, temperature=temperature),
            "optimiser/learning_rate": learning_rate,
            **controlled(recipe, weights),
            **clock.seconds,
        }
        adapt(weights, recipe, metrics)
        recorded = drawn.scored if scored is drawn.scored or len(drawn.kept) < len(drawn.scored.groups) else scored
        run.record("train", step, metrics, recorded, drawn.spread(advantages), codec.pieces)
        run.console.say(metrics_line("grpo", step, recipe.steps, metrics, list(scored.parts)))
        evaluate_on_the_way(run, recipe, task, rewards, codec, engine, step)
        run.checkpoint("train", step, state, last=step == recipe.steps)


def only_advantages_act(recipe: Recipe) -> bool:
    """Whether a completion whose advantage is 0 has no gradient at all, so that it can be left out."""
    ours = ":" not in recipe.loss.objective and recipe.loss.objective != "anchored"
    return ours and not recipe.loss.kl_weight and not recipe.entropy.weight and recipe.entropy.target is None


def adapt(weights: dict[str, float], recipe: Recipe, metrics: dict[str, float]) -> None:
    """Move the weights that hold a target, for the next step."""
    if recipe.kl.target is not None and math.isfinite(metrics.get("policy/kl", math.nan)):
        weights["kl_weight"] = adapted_kl_weight(
            weights["kl_weight"], metrics["policy/kl"], target=recipe.kl.target, rate=recipe.kl.adapt_rate
        )
    if recipe.entropy.target is not None and math.isfinite(metrics["policy/entropy"]):
        weights["entropy_weight"] = adapted_entropy_weight(
            weights["entropy_weight"],
            metrics["policy/entropy"],
            target=recipe.entropy.target,
            rate=recipe.entropy.adapt_rate,
        )


def controlled(recipe: Recipe, weights: dict[str, float]) -> dict[str, float]:
    """The weights of this step that a controller moves, as metrics."""
    targets = {"kl_weight": recipe.kl.target, "entropy_weight": recipe.entropy.target}
    return {f"loss/{name}": weights[name] for name, target in targets.items() if target is not None}


def evaluate_on_the_way(
    run: Run, recipe: Recipe, task: Task, rewards: Sequence[Reward], codec: Codec, engine: Engine, step: int
) -> None:
    """Held-out accuracy between the start and the end, if it is time to."""
    settings = recipe.evaluation
    if not settings.every or step % settings.every or step >= recipe.steps:
        return
    heldout = heldout_prompts(task, settings.prompts, seed=recipe.seed)
    if heldout:
        evaluation = evaluate(
            engine, task, heldout, rewards, codec, recipe.sampling, num_samples=1, seed=recipe.seed, greedy=False
        )
        run.record_evaluation("train", step, evaluation)


def rollout_metrics(scored: Scored, signal: Tensor) -> Tally:
    """What the samples of a step were like: rewards, groups without signal [P], entropy, lengths, truncation."""
    tally = Tally()
    valid = scored.valid
    completions = [completion for group in scored.groups for completion in group.completions]
    lengths = torch.tensor([len(completion.tokens) for completion in completions], dtype=torch.float64)
    tally.add_values("reward/mean", scored.rewards[valid])
    if valid.any():
        tally.add("reward/highest", scored.rewards[valid].max())
        tally.add("reward/lowest", scored.rewards[valid].min())
    if valid.sum() > 1:
        tally.add("reward/std", scored.rewards[valid].std())
    for name, part in scored.parts.items():
        tally.add_values(f"reward/{name}", part[~part.isnan()])
        spread = group_std(part)
        tally.add_values(f"reward/{name}_group_std", spread[~spread.isnan()])
    tally.add("reward/num_abstained", (~valid).sum())
    tally.add("reward/num_failed", len({(f.group, f.completion) for f in scored.failures}))
    if scored.rewards.shape[1] > 1:
        tally.add_values("group/no_signal_share", ~signal)
    tally.add_values("policy/entropy", torch.cat([completion.entropies for completion in completions]))
    tally.add_values("completion/tokens_mean", lengths)
    tally.add_maximum("completion/tokens_max", lengths)
    tally.add("completion/num_tokens", lengths.sum())
    tally.add("completion/truncated_share", sum(c.ended == "length" for c in completions), len(completions))
    return tally


def redraw_metrics(drawn: Drawn) -> Tally:
    """What dynamic sampling cost: groups dropped, and the tokens that were spent on them."""
    tally = Tally()
    dropped = set(range(len(drawn.scored.groups))) - set(drawn.kept)
    if dropped:
        spent = sum(len(c.tokens) for i in dropped for c in drawn.scored.groups[i].completions)
        tally.add("redraw/num_dropped_groups", len(dropped))
        tally.add("redraw/num_dropped_tokens", spent)
    return tally


def divergence_metrics(streams: Sequence[Stream], reference_logprobs: Sequence[Tensor]) -> Tally:
    """KL of the policy that sampled to the reference, in nats per token."""
    tally = Tally()
    for stream, reference in zip(streams, reference_logprobs, strict=True):
        tally.add_values("policy/kl", k3(reference.cpu() - stream.sampler_logprobs))
    return tally


def metrics_line(method: str, step: int, num_steps: int, metrics: dict[str, float], parts: list[str]) -> str:
    """The line a person reads."""
    shown = [f"{method} {step}/{num_steps}", f"reward {metrics.get('reward/mean', float('nan')):.2f}"]
    if len(parts) > 1:
        shown += [f"{part} {metrics[f'reward/{part}']:.2f}" for part in parts if f"reward/{part}" in metrics]
    shown += [
        f"entropy {metrics['policy/entropy']:.2f}",
        f"kl {metrics.get('policy/kl', float('nan')):.3f}",
        f"length {metrics['completion/tokens_mean']:.0f}",
        *([f"no signal {metrics['group/no_signal_share']:.0%}"] if "group/no_signal_share" in metrics else []),
        f"{metrics['time/step_seconds']:.2f} s",
    ]
    if metrics["completion/truncated_share"]:
        shown.append(f"cut {metrics['completion/truncated_share']:.0%}")
    if metrics["reward/num_failed"]:
        shown.append(f"failed rewards {metrics['reward/num_failed']:.0f}")
    return "  ".join(shown)
