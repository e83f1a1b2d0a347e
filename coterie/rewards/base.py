"""What a reward is: a function of completions that anybody may write, with its place in a recipe."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from coterie.rewards.arguments import Signature, arguments_of, columns_of
from coterie.rewards.copies import Copies, own_options
from coterie.types import Group, entries_of

# What a function gives for a completion: a number; None where it has nothing to say of it; an exception where it failed
Part = float | Exception | None


class RewardFunction(Protocol):
    """`fn(prompts, completions, **columns) -> list[float | None]`, the signature TRL's users have; it may be async.

    It gets one entry per completion in each argument, all of them its own to change, and gives one part for each.
    """

    def __call__(self, *args: Any, **columns: Any) -> Sequence[Part] | Awaitable[Sequence[Part]]: ...


@dataclass(frozen=True)
class Reward:
    """A reward function with its place in a recipe.

    options: keyword arguments beside the columns. where: only completions whose prompt's columns hold these values, or one of a
    list of values. timeout: seconds of a call.

    A function may have any of these beside its call; this is the one place that looks for them:

    | begin(**arguments) | starts on a group while others are still sampled; the call that follows finds what it began |
    | uses_cores         | whether what it begins computes on this machine; taken to be so where it does not say       |
    | close()            | ends the processes, connections or the model that it holds                                  |
    | reads_tokens       | whether it reads a parameter `completion_ids`; taken to be so where it does not say         |
    | sandbox_report     | of one that runs programs: which sandbox holds them, which is started and tried for that    |
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

    @cached_property
    def signature(self) -> Signature:
        return Signature.of(self.function, self.options)

    def can_begin(self, spare_cores: bool) -> bool:
        """Whether the function can start on a group while others are sampled, and without cores where none are to spare."""
        return hasattr(self.function, "begin") and (spare_cores or not getattr(self.function, "uses_cores", True))

    def begin(self, group: Group) -> None:
        """Let the function start on a group, if it can; what goes wrong here goes wrong again in the call that follows."""
        begin = getattr(self.function, "begin", None)
        if begin is None or not self.applies_to(group.prompt.columns):
            return
        with suppress(Exception):
            if not self.signature.lacking(group.prompt):
                names = self.signature.accepted(columns_of([group.prompt]))
                begin(**arguments_of(entries_of([group]), names, Copies()), **own_options(self.options))

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
            self.function.close()
