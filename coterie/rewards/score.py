"""Run the rewards over groups, keep every part, and let what fails abstain.

Legend: P prompts, G completions per prompt, B = P*G.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch

from coterie.errors import UserError
from coterie.sections import section
from coterie.types import Group, RewardFailure, Scored

RewardFunction = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class Reward:
    """A reward function `fn(prompts, completions, **columns) -> list[float | None]`, the signature TRL's users have.

    It gets one entry per completion in each argument. None abstains: that reward says nothing of that completion.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0


@section("score")
def score(groups: list[Group], rewards: Sequence[Reward], *, max_failed_share: float = 1.0) -> Scored:
    """Rewards of every completion: the weighted sum of the parts that did not abstain.

    A completion abstains as a whole where every part does, and where any part failed (raised, or gave something that is
    not a finite number): a failure is counted and named, never a zero. Raises UserError with the first failure when more
    than `max_failed_share` of the completions failed, and when a function's answer can't be matched to its completions.
    """
    shape = (len(groups), len(groups[0].completions))
    total, spoke = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.bool)
    parts, failures = {}, []
    for reward in rewards:
        values, failed = _call(reward, _arguments(groups))  # lists of its own, which a function may change
        part = torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64).view(shape)
        parts[reward.name] = part
        spoke |= ~part.isnan()
        total += reward.weight * part.nan_to_num(nan=0.0)
        failures += [
            RewardFailure(reward.name, index // shape[1], index % shape[1], reason) for index, reason in failed.items()
        ]
    if total.isinf().any():
        raise UserError("rewards: a reward times its weight is infinite; lower the weight")
    for failure in failures:
        spoke[failure.group, failure.completion] = False
    num_failed = len({(failure.group, failure.completion) for failure in failures})
    if num_failed > max_failed_share * shape[0] * shape[1]:
        first = failures[0]
        raise UserError(
            f"rewards failed for {num_failed} of {shape[0] * shape[1]} completions, more than max_failed_rewards allows "
            f"({max_failed_share:g}); the first: {first.reward}: {first.reason}"
        )
    return Scored(groups, total.masked_fill(~spoke, math.nan), parts, failures)


def completion_text(completion: str | list[dict[str, str]]) -> str:
    """The text of a completion, which is a list of one message where the prompt was a chat."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def _arguments(groups: list[Group]) -> dict[str, list[Any]]:
    """What a reward function is called with: each a list [B]."""
    arguments: dict[str, list[Any]] = {"prompts": [], "completions": [], "completion_ids": []}
    columns = sorted(set().union(*(group.prompt.columns for group in groups)) - set(arguments))
    arguments |= {column: [] for column in columns}
    for group in groups:
        content = group.prompt.content
        chat = not isinstance(content, str)
        for completion in group.completions:
            text = completion.text
            arguments["prompts"].append(content if isinstance(content, str) else [dict(m) for m in content])
            arguments["completions"].append([{"role": "assistant", "content": text}] if chat else text)
            arguments["completion_ids"].append(list(completion.tokens))
            for column in columns:
                arguments[column].append(group.prompt.columns.get(column))
    return arguments


def _call(reward: Reward, arguments: Mapping[str, list[Any]]) -> tuple[list[float | None], dict[int, str]]:
    """The reward's values [B], and the reasons of those that failed. What the function itself raises is caught here."""
    num_completions = len(arguments["completions"])
    accepted = _accepted(reward, arguments)
    try:
        answers = _checked_length(reward, reward.function(**_copied(accepted)), num_completions)
    except UserError:
        raise
    except Exception:  # a user's function may raise anything: find out for which completions
        answers = []
        for index in range(num_completions):
            alone = {name: [values[index]] for name, values in accepted.items()}
            try:
                answers += _checked_length(reward, reward.function(**alone), 1)
            except UserError:
                raise
            except Exception as error:
                answers.append(error)
    values: list[float | None] = []
    failed = {}
    for index, answer in enumerate(answers):
        value, reason = _number(answer)
        values.append(value)
        if reason:
            failed[index] = reason
    return values, failed


def _accepted(reward: Reward, arguments: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Only what the function takes, unless it takes everything."""
    parameters = inspect.signature(reward.function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(arguments)
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in arguments]
    if missing:
        raise UserError(
            f"reward {reward.name}: the function needs {', '.join(missing)}, which is no column of the data; "
            f"there are: {', '.join(arguments)}"
        )
    names = {parameter.name for parameter in parameters}
    return {name: values for name, values in arguments.items() if name in names}


def _copied(arguments: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: list(values) for name, values in arguments.items()}


def _checked_length(reward: Reward, answer: Any, num_completions: int) -> list[Any]:
    unordered = isinstance(answer, str | bytes | Mapping | Set)
    if unordered or not hasattr(answer, "__len__") or not hasattr(answer, "__iter__"):
        raise UserError(
            f"reward {reward.name}: returned {answer!r:.80}; a list with a number or None for each is needed"
        )
    if len(answer) != num_completions:
        raise UserError(f"reward {reward.name}: returned {len(answer)} values for {num_completions} completions")
    return list(answer)


def _number(answer: Any) -> tuple[float | None, str]:
    """A finite number, or None and the reason (empty where the function chose to abstain)."""
    if answer is None:
        return None, ""
    if isinstance(answer, Exception):
        return None, f"raised {type(answer).__name__}: {answer}"
    if isinstance(answer, str | bytes):
        return None, f"returned the text {answer!r:.60}, not a number"
    try:
        value = float(answer)
    except (TypeError, ValueError, OverflowError):
        return None, f"returned {answer!r:.60}, not a number"
    return (value, "") if math.isfinite(value) else (None, f"returned {value}")
