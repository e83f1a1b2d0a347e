"""Where programs that a model wrote are run: what goes in, what comes out, and which sandboxes there are.

A program that is wrong, raises, runs too long or attacks is the program's doing, and is said of each of its outputs. A sandbox that
could not run it is not, and is said in `Outcome.failed`. Nothing here is told what the right output is: the reward `code` compares.
"""

from __future__ import annotations

import importlib
import json
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from coterie.errors import UserError, nearest

MAX_INPUTS = 500
TOKEN_VARIABLE = "COTERIE_SANDBOX_TOKEN"  # the environment variable that holds the key to a sandbox server


@dataclass(frozen=True)
class Limits:
    """What one program may use, for all its inputs together.

    seconds: of the processor, whole ones; and where wall_seconds is None of computing and sleep together, while a busy machine may
    keep the program waiting until three times as many have passed. wall_seconds: until its end, whatever it does. memory_megabytes:
    beside the interpreter's own. output_bytes: of everything that it returns or prints.
    """

    seconds: float = 5.0
    memory_megabytes: int = 512
    output_bytes: int = 1_000_000
    wall_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("seconds", "memory_megabytes", "output_bytes", "wall_seconds"):
            value = getattr(self, name)
            if name == "wall_seconds" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise UserError(f"sandbox: {name} must be a number above 0, not {value!r}")

    @property
    def cpu_seconds(self) -> int:
        return math.ceil(self.seconds)

    @property
    def wall(self) -> float:
        return 3 * self.seconds if self.wall_seconds is None else self.wall_seconds


@dataclass(frozen=True)
class Program:
    """A program and what it is run on: each of `inputs` is a list of arguments for `function`, or its standard input as a text.

    function: the name of a function, or of a method as `Class.method`, that is called for each input. None runs the whole program.
    """

    source: str
    inputs: Sequence[Any]
    function: str | None = None
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        kind = str if self.function is None else list
        if not 0 < len(self.inputs) <= MAX_INPUTS:
            raise UserError(f"sandbox: a program has 1 to {MAX_INPUTS} inputs, not {len(self.inputs)}")
        for one in self.inputs:
            if not isinstance(one, kind):
                what = "a text, its standard input" if kind is str else "a list of arguments"
                raise UserError(f"sandbox: an input must be {what}, not {one!r:.60}")


@dataclass(frozen=True)
class Output:
    """What came of one input: `data`, or a text where the whole program ran, or why there is none.

    data: JSON that keeps types apart, as inside/runner.py writes it: lists, numbers, texts, null, and objects with one key,
    {"tuple": [...]}, {"set": [...]}, {"dict": [[key, value], ...]}. It stays a text until it is asked for, because a program can
    choose one that takes much more room when it is read.
    """

    data: str = "null"
    text: str = ""
    error: str | None = None

    @property
    def value(self) -> Any:
        return json.loads(self.data)


@dataclass(frozen=True)
class Outcome:
    """What came of a program: an output for each input; or `failed`, why the sandbox could not run it, and no outputs."""

    outputs: tuple[Output, ...] = ()
    failed: str | None = None


class SandboxError(Exception):
    """A sandbox can't be used, or can't be used any more. The message says why."""


class Sandbox(ABC):
    """Runs programs, several at a time. `report` is a line for the log: which sandbox this is and what it was seen to hold."""

    report: str

    def __init__(self, num_workers: int) -> None:
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="sandbox")

    @abstractmethod
    def run(self, program: Program) -> Outcome: ...

    def submit(self, program: Program) -> Future[Outcome]:
        """Run it when there is a place."""
        return self._threads.submit(self.run, program)

    def run_all(self, programs: Sequence[Program]) -> list[Outcome]:
        """Several at a time, in the order given."""
        return list(self._threads.map(self.run, programs))

    def close(self) -> None:
        """End its processes and connections, once the programs that run are done."""
        self._threads.shutdown(cancel_futures=True)


def make_sandbox(name: str = "auto", *, num_workers: int | None = None) -> Sandbox:
    """The sandbox of that name, tested with hostile programs; "auto" is the strictest that holds them on this machine.

    A URL is a sandbox server's. Raises UserError with the reasons where none holds: model-written code is never run in a plain
    process, unless "subprocess" is asked for by name. num_workers: programs at a time; one for each core where None.
    """
    if name.startswith(("http://", "https://")):
        return _make("http", name, num_workers)
    if name == "http":
        raise UserError("sandbox: http needs the address of a sandbox server; write sandbox: http://host:port")
    if name == "auto":
        return _first_that_holds(num_workers)
    if name not in _HOMES:
        raise UserError(
            f"sandbox: there is no {name!r}; {nearest(name, ['auto', *_HOMES])}, or a server's http address"
        )
    if name == "subprocess":
        warnings.warn(
            "sandbox: subprocess was asked for: model-written programs run with all of this user's rights", stacklevel=2
        )
    try:
        return _make(name, None, num_workers)
    except SandboxError as failure:
        raise UserError(f"sandbox: {name} can't be used here: {failure}") from failure


def _first_that_holds(num_workers: int | None) -> Sandbox:
    reasons = []
    for name in ("bubblewrap", "landlock"):
        try:
            return _make(name, None, num_workers)
        except SandboxError as failure:
            reasons.append(f"{name}: {failure}")
    raise UserError(
        "sandbox: model-written programs are not run, because nothing on this machine holds them. "
        f"{'; '.join(reasons)}. A sandbox server (sandbox: http://...) does it elsewhere; docs/sandbox.md says what is needed"
    )


def _make(name: str, url: str | None, num_workers: int | None) -> Sandbox:
    module, _, kind = _HOMES[name].partition(":")
    make: Callable[..., Sandbox] = getattr(importlib.import_module(module), kind)
    return make(num_workers=num_workers) if url is None else make(url, num_workers=num_workers)


_HOMES = {
    "bubblewrap": "coterie.sandbox.forked:Bubblewrap",
    "landlock": "coterie.sandbox.forked:Landlock",
    "subprocess": "coterie.sandbox.forked:Subprocess",
    "http": "coterie.sandbox.remote:Remote",
}
