"""`coterie.update`: one policy update, for people with a loop of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.algorithms.advantages import has_signal
from coterie.algorithms.kl import k3
from coterie.errors import UserError
from coterie.fast.serve import Policy
from coterie.models.logprobs import logprobs_of
from coterie.recipe import GRPO, make_recipe
from coterie.recipe.presets import PRESETS
from coterie.rollouts.pack import pack
from coterie.training.formulas import make_advantages
from coterie.training.loss_weights import first_loss_weights
from coterie.training.metrics import Tally
from coterie.training.policy_update import optimise
from coterie.types import Completion, Group, Prompt, Scored


def update(
    policy: Policy | PreTrainedModel,
    optimiser: torch.optim.Optimizer,
    *,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    rewards: Sequence[Sequence[float | None]] | Tensor,
    sampler_logprobs: Sequence[Sequence[Sequence[float] | Tensor]] | None = None,
    reference: Policy | PreTrainedModel | None = None,
    preset: str = "grpo",
    settings: dict[str, dict[str, object]] | None = None,
    temperature: float = 1.0,
) -> dict[str, float]:
    """Take one GRPO update on one batch, and return its metrics.

    prompts: P lists of token ids. completions: for each prompt G lists of token ids, the end token included.
    rewards [P, G]: None or NaN abstains. sampler_logprobs: for each completion the log-probability of each of its tokens
    when it was sampled; without them the policy's own are taken, which is right if it has not changed since.
    reference: what the KL is held to; needed where the preset or `settings` give the KL a weight.
    settings: sections of a recipe that override the preset, as {"loss": {"clip_high": 0.3}}; optimiser.max_grad_norm,
    updates_per_batch, micro_batch_tokens and activation_checkpointing act here too, the learning rate is the optimiser's own.
    What a recipe does before the update (dynamic_sampling, overlong) is the caller's, and the longest completion is the length limit.

    Raises UserError for shapes that do not agree, empty prompts or completions, tokens that the model does not know, and rewards or
    settings out of range.
    """
    recipe = _recipe(preset, settings or {}, temperature)
    rewards = _rewards(rewards)
    _check_shapes(prompts, completions, rewards, sampler_logprobs)
    _check(recipe, rewards, reference)
    policy = policy if isinstance(policy, Policy) else Policy.of(policy)
    policy = policy.recomputing() if recipe.optimiser.activation_checkpointing else policy
    reference = reference if reference is None or isinstance(reference, Policy) else Policy.of(reference)
    _check_tokens(policy.model.get_input_embeddings().weight.shape[0], prompts, completions)

    scored = _scored(prompts, completions, sampler_logprobs, rewards)
    advantages = make_advantages(recipe, ())(scored)  # [P, G]
    if rewards.isnan().all():
        raise UserError("update: every completion abstains, so there is nothing to learn from")
    budget = recipe.optimiser.micro_batch_tokens
    streams, totals = pack(
        scored, advantages, max_length=_longest(scored), micro_batch_tokens=budget, drop_silent=False
    )
    if sampler_logprobs is None:
        own = logprobs_of(policy, streams, temperature=temperature)
        streams = [replace(stream, sampler_logprobs=of.cpu()) for stream, of in zip(streams, own, strict=True)]
    reference_logprobs = logprobs_of(reference, streams, temperature=temperature) if reference is not None else None
    tally, _ = optimise(
        policy,
        optimiser,
        streams,
        totals,
        recipe,
        first_loss_weights(recipe),
        reference=reference,
        reference_logprobs=reference_logprobs,
    )
    for stream, logprobs in zip(streams, reference_logprobs or (), strict=False):
        tally.add_values("policy/kl", k3(logprobs.cpu() - stream.sampler_logprobs))
    return {**tally.values(), **_batch_metrics(rewards).values()}


def _recipe(preset: str, settings: dict[str, dict[str, object]], temperature: float) -> GRPO:
    """The settings of an update, checked as a recipe's are. What an update does not need is filled in."""
    for section in set(settings) - {"advantage", "loss", "kl", "entropy", "correction", "optimiser"}:
        raise UserError(f"update: settings.{section} has no effect in a single update; leave it out")
    unused = {"model": "given", "task": {"data": "given"}, "rewards": ["given:given"]}
    given = {**unused, "sampling": {"temperature": temperature}, **settings, "preset": preset}
    if PRESETS.get(preset, {}).get("method", "grpo") != "grpo":
        raise UserError(f"update: the preset {preset!r} is a method of its own; coterie.train runs it")
    recipe = make_recipe(given, source="update")
    assert isinstance(recipe, GRPO)
    return recipe


