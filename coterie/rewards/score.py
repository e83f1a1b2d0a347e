"""Run the rewards over groups, keep every part, and let what fails abstain.

Legend: P prompts, G completions per prompt, B = P*G.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from contextlib import chdir, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from coterie.errors import RewardError, UserError
from coterie.faults import strikes
from coterie.rewards.limits import TookTooLong, time_limit
from coterie.sections import section
from coterie.types import Group, RewardFailure, Scored


class _CountError(UserError):
    """A function gave too few or too many values."""

    def __init__(self, name: str, num_values: int, num_completions: int) -> None:
        plural = "" if num_completions == 1 else "s"
        self.reason = f"returned {num_values} values for {num_completions} completion{plural}"
        super().__init__(f"reward {name}: {self.reason}")


RewardFunction = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class Reward:
    """A reward function `fn(prompts, completions, **columns) -> list[float | None]`, the signature TRL's users have.

    It gets one entry per completion in each argument. None abstains: that reward says nothing of that completion; an
    exception in the list is a failure. An async function is awaited. options: keyword arguments beside the columns.
    where: only completions whose prompt's columns hold these values, or one of a list of values. timeout: seconds of a call.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)
    timeout: float | None = None

    def applies_to(self, columns: Mapping[str, Any]) -> bool:
        """Whether it has something to say of a prompt with these columns."""
        return all(
            columns.get(name) in (value if isinstance(value, list) else [value]) for name, value in self.where.items()
        )

    def can_begin(self, spare_cores: bool) -> bool:
        """Whether the function can start on a group while others are sampled, and without cores where none are to spare."""
        return hasattr(self.function, "begin") and (spare_cores or not getattr(self.function, "uses_cores", True))

    def begin(self, group: Group) -> None:
        """Let the function start on a group; the call that follows finds what it began, and what went wrong goes wrong there."""
        begin = getattr(self.function, "begin", None)
        if begin is not None and self.applies_to(group.prompt.columns):
            with suppress(Exception):
                begin(**_accepted(self, _arguments([group])), **self.options)

    @property
    def sandbox_report(self) -> str:
        """What to say in a run of the sandbox that it uses, which is started and tried for that; empty where it uses none."""
        return str(getattr(self.function, "sandbox_report", ""))

    def close(self) -> None:
        """End its processes and connections, where it has any."""
        if hasattr(self.function, "close"):
            self.function.close()


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
        values, failed = _call(reward, groups, max_failed_share)
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


def _call(reward: Reward, groups: list[Group], max_failed_share: float) -> tuple[list[float | None], dict[int, str]]:
    """The reward's values [B], None where it abstains, and the reasons of those that failed."""
    num_completions = sum(len(group.completions) for group in groups)
    concerned = [
        i for i, g in enumerate(g for g in groups for _ in g.completions) if reward.applies_to(g.prompt.columns)
    ]
    values: list[float | None] = [None] * num_completions
    failed = {}
    if concerned:
        accepted = _accepted(reward, _arguments(groups))  # lists of its own, which a function may change
        accepted = {name: [column[i] for i in concerned] for name, column in accepted.items()}
        answers = _answers(reward, accepted, len(concerned), max_failed_share * num_completions)
        for index, answer in zip(concerned, answers, strict=True):
            values[index], reason = _number(answer)
            if reason:
                failed[index] = reason
    return values, failed


def _answers(reward: Reward, columns: Mapping[str, list[Any]], count: int, max_late: float) -> list[Any]:
    """What the function says of each completion.

    What it raises, leaves out, or that it takes too long, is found out one by one. Raises UserError where it gives too few or
    too many values for all, and one for each alone: then nobody can tell whose is missing.
    """
    try:
        return _run(reward, _copied(columns), count)
    except _CountError:
        answers = _one_by_one(reward, columns, count, max_late)
        if not any(isinstance(answer, Exception) for answer in answers):
            raise
        return answers
    except UserError:
        raise
    except (Exception, SystemExit, TookTooLong):  # a user's function may raise anything: find out for which completions
        return _one_by_one(reward, columns, count, max_late)


def _one_by_one(reward: Reward, columns: Mapping[str, list[Any]], count: int, max_late: float) -> list[Any]:
    """What it says of each completion alone; an exception where it says nothing."""
    answers: list[Any] = []
    num_late = 0
    for index in range(count):
        if num_late > max_late:  # the step is lost, and each of the others may take as long
            answers += [RewardError("not tried, too many had taken too long")] * (count - index)
            break
        try:
            answers += _run(reward, {name: [values[index]] for name, values in columns.items()}, 1)
        except _CountError as error:
            answers.append(RewardError(error.reason))
        except UserError:
            raise
        except Exception as error:
            answers.append(error)
        except SystemExit as error:
            answers.append(RewardError(f"called sys.exit({error.code})"))
        except TookTooLong:
            answers.append(RewardError(f"took longer than {reward.timeout:g} s"))
            num_late += 1
    return answers


def _run(reward: Reward, columns: dict[str, list[Any]], count: int) -> list[Any]:
    """One call, awaited if it is async, within the time limit. Raises what the function raises, and TookTooLong."""
    with chdir("."), time_limit(reward.timeout):  # where it leaves the run's folder is found again
        strikes("in_reward")
        answer = reward.function(**columns, **reward.options)
        if inspect.isawaitable(answer):
            answer = asyncio.run(_awaited(answer))
        return _checked_length(reward, answer, count)


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


def _accepted(reward: Reward, arguments: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Only what the function takes, unless it takes everything."""
    parameters = inspect.signature(reward.function).parameters.values()
    clash = sorted(set(reward.options) & set(arguments))
    if clash:
        raise UserError(f"reward {reward.name}: the option {clash[0]} is a column of the data too; rename one of them")
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(arguments)
    unknown = sorted(set(reward.options) - {parameter.name for parameter in parameters})
    if unknown:
        raise UserError(f"reward {reward.name}: the function takes no {unknown[0]}, which is among its options")
    given = {*arguments, *reward.options}
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in given]
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
        raise _CountError(reward.name, len(answer), num_completions)
    return list(answer)


def _number(answer: Any) -> tuple[float | None, str]:
    """A finite number, or None and the reason (empty where the function chose to abstain)."""
    if answer is None:
        return None, ""
    if isinstance(answer, Exception):
        return None, str(answer) if isinstance(answer, RewardError) else f"raised {type(answer).__name__}: {answer}"
    if isinstance(answer, str | bytes):
        return None, f"returned the text {answer!r:.60}, not a number"
    try:
        value = float(answer)
    except (TypeError, ValueError, OverflowError):
        return None, f"returned {answer!r:.60}, not a number"
    return (value, "") if math.isfinite(value) else (None, f"returned {value}")
