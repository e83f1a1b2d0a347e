"""Named sections of a step, and the stopwatch that says how long each took.

The places where a step spends its time name themselves, with `with section("score"):` or as a decorator. Where no stopwatch
runs, which is always but in a few steps of `--profile`, that costs less than a microsecond.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from contextvars import ContextVar
from types import TracebackType

OTHER = "other"


class Stopwatch:
    """Nanoseconds by section. Every moment belongs to exactly one, so that the sections add up to the whole.

    A section within another counts only where it refines it, as "sample/draw" does "sample"; else the outer one keeps the
    time: what an evaluation samples belongs to "evaluate". What is in no section is "other".
    products: by section, the multiplications and additions of those matrix products that are counted.
    on_turn: called with the section that begins, before the clock is read.
    """

    def __init__(self, on_turn: Callable[[str], None] | None = None) -> None:
        self.nanoseconds: dict[str, int] = {OTHER: 0}
        self.calls: dict[str, int] = {}
        self.products: dict[str, float] = {}
        self._on_turn = on_turn
        self._inside = [OTHER]
        if on_turn is not None:
            on_turn(OTHER)
        self._last = time.perf_counter_ns()

    def enter(self, name: str) -> None:
        outer = self._inside[-1]
        if outer == OTHER or name.startswith(f"{outer}/"):
            self.calls[name] = self.calls.get(name, 0) + 1
            self._turn(outer, name)
            self._inside.append(name)
        else:
            self._inside.append(outer)

    def leave(self) -> None:
        inner = self._inside.pop()
        if inner != self._inside[-1]:
            self._turn(inner, self._inside[-1])

    def count_products(self, forward: float, backward: float) -> None:
        """See `count_products`."""
        here = self._inside[-1]
        for name, count in ((here, forward), (here.replace("/forward", "/backward"), backward)):
            self.products[name] = self.products.get(name, 0.0) + count

    def stop(self) -> None:
        """Add the time since the last turn to the section under way."""
        self._turn(self._inside[-1], self._inside[-1])

    def _turn(self, ends: str, begins: str) -> None:
        if self._on_turn is not None:
            self._on_turn(begins)
        now = time.perf_counter_ns()
        self.nanoseconds[ends] = self.nanoseconds.get(ends, 0) + now - self._last
        self._last = now


class Section(ContextDecorator):
    """See `section`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        stopwatch = _running.get()
        if stopwatch is not None:
            stopwatch.enter(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stopwatch = _running.get()
        if stopwatch is not None:
            stopwatch.leave()


def section(name: str) -> Section:
    """Name the time that a block or a function takes: `with section("score"):`, or `@section("score")`."""
    return Section(name)


def count_products(forward: float, backward: float = 0.0) -> None:
    """Note the multiplications and additions of matrix products in the section under way, and of their backward pass in that of its own."""
    stopwatch = _running.get()
    if stopwatch is not None:
        stopwatch.count_products(forward, backward)


@contextmanager
def timing(stopwatch: Stopwatch) -> Iterator[Stopwatch]:
    """Let a stopwatch time the sections that this thread enters, and stop it. It may not begin inside a section."""
    _running.set(stopwatch)
    try:
        yield stopwatch
    finally:
        _running.set(None)
        stopwatch.stop()


_running: ContextVar[Stopwatch | None] = ContextVar("running", default=None)
