"""Held-out evaluation: sampled and greedy, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coterie.evals.statistics import Estimate, mean_interval, wilson
from coterie.models.codec import Codec
from coterie.noise import permutation
from coterie.rewards.score import Reward, score
from coterie.rollouts.collect import collect
from coterie.rollouts.engine import Engine
from coterie.sections import section
from coterie.settings import Sampling
from coterie.tasks.base import Task
from coterie.types import Prompt, Scored


@dataclass(frozen=True)
class Evaluation:
    """Estimates by mode ("sampled", "greedy") and name ("accuracy", "reward", ...); `sampled` is what they rest on."""

    estimates: Mapping[str, Mapping[str, Estimate]]
    judged: Mapping[str, list[bool]]
    num_samples: int


def heldout_prompts(task: Task, count: int, *, seed: int) -> list[Prompt]:
    """At most `count` held-out prompts, the same in every evaluation of a run."""
    order = permutation(len(task.heldout), seed, "heldout")[:count]
    return [task.heldout[i] for i in sorted(order)]


@section("evaluate")
def evaluate(
    engine: Engine,
    task: Task,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    codec: Codec,
    sampling: Sampling,
    *,
    num_samples: int,
    seed: int,
    greedy: bool = True,
) -> Evaluation:
    """Sample each prompt `num_samples` times at the sampling's own temperature, and once greedily."""
    estimates = {}
    judged: Mapping[str, list[bool]] = {}
    modes = {"sampled": sampling, **({"greedy": sampling.model_copy(update={"temperature": 0.0})} if greedy else {})}
    for mode, settings in modes.items():
        count = num_samples if mode == "sampled" else 1
        groups = collect(engine, prompts, codec, settings, num_completions=count, noise=(seed, "evaluate", mode))
        scored = score(groups, rewards)
        outcomes = task.judge(scored)
        estimates[mode] = _estimates(scored, outcomes)
        if mode == "sampled":
            judged = outcomes
    return Evaluation(estimates, judged, num_samples)


def answer_examples(
    engine: Engine, prompts: Sequence[Prompt], codec: Codec, sampling: Sampling
) -> list[tuple[str, str]]:
    """The greedy answer to each prompt: (prompt, answer)."""
    greedy = sampling.model_copy(update={"temperature": 0.0})
    groups = collect(engine, prompts, codec, greedy, num_completions=1, noise=("examples",))
    return [(group.prompt.text, group.completions[0].text) for group in groups]


def _estimates(scored: Scored, judged: Mapping[str, list[bool]]) -> dict[str, Estimate]:
    estimates = {name: wilson(sum(outcomes), len(outcomes)) for name, outcomes in judged.items()}
    rewards = [value for value in scored.rewards.flatten().tolist() if value == value]
    if rewards:
        estimates["reward"] = mean_interval(rewards)
    lengths = [float(len(c.tokens)) for group in scored.groups for c in group.completions]
    estimates["tokens"] = mean_interval(lengths)
    return estimates
