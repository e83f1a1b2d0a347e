"""What a reward is: a function of completions that anybody may write, and what it may have besides.

Every function is a `RewardFunction`. The other protocols here say what one may have in addition; a function has any of them, or none,
and `Reward` is the one place that looks for it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from coterie.rewards.arguments import Copies, Signature, columns_of, own_options
from coterie.types import Group, entries_of

# What a function gives for a completion: a number; None where it has nothing to say of it; an exception where it failed
Part = float | Exception | None


class RewardFunction(Protocol):
    """`fn(prompts, completions, **columns) -> list[float | None]`, the signature TRL's users have; it may be async.

    It gets one entry per completion in each argument, all of them its own to change, and gives one part for each.
    """

    def __call__(self, *args: Any, **columns: Any) -> Sequence[Part] | Awaitable[Sequence[Part]]: ...


class EarlyReward(RewardFunction, Protocol):
    """A reward that may begin on a group while others are still sampled; the call that follows finds what it began.

    uses_cores: whether what it begins computes on this machine; taken to be so where it does not say.
    """

    uses_cores: bool

    def begin(self, *args: Any, **columns: Any) -> None: ...


class HoldingReward(RewardFunction, Protocol):
    """A reward that holds processes, connections or a model until it is closed."""

    def close(self) -> None: ...


class TokenReward(RewardFunction, Protocol):
    """A reward with the parameter `completion_ids` that says whether it reads them; taken to be so where it does not say."""

    reads_tokens: bool


class SandboxedReward(RewardFunction, Protocol):
    """A reward that runs programs. sandbox_report: which sandbox holds them, which is started and tried for that."""

    sandbox_report: str


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
        """Whether it needs `completion_ids` where its signature has them."""
        return bool(getattr(self.function, "reads_tokens", True))

    @property
    def sandbox_report(self) -> str:
        """Which sandbox it uses, for the record of a run; empty where it uses none."""
        return str(getattr(self.function, "sandbox_report", ""))

    def close(self) -> None:
        """End its processes and connections, where it has any."""
        if hasattr(self.function, "close"):
            cast(HoldingReward, self.function).close()