def _check(recipe: GRPO, rewards: Tensor, reference: Policy | PreTrainedModel | None) -> None:
    """An update is GRPO's, on rewards that are there already."""
    of_group = not recipe.advantage.function and recipe.advantage.baseline in ("group", "leave_one_out")
    if rewards.shape[1] == 1 and of_group:
        raise UserError(
            f"update: one completion per prompt leaves nothing to compare with while advantage.baseline is "
            f"{recipe.advantage.baseline}"
        )
    if recipe.advantage.combine == "each":
        raise UserError("update: advantage.combine is each, but one reward per completion is given, not its parts")
    if recipe.kl.target is not None or recipe.entropy.target is not None:
        raise UserError("update: kl.target and entropy.target need what came before; move the weights between updates")
    if recipe.kl_in_reward:
        raise UserError(
            "update: kl.place is reward, but the rewards are given; subtract the KL from them and set loss.kl_weight to 0"
        )
    if recipe.needs_reference and reference is None:
        why = f"loss.kl_weight is {recipe.loss.kl_weight:g}" if recipe.loss.kl_weight else "the objective is anchored"
        raise UserError(f"update: {why}, which needs a reference policy")


def _rewards(rewards: Sequence[Sequence[float | None]] | Tensor) -> Tensor:
    """[P, G] float64, NaN for None."""
    if isinstance(rewards, Tensor):
        values = rewards.detach().cpu().double()
    else:
        if len({len(group) for group in rewards}) != 1:
            raise UserError("update: rewards need the same number of completions for every prompt")
        values = torch.tensor(
            [[float("nan") if r is None else float(r) for r in group] for group in rewards], dtype=torch.float64
        )
    if values.ndim != 2 or values.isinf().any():
        raise UserError("update: rewards are finite numbers of the shape [prompts, completions]")
    return values


def _check_shapes(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    rewards: Tensor,
    sampler_logprobs: Sequence[Sequence[Sequence[float] | Tensor]] | None,
) -> None:
    if not len(prompts) == len(completions) == len(rewards):
        raise UserError(
            f"update: {len(prompts)} prompts, {len(completions)} groups of completions and {len(rewards)} of rewards; "
            "there must be as many of each"
        )
    for p, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        if not len(prompt):
            raise UserError(f"update: prompt {p} is empty")
        if len(group) != rewards.shape[1]:
            raise UserError(f"update: prompt {p} has {len(group)} completions and {rewards.shape[1]} rewards")
        for c, completion in enumerate(group):
            if not len(completion):
                raise UserError(
                    f"update: completion {c} of prompt {p} is empty; the end token alone makes one of length 1"
                )
            if sampler_logprobs is not None and len(sampler_logprobs[p][c]) != len(completion):
                raise UserError(
                    f"update: completion {c} of prompt {p} has {len(completion)} tokens and "
                    f"{len(sampler_logprobs[p][c])} sampler log-probabilities"
                )


def _check_tokens(
    num_known: int, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
) -> None:
    for p, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        named = [
            (f"prompt {p}", prompt),
            *((f"completion {c} of prompt {p}", tokens) for c, tokens in enumerate(group)),
        ]
        for name, tokens in named:
            wrong = next((token for token in tokens if not 0 <= token < num_known), None)
            if wrong is not None:
                raise UserError(
                    f"update: {name} holds the token {wrong}, and the model knows those from 0 to {num_known - 1}"
                )


def _scored(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    sampler_logprobs: Sequence[Sequence[Sequence[float] | Tensor]] | None,
    rewards: Tensor,
) -> Scored:
    """What was given, as the trainer has it; log-probabilities are zeros where none were given."""
    groups = []
    for p, prompt in enumerate(prompts):
        of_prompt = []
        for c, tokens in enumerate(completions[p]):
            given = sampler_logprobs[p][c] if sampler_logprobs is not None else [0.0] * len(tokens)
            logprobs = torch.as_tensor(given, dtype=torch.float32).cpu()
            of_prompt.append(Completion(list(tokens), logprobs, torch.zeros_like(logprobs), "stop"))
        groups.append(Group(Prompt(p, "", list(prompt)), of_prompt))
    return Scored(groups, rewards, {}, [])


def _longest(scored: Scored) -> int:
    """The length of the longest completion that has a reward."""
    lengths = torch.tensor([[len(completion.tokens) for completion in group.completions] for group in scored.groups])
    return int(lengths[scored.valid].max())


def _batch_metrics(rewards: Tensor) -> Tally:
    tally = Tally()
    valid = ~rewards.isnan()
    tally.add_values("reward/mean", rewards[valid])
    tally.add("reward/num_abstained", (~valid).sum())
    tally.add_values("group/no_signal_share", ~has_signal(rewards))
    return tally
