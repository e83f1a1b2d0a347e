"""Where programs that a model wrote are run: what goes in, what comes out, and what a sandbox is.

A program that is wrong, raises, runs too long or attacks is the program's doing, and is said of each of its outputs. A sandbox that
could not run it is not, and is said in `Outcome.failed`. Nothing here is told what the right output is: the reward `code` compares.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from coterie.errors import UserError

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
        for name, value in vars(self).items():
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
