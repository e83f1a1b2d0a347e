"""What a reward is: a function of completions that anybody may write, and what it may have besides.

All but the call may be missing. `Reward` is the one place that looks for it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from coterie.rewards.arguments import Copies, Signature, columns_of, entries_of, own_options
from coterie.types import Group

Values = Sequence[float | Exception | None]


class RewardFunction(Protocol):
    """`fn(prompts, completions, **columns) -> list[float | None]`, the signature TRL's users have; it may be async.

    It gets one entry per completion in each argument, all of them its own to change. None abstains: the reward says nothing of that
    completion; an exception in the list is a failure.
    """

    def __call__(self, *args: Any, **columns: Any) -> Values | Awaitable[Values]: ...


class EarlyReward(RewardFunction, Protocol):
    """One that may begin on a group while others are still sampled; the call that follows finds what it began."""

    def begin(self, *args: Any, **columns: Any) -> None: ...

    @property
    def uses_cores(self) -> bool:
        """Whether what it begins computes on this machine; taken to where it does not say."""
        ...


class HoldingReward(RewardFunction, Protocol):
    """One that holds processes or connections until it is closed."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Reward:
    """A reward function with its place in a recipe.

    options: keyword arguments beside the columns. where: only completions whose prompt's columns hold these values, or one of a
    list of values. timeout: seconds of a call.
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

    def signature(self) -> Signature:
        return Signature(self.function, self.options, self.name)

    def can_begin(self, spare_cores: bool) -> bool:
        """Whether the function can start on a group while others are sampled, and without cores where none are to spare."""
        return hasattr(self.function, "begin") and (spare_cores or not getattr(self.function, "uses_cores", True))

    def begin(self, group: Group) -> None:
        """Let the function start on a group, if it can; what goes wrong here goes wrong again in the call that follows."""
        if not hasattr(self.function, "begin") or not self.applies_to(group.prompt.columns):
            return
        with suppress(Exception):
            signature = self.signature()
            if not signature.lacking(group.prompt):
                names = signature.accepted(columns_of([group.prompt]))
                arguments = Copies().arguments(entries_of([group]), names)
                cast(EarlyReward, self.function).begin(**arguments, **own_options(self.options))

    @property
    def reads_tokens(self) -> bool:
        """Whether it needs `completion_ids` where its signature has them; its own word where it says so."""
        return bool(getattr(self.function, "reads_tokens", True))

    @property
    def sandbox_report(self) -> str:
        """What to say in a run of the sandbox that it uses, which is started and tried for that; empty where it uses none."""
        return str(getattr(self.function, "sandbox_report", ""))

    def close(self) -> None:
        """End its processes and connections, where it has any."""
        if hasattr(self.function, "close"):
            cast(HoldingReward, self.function).close()
