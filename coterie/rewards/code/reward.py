"""The built-in reward `code`: run the Python of a completion against tests, where it can do no harm."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import httpx

from coterie.errors import RewardError, UserError
from coterie.rewards.code.blocks import program_in
from coterie.rewards.code.tests import Equality, Test, passes, read_tests
from coterie.rewards.text_of import Chat, completion_text
from coterie.sandbox.base import TOKEN_VARIABLE, Limits, Outcome, Program, Sandbox
from coterie.sandbox.make import make_sandbox
from coterie.trust import check_risk, check_sending

# What a recipe may give a program before it is asked about: far above what a test needs, far below what ends a machine
_UNASKED = {
    "seconds": 300,
    "wall_seconds": 900,
    "memory_megabytes": 16_384,
    "output_bytes": 100_000_000,
    "workers": 256,
}


@dataclass(frozen=True)
class Code:
    """The share of a row's tests that the program in a completion passes, or with score "all" 1 for every one of them.

    The program is the last block fenced as Python that defines the function, with the earlier ones that it needs, or the whole
    completion where there is none (blocks.program_in). Columns: tests, a list of
    {"args": [...], "expected": ...} for a function or {"stdin": "...", "stdout": "..."} for a whole program; and function,
    its name, where the rows differ, otherwise the option of that name. A program that fails, hangs or attacks fails its tests;
    a sandbox that fails abstains. Equal programs with equal inputs are run once a step.

    sandbox: auto, bubblewrap, landlock, subprocess, or the address of a sandbox server. seconds: for all tests of a completion,
    computing or asleep; where a busy machine keeps it waiting up to three times as many pass. wall_seconds: in place of that, of any
    kind. tolerance, ints_are_floats, tuples_are_lists, exact_text: what counts as equal, as tests.Equality says.
    """

    function: str = ""
    score: Literal["share", "all"] = "share"
    sandbox: str = "auto"
    seconds: float = 5.0
    wall_seconds: float = 0.0
    memory_megabytes: int = 512
    output_bytes: int = 1_000_000
    tolerance: float = 1e-9
    ints_are_floats: bool = False
    tuples_are_lists: bool = True
    exact_text: bool = False
    workers: int = 0
    # The programs of a step that the sandbox was given
    _under_way: dict[str, Future[Outcome]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.score not in ("share", "all"):
            raise UserError(f"code: score is share or all, not {self.score!r}")
        if not isinstance(self.sandbox, str):
            raise UserError(f"code: sandbox is a name or an address, not {self.sandbox!r:.80}")
        for name in ("wall_seconds", "tolerance"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise UserError(f"code: {name} must be a number from 0 on, not {value!r}")
        if isinstance(self.workers, bool) or not isinstance(self.workers, int) or self.workers < 0:
            raise UserError(f"code: workers must be a number of processes, or 0 for one a core, not {self.workers!r}")
        _ = self._limits  # checks itself
        self._check_trust()

    def _check_trust(self) -> None:
        """UserError for what a recipe from somebody else may not ask for: a sandbox that holds less, or one elsewhere."""
        if self.sandbox == "subprocess":
            check_risk("code: sandbox: subprocess would run what a model writes with all of this user's rights")
        for name, most in _UNASKED.items():
            if getattr(self, name) > most:
                check_risk(
                    f"code: {name}: {getattr(self, name)!r:.40} is more than the {most:,} that a program gets unasked"
                )
        if not self.uses_cores:
            try:
                url = httpx.URL(self.sandbox)
            except httpx.InvalidURL as error:
                raise UserError(f"code: sandbox: {self.sandbox!r:.80} is no address: {error}") from None
            token = TOKEN_VARIABLE if os.environ.get(TOKEN_VARIABLE) else ""
            check_sending("programs and their arguments", str(url), url.host, token, "rewards: code: sandbox")

    def __call__(
        self,
        completions: Sequence[str | Chat],
        tests: Sequence[Any],
        function: Sequence[str | None] | None = None,
    ) -> list[float | Exception | None]:
        programs = self._programs(completions, tests, function)
        try:
            texts = [self._submit(program) for program, _ in programs]
            outcomes = {text: self._under_way[text].result() for text in texts}
        finally:
            for outcome in self._under_way.values():
                outcome.cancel()
            self._under_way.clear()
        return [self._judge(outcomes[text], row) for text, (_, row) in zip(texts, programs, strict=True)]

    def begin(
        self,
        completions: Sequence[str | Chat],
        tests: Sequence[Any],
        function: Sequence[str | None] | None = None,
    ) -> None:
        """Run these programs already. The next call, which has them among others, waits for those that are not done."""
        for program, _ in self._programs(completions, tests, function):
            self._submit(program)

    @property
    def uses_cores(self) -> bool:
        """Whether programs run on this machine."""
        return not self.sandbox.startswith(("http://", "https://"))

    def _submit(self, program: Program) -> str:
        """Have a program run, once where it comes again. Returns what it is known by."""
        text = json.dumps([program.source, program.inputs, program.function])
        if text not in self._under_way:
            self._under_way[text] = self._started.submit(program)
        return text

    @property
    def _limits(self) -> Limits:
        return Limits(self.seconds, self.memory_megabytes, self.output_bytes, self.wall_seconds or None)

    def _programs(
        self, completions: Sequence[str | Chat], tests: Sequence[Any], function: Sequence[str | None] | None
    ) -> list[tuple[Program, list[Test]]]:
        """The program of each completion, and what it is judged by."""
        names = [name or self.function or None for name in function or [None] * len(completions)]
        wanted = [read_tests(one) for one in tests]
        return [
            (self._program(completion_text(completion), row, name), row)
            for completion, row, name in zip(completions, wanted, names, strict=True)
        ]

    def _program(self, text: str, tests: Sequence[Test], function: str | None) -> Program:
        """The program with what its tests give it, and without what they expect."""
        whole = tests[0].whole
        if not whole and function is None:
            raise UserError(
                "code: tests with args need the name of a function; give the option or the column `function`"
            )
        given = [test.given for test in tests]
        try:
            json.dumps(given)
        except (TypeError, ValueError) as error:
            raise UserError(f"code: the arguments of a test must be JSON: {error}") from error
        called = None if whole else function
        source = program_in(text, called, reads=whole and any(test.given for test in tests))
        return Program(source, given, called, self._limits)

    def _judge(self, outcome: Outcome, tests: Sequence[Test]) -> float | Exception:
        if outcome.failed is not None:
            return RewardError(f"the sandbox failed: {outcome.failed}")
        equality = Equality(self.tolerance, self.ints_are_floats, self.tuples_are_lists, self.exact_text)
        passed = [passes(output, test, equality) for output, test in zip(outcome.outputs, tests, strict=True)]
        return float(all(passed)) if self.score == "all" else sum(passed) / len(passed)

    @cached_property
    def _started(self) -> Sandbox:
        """The sandbox, from the first call on."""
        return make_sandbox(self.sandbox, num_workers=self.workers or None)

    @property
    def sandbox_report(self) -> str:
        """Which sandbox is used and what it was seen to hold."""
        return self._started.report

    def close(self) -> None:
        sandbox = self.__dict__.pop("_started", None)
        if sandbox is not None:
            sandbox.close()
