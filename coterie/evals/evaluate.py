"""Held-out evaluation: sampled and greedy, with intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from coterie.evals.statistics import (
    Estimate,
    difference_interval,
    grouped,
    mean_interval,
    pass_at_k,
    share_interval,
)
from coterie.models.codec import Codec
from coterie.noise import permutation
from coterie.recipe.settings import Sampling
from coterie.rewards.base import Reward
from coterie.rewards.score import score
from coterie.rollouts.collect import collect
from coterie.rollouts.engine import Engine
from coterie.sections import section
from coterie.tasks.base import Task
from coterie.types import Prompt, RewardFailure, Scored

NUM_EXAMPLES = 16  # held-out answers that are kept of the start and of the end, of which some are shown


@dataclass(frozen=True)
class Evaluation:
    """Estimates by mode ("sampled", "greedy") and name ("accuracy", "reward", ...).

    judged: what the sampled ones rest on, by name, for each completion in turn. prompts: what each group's prompt is known by.
    failures: of rewards, among `num_completions` in all modes. silent: the rewards that had no value for any of them.
    """

    estimates: Mapping[str, Mapping[str, Estimate]]
    judged: Mapping[str, Sequence[bool | None]]
    num_samples: int
    prompts: Sequence[str] = ()
    failures: Sequence[RewardFailure] = ()
    num_completions: int = 0
    silent: Sequence[str] = ()

    def num_right(self) -> list[int]:
        """How many of each group's samples are right; nothing where the task does not say what right is."""
        outcomes, size = self.judged.get("accuracy", []), self.num_samples
        return [sum(map(bool, outcomes[i : i + size])) for i in range(0, len(outcomes), size)]

    def pass_estimates(self) -> dict[int, Estimate]:
        """pass@k for powers of two, averaged over prompts."""
        ks = [1 << n for n in range(self.num_samples.bit_length()) if self.judged.get("accuracy")]
        shares = {k: [pass_at_k(right, self.num_samples, k) for right in self.num_right()] for k in ks}
        return {k: share_interval(grouped(self.prompts, values)) for k, values in shares.items()}

    def accuracy_above(self, other: Evaluation) -> Estimate | None:
        """This accuracy minus that of another on the same prompts, paired by prompt; None where there is none."""
        pairs = list(zip(self.num_right(), other.num_right(), strict=True))
        differences = [one / self.num_samples - two / other.num_samples for one, two in pairs]
        return difference_interval(grouped(self.prompts, differences)) if pairs else None


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
    judged: Mapping[str, Sequence[bool | None]] = {}
    names: list[str] = []
    failures: list[RewardFailure] = []
    silent = {reward.name for reward in rewards}
    modes = {"sampled": sampling, **({"greedy": sampling.model_copy(update={"temperature": 0.0})} if greedy else {})}
    for mode, settings in modes.items():
        count = num_samples if mode == "sampled" else 1
        groups = collect(engine, prompts, codec, settings, num_completions=count, noise=(seed, "evaluate", mode))
        scored = score(groups, rewards)
        failures += scored.failures
        silent -= {name for name, part in scored.parts.items() if not part.isnan().all()}
        outcomes = task.judge(scored)
        estimates[mode] = estimates_of(scored, outcomes, rewards, sampling.max_new_tokens)
        if mode == "sampled":
            judged, names = outcomes, _names(scored)
    num_completions = len(prompts) * (num_samples + (1 if greedy else 0))
    return Evaluation(estimates, judged, num_samples, names, failures, num_completions, sorted(silent))


@dataclass(frozen=True)
class Example:
    """A greedy answer to show. reward: None where it has none; correct: None where the task does not say."""

    prompt: str
    text: str
    reward: float | None
    correct: bool | None


def example_prompts(task: Task, *, seed: int) -> list[Prompt]:
    """The prompts whose answers may be shown: the task's examples, and some that are held out."""
    shown = {id(prompt) for prompt in task.examples}
    others = [prompt for prompt in heldout_prompts(task, NUM_EXAMPLES, seed=seed) if id(prompt) not in shown]
    return [*task.examples, *others][:NUM_EXAMPLES]


def answer_examples(
    engine: Engine,
    task: Task,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    codec: Codec,
    sampling: Sampling,
) -> list[Example]:
    """The greedy answer to each prompt, with what it is worth."""
    greedy = sampling.model_copy(update={"temperature": 0.0})
    scored = score(collect(engine, prompts, codec, greedy, num_completions=1, noise=("examples",)), rewards)
    correct = task.judge(scored).get("accuracy", [None] * len(prompts))
    values = [value if math.isfinite(value) else None for value in scored.rewards[:, 0].tolist()]
    return [
        Example(group.prompt.text, group.completions[0].text, reward, right)
        for group, reward, right in zip(scored.groups, values, correct, strict=True)
    ]


def estimates_of(
    scored: Scored, judged: Mapping[str, Sequence[bool | None]], rewards: Sequence[Reward], limit: int
) -> dict[str, Estimate]:
    """Of everything that is counted, of the reward, and of the lengths in tokens."""
    prompts = [name for name in _names(scored) for _ in scored.groups[0].completions]
    estimates = {}
    for name, outcomes in judged.items():
        said = [(prompt, float(one)) for prompt, one in zip(prompts, outcomes, strict=True) if one is not None]
        if said:
            estimates[name] = share_interval(grouped(*zip(*said, strict=True)))
    given = [
        (prompt, value)
        for prompt, value in zip(prompts, scored.rewards.flatten().tolist(), strict=True)
        if not math.isnan(value)
    ]
    if given:
        by_prompt, bounds = grouped(*zip(*given, strict=True)), reward_bounds(scored.parts, rewards)
        estimates["reward"] = (
            share_interval(by_prompt, low=bounds[0], high=bounds[1]) if bounds else mean_interval(by_prompt)
        )
    lengths = [float(len(c.tokens)) for group in scored.groups for c in group.completions]
    estimates["tokens"] = mean_interval(grouped(prompts, lengths), low=1.0, high=float(limit))
    return estimates


def _names(scored: Scored) -> list[str]:
    """What the prompt of each group is known by: equal prompts are one."""
    return [json.dumps(group.prompt.content, sort_keys=True) for group in scored.groups]


def reward_bounds(parts: Mapping[str, Tensor], rewards: Sequence[Reward]) -> tuple[float, float] | None:
    """The least and the most that the weighted sum can be, where every part is seen between -1 and 1; None elsewhere.

    A part without negative values is taken for one from 0 to 1, and one without positive values for one from -1 to 0.
    """
    least = most = 0.0
    for reward in rewards:
        values = parts[reward.name][~parts[reward.name].isnan()]
        if not len(values):
            continue
        low, high = values.min().item(), values.max().item()
        if low < -1 or high > 1:
            return None
        ends = (-1.0 if low < 0 else 0.0, 1.0 if high > 0 or low == 0 else 0.0)
        least += min(reward.weight * end for end in ends)
        most += max(reward.weight * end for end in ends)
    return (least, most) if least < most else None
