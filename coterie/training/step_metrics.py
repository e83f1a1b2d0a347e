"""The metrics of a step that samples, and the line of them that a person reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from coterie.algorithms.advantages import group_std
from coterie.algorithms.clip import Objective, TokenTerms
from coterie.algorithms.kl import k3
from coterie.recipe import GRPO
from coterie.training.dynamic_sampling import groups_with_signal
from coterie.training.metrics import Tally
from coterie.training.sample import Drawn
from coterie.types import Scored, Stream


def grpo_metrics(
    recipe: GRPO, drawn: Drawn, scored: Scored, streams: Sequence[Stream], reference_logprobs: Sequence[Tensor]
) -> Tally:
    """What a step's samples were like, what was dropped and taken off their rewards, and the KL to the reference on some streams."""
    tally = rollout_metrics(drawn.scored, groups_with_signal(drawn.scored, recipe.advantage))
    tally.merge(
        dynamic_sampling_metrics(drawn), penalty_metrics(scored), divergence_metrics(streams, reference_logprobs)
    )
    return tally


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


def dynamic_sampling_metrics(drawn: Drawn) -> Tally:
    """What dynamic sampling cost: groups dropped, and the tokens that were spent on them."""
    tally = Tally()
    dropped = set(range(len(drawn.scored.groups))) - set(drawn.learned_groups)
    if dropped:
        spent = sum(len(c.tokens) for i in dropped for c in drawn.scored.groups[i].completions)
        tally.add("dynamic_sampling/num_dropped_groups", len(dropped))
        tally.add("dynamic_sampling/num_dropped_tokens", spent)
    return tally


def penalty_metrics(scored: Scored) -> Tally:
    """What the KL took off the rewards, where it is a part of them."""
    tally = Tally()
    if "kl" in scored.parts:
        tally.add_values("reward/kl", scored.parts["kl"][scored.valid])
    return tally


def divergence_metrics(streams: Sequence[Stream], reference_logprobs: Sequence[Tensor]) -> Tally:
    """KL of the policy that sampled to the reference, in nats per token."""
    tally = Tally()
    for stream, reference in zip(streams, reference_logprobs, strict=True):
        tally.add_values("policy/kl", k3(reference.cpu() - stream.sampler_logprobs))
    return tally


@torch.no_grad()
def add_ratio_metrics(tally: Tally, terms: TokenTerms, objective: Objective, kind: str) -> None:
    """How far the policy is from pi_old, by a kind of ratio, and how often each clip bound acts."""
    ratio = terms.ratio(kind)
    if objective.clipped is not None:
        at_low, at_high = objective.clipped(terms)
        tally.add_values("policy/clip_low_share", at_low)
        tally.add_values("policy/clip_high_share", at_high)
    tally.add_values("policy/ratio_mean", ratio)
    tally.add_maximum("policy/ratio_max", ratio)
    tally.add_values("policy/kl_to_sampler", k3(-terms.log_ratio))


def metrics_line(method: str, step: int, num_steps: int, metrics: Mapping[str, float], parts: Iterable[str]) -> str:
    """The line a person reads."""
    parts = list(parts)
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
