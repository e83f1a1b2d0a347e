"""A user's reward function in processes of its own: what hangs, crashes or eats memory costs one completion its reward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from coterie.errors import RewardError
from coterie.rewards.workers.pool import WorkerPool


class Isolated:
    """Calls a user's function once for each completion, in a worker, with lists of one entry.

    target: where the workers import it from. function: the same, for its signature. seconds: for one completion. options: the
    names of the arguments that are no columns, and go whole into every call. An async function is awaited in the worker. There
    is no limit on memory, since the code is the user's own and may hold a model. What compares completions with one another
    can't run so.
    """

    def __init__(
        self,
        target: str,
        function: Callable[..., Any],
        num_workers: int,
        seconds: float,
        *,
        options: Collection[str] = (),
    ) -> None:
        self.__signature__ = inspect.signature(function)
        self.__name__ = getattr(function, "__name__", target)
        self._options = frozenset(options)
        self._pool = WorkerPool(target, num_workers=num_workers, seconds=seconds, memory_megabytes=None)

    def __call__(self, **arguments: Any) -> list[Any]:
        """One value, None or RewardError for each completion."""
        columns = {name: values for name, values in arguments.items() if name not in self._options}
        options = {name: value for name, value in arguments.items() if name in self._options}
        count = max((len(values) for values in columns.values()), default=0)
        calls = [{name: values[i : i + 1] for name, values in columns.items()} | options for i in range(count)]
        return [_only(answer) for answer in self._pool.map(calls)]

    def close(self) -> None:
        self._pool.close()


def _only(answer: Any) -> Any:
    """The one entry of what a call returned."""
    if isinstance(answer, RewardError):
        return answer
    if isinstance(answer, str | Mapping) or not isinstance(answer, Sequence):
        return RewardError(f"returned {answer!r:.80}; a list with a number or None is needed")
    if len(answer) != 1:
        return RewardError(f"returned {len(answer)} values for 1 completion")
    return answer[0]
