"""What travels between the stages: frozen values, each checked when it is made.

Legend, everywhere: P prompts, G completions per prompt, B = P*G rows, N completion tokens of all rows, T tokens of the
packed stream, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

Messages = list[dict[str, str]]
Ending = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """One prompt of a task.

    key: a number that no other prompt of the same draw has; sampling noise is keyed by it.
    content: text, or chat messages. tokens: what the model reads. columns: what rewards may look at. origin: the file and
    line it comes from, where it does.
    """

    key: int
    content: str | Messages
    tokens: list[int]
    columns: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""

    def __post_init__(self) -> None:
        assert self.tokens, "a prompt has at least one token"

    @property
    def text(self) -> str:
        """The prompt as a person would read it: of a chat the last message, with what the assistant is to continue after it."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(message["content"] for message in self.content[_last_asked(self.content) :])

    @property
    def asked(self) -> str:
        """The last thing that somebody else than the assistant says."""
        return self.content if isinstance(self.content, str) else self.content[_last_asked(self.content)]["content"]


def _last_asked(messages: Messages) -> int:
    """The place of the last message that is not the assistant's."""
    return max((place for place, message in enumerate(messages) if message["role"] != "assistant"), default=0)


@dataclass(frozen=True)
class Completion:
    """What the policy wrote after a prompt.

    tokens: n token ids, the end token included where there is one. logprobs [n], entropies [n]: of the distribution that
    was sampled, temperature and truncation included, in nats. support: for each token the ids that top-k or top-p kept,
    or None where all were. ended: "stop" for an end token or a stop string, "length" where the limit cut it.
    """

    tokens: list[int]
    logprobs: Tensor
    entropies: Tensor
    ended: Ending
    text: str = ""
    support: list[Tensor] | None = None

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.logprobs) == len(self.entropies) > 0


@dataclass(frozen=True)
class Group:
    """One prompt and its G completions."""

    prompt: Prompt
    completions: list[Completion]


Entry = tuple[Prompt, Completion]


def entries_of(groups: Iterable[Group]) -> list[Entry]:
    """Every completion with its prompt, in order."""
    return [(group.prompt, completion) for group in groups for completion in group.completions]


@dataclass(frozen=True)
class RewardFailure:
    """A reward that gave nothing usable for one completion: which, and why. Counted, never a zero."""

    reward: str
    group: int
    completion: int
    reason: str


@dataclass(frozen=True)
class Scored:
    """Groups with their rewards.

    rewards [P, G]: the weighted sum; NaN where a completion abstains. parts [P, G] by name, NaN likewise: each reward before its
    weight; "kl" and "overlong" as they enter the sum. failures: what went wrong, for the completions that abstain because a
    reward failed.
    """

    groups: list[Group]
    rewards: Tensor
    parts: Mapping[str, Tensor]
    failures: list[RewardFailure]

    def __post_init__(self) -> None:
        shape = (len(self.groups), len(self.groups[0].completions))
        assert self.rewards.shape == shape, (self.rewards.shape, shape)
        assert all(part.shape == shape for part in self.parts.values())
        assert all(len(group.completions) == shape[1] for group in self.groups)

    @property
    def valid(self) -> Tensor:
        """[P, G] bool: which completions have a reward."""
        return ~self.rewards.isnan()


@dataclass(frozen=True)
class Stream:
    """One micro-batch without padding: each prompt once, then its completions, one after another.

    tokens [T], positions [T]: what the model reads, and where each token stands in its own sequence.
    segments: for each group, (prompt length, lengths of its completions), in stream order.
    targets [N]: the tokens that the policy wrote, in stream order. predictors [N]: for each of them the place in the
    stream whose output predicts it, which stays on the host. row [N]: which of the B rows it belongs to.
    advantages [B], rewards [B]: one per row. sampler_logprobs [N]: recorded when sampled.
    support: for each target the token ids that could be sampled, or None where all could.
    """

    tokens: Tensor
    positions: Tensor
    segments: list[tuple[int, list[int]]]
    targets: Tensor
    predictors: Tensor
    row: Tensor
    advantages: Tensor
    rewards: Tensor
    sampler_logprobs: Tensor
    support: list[Tensor] | None = None

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.positions) == sum(p + sum(c) for p, c in self.segments)
        num_targets = len(self.targets)
        assert num_targets == len(self.predictors) == len(self.row) == len(self.sampler_logprobs)
        assert self.support is None or len(self.support) == num_targets
        assert len(self.advantages) == len(self.rewards) == self.num_rows

    @property
    def num_rows(self) -> int:
        return sum(len(lengths) for _, lengths in self.segments)

    @property
    def row_lengths(self) -> Tensor:
        """[B]: how many tokens the policy wrote in each row."""
        return torch.tensor([n for _, lengths in self.segments for n in lengths], device=self.row.device)

    def rows(self) -> list[tuple[int, Tensor]]:
        """Each completion behind a copy of its prompt: the length of the prompt, and the tokens of both."""
        found, at = [], 0
        for prompt_length, lengths in self.segments:
            prompt = self.tokens[at : at + prompt_length]
            at += prompt_length
            for length in lengths:
                found.append((prompt_length, torch.cat([prompt, self.tokens[at : at + length]])))
                at += length
        return found

    def to(self, device: torch.device) -> Stream:
        """The same stream on another device."""
        names = ("tokens", "positions", "targets", "row", "advantages", "rewards", "sampler_logprobs")
        moved = {name: getattr(self, name).to(device) for name in names}
        return replace(self, **moved)


@dataclass(frozen=True)
class BatchTotals:
    """Denominators of one optimiser step, counted over all its micro-batches and processes before the first backward.

    num_rows, num_tokens: completions with a reward and their tokens, whether or not they carry signal.
    max_length: the length limit, which the "fixed_length" aggregation divides by.
    """

    num_rows: int
    num_tokens: int
    max_length: int
