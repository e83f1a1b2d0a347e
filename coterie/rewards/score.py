"""Run the rewards over groups, keep every part, and let what fails abstain.

Legend: P prompts, G completions per prompt, B = P*G.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from contextlib import chdir
from typing import Any

import torch

from coterie.errors import RewardError, UserError
from coterie.rewards.alone import CountError, one_by_one
from coterie.rewards.arguments import arguments_of, columns_of
from coterie.rewards.base import Reward
from coterie.rewards.check import check_arguments
from coterie.rewards.copies import Copies, own_options
from coterie.rewards.time_limit import TookTooLong, time_limit
from coterie.sections import section
from coterie.stopping import may_stop
from coterie.types import Entry, Group, RewardFailure, Scored, entries_of
from coterie.user_code import awaited, described


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
    first_error: Exception | None = None
    copies = Copies()
    for reward in rewards:
        answers = _answers(reward, entries_of(groups), copies, max_failed_share)
        may_stop()
        read = [_number(answer) for answer in answers]
        part = torch.tensor([math.nan if value is None else value for value, _ in read], dtype=torch.float64)
        parts[reward.name] = part = part.view(shape)
        spoke |= ~part.isnan()
        total += reward.weight * part.nan_to_num(nan=0.0)
        for index, ((_, reason), answer) in enumerate(zip(read, answers, strict=True)):
            if reason:
                failures.append(RewardFailure(reward.name, index // shape[1], index % shape[1], reason))
                first_error = first_error or (answer if isinstance(answer, Exception) else None)
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
        ) from first_error  # whose traceback --debug shows
    return Scored(groups, total.masked_fill(~spoke, math.nan), parts, failures)


def _answers(reward: Reward, entries: Sequence[Entry], copies: Copies, max_failed_share: float) -> list[Any]:
    """What the reward says of each completion [B]: an exception where it failed, None where it says nothing.

    What the function raises, leaves out, or that it takes too long, is found out one by one. Raises UserError where it gives
    too few or too many values for all, and one for each alone: then nobody can tell whose is missing.
    """
    answers: list[Any] = [None] * len(entries)
    concerned = [i for i, (prompt, _) in enumerate(entries) if reward.applies_to(prompt.columns)]
    if not concerned:
        return answers
    columns = columns_of(entries[i][0] for i in concerned)
    check_arguments(reward, columns)
    names = reward.signature.accepted(columns)
    for i in concerned:
        words = reward.signature.lacking(entries[i][0])
        answers[i] = RewardError(words) if words else None
    whole = [i for i in concerned if answers[i] is None]

    def call(some: Sequence[int]) -> list[Any]:
        return _run(reward, arguments_of([entries[i] for i in some], names, copies), len(some))

    try:
        found = call(whole)
    except CountError:
        found = one_by_one(reward, call, whole, max_failed_share * len(entries))
        if not any(isinstance(answer, Exception) for answer in found):
            raise
    except UserError:
        raise
    except (Exception, SystemExit, TookTooLong):  # a user's function may raise anything: find out for which completions
        found = one_by_one(reward, call, whole, max_failed_share * len(entries))
    for i, answer in zip(whole, found, strict=True):
        answers[i] = answer
    return answers


def _run(reward: Reward, columns: dict[str, list[Any]], count: int) -> list[Any]:
    """One call, awaited if it is async, within the time limit. Raises what the function raises, and TookTooLong."""
    # where it leaves the run's folder, or turns gradients off, that ends with the call
    with chdir("."), torch.set_grad_enabled(torch.is_grad_enabled()), time_limit(reward.timeout):
        answer = awaited(reward.function(**columns, **own_options(reward.options)))
        return _checked_length(reward, answer, count)


def _checked_length(reward: Reward, answer: Any, num_completions: int) -> list[Any]:
    unordered = isinstance(answer, str | bytes | Mapping | Set)
    if unordered or not hasattr(answer, "__len__") or not hasattr(answer, "__iter__"):
        raise UserError(
            f"reward {reward.name}: returned {answer!r:.80}; a list with a number or None for each is needed"
        )
    if len(answer) != num_completions:
        raise CountError(reward.name, len(answer), num_completions)
    return list(answer)


def _number(answer: Any) -> tuple[float | None, str]:
    """A finite number, or None and the reason (empty where the function chose to abstain)."""
    if answer is None:
        return None, ""
    if isinstance(answer, Exception):
        return None, str(answer) if isinstance(answer, RewardError) else f"raised {described(answer)}"
    if isinstance(answer, str | bytes):
        return None, f"returned the text {answer!r:.60}, not a number"
    try:
        value = float(answer)
    except (TypeError, ValueError, OverflowError):
        return None, f"returned {answer!r:.60}, not a number"
    return (value, "") if math.isfinite(value) else (None, f"returned {value}")
