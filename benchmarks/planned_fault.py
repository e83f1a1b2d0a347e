"""A fault on purpose in a real run, so that it can be broken where one wants to. Nothing of it is in the package: the functions
that a run goes through are wrapped from outside.

`python benchmarks/planned_fault.py POINT:STEP[:ACTION] train ...` is `coterie train ...` with that fault, and for one point it is
in_save:FILE:STEP[:ACTION]. A fault strikes once, the first time that a stage is in that step.
"""

from __future__ import annotations

import errno
import importlib
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Patch = Callable[[Any, str, Any], None]  # setattr, or pytest's, which is undone
ACTIONS = ("kill", "term", "interrupt", "raise", "full", "hang", "nan")
_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT}


@dataclass
class Fault:
    """Where it strikes, and what happens there: kill and nan are the commonest. now: the step that the run is in."""

    point: str
    step: int
    action: str
    file: int | None = None
    now: int = 0
    struck: bool = False

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Raises ValueError for what names no fault."""
        point, *rest = text.split(":")
        if point not in POINTS:
            raise ValueError(f"{text}: there is no point {point!r}; allowed: {', '.join(POINTS)}")
        numbers = 2 if point == "in_save" else 1
        action = rest[numbers] if len(rest) > numbers else "kill"
        if (
            len(rest) not in (numbers, numbers + 1)
            or not all(n.isdecimal() for n in rest[:numbers])
            or action not in ACTIONS
        ):
            raise ValueError(f"{text}: write point:step[:action]; actions: {', '.join(ACTIONS)}")
        return cls(point, int(rest[numbers - 1]), action, int(rest[0]) if point == "in_save" else None)

    def strikes(self, *, file: int | None = None, step: int | None = None) -> bool:
        """Strike if this is the place. Returns whether a number here should become NaN.

        step: what a thread beside the run is about; without it the step that the run is in.
        """
        if self.struck or (self.step, self.file) != (self.now if step is None else step, file):
            return False
        self.struck = True
        if self.action == "raise":
            raise RuntimeError(f"a fault on purpose: {self.point}")
        if self.action == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.action == "hang":
            time.sleep(10**6)
        if self.action in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[self.action])
        return self.action == "nan"


def plan(text: str, patch: Patch = setattr) -> Fault:
    """Let this fault strike in the runs of this process."""
    from coterie.training.session import Session

    fault = Fault.parse(text)
    remaining = Session.remaining

    def counted(session: Session, stage: str, num_steps: int) -> Iterator[int]:
        for fault.now in remaining(session, stage, num_steps):
            yield fault.now

    patch(Session, "remaining", counted)
    home, name, wrap = POINTS[fault.point]
    importlib.import_module("coterie.training.train")
    owner: Any = importlib.import_module(home.partition(":")[0])
    real = getattr(getattr(owner, home.partition(":")[2], owner), name)
    wrapped = wrap(fault, real)
    if ":" in home:  # a method
        patch(getattr(owner, home.partition(":")[2]), name, wrapped)
    for module in [module for path, module in sys.modules.items() if path.startswith("coterie.")]:
        if vars(module).get(name) is real and module.__name__ != "coterie.evals.evaluate":  # which samples, too
            patch(module, name, wrapped)
    return fault


def _after(fault: Fault, real: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*given: Any, **named: Any) -> Any:
        answer = real(*given, **named)
        fault.strikes()
        return answer

    return wrapped


def _in_reward(fault: Fault, time_limit: Callable[[float | None], AbstractContextManager[None]]) -> Callable[..., Any]:
    """Within the time limit of a reward's call."""

    @contextmanager
    def wrapped(seconds: float | None) -> Iterator[None]:
        with time_limit(seconds):
            fault.strikes()
            yield

    return wrapped


def _before_backward(fault: Fault, take_step: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(optimiser: Any, streams: Any, loss_of: Callable[..., Any], *more: Any, **named: Any) -> Any:
        def loss(number: int, stream: Any) -> Any:
            found = loss_of(number, stream)
            return found * math.nan if fault.strikes() else found

        return take_step(optimiser, streams, loss, *more, **named)

    return wrapped


def _in_save(fault: Fault, write: Callable[..., Any]) -> Callable[..., Any]:
    """Before the file of that number, from 1."""

    def wrapped(file: Path, content: Any) -> Any:
        numbers = re.findall(r"\d+", file.parent.name)
        fault.strikes(file=len(list(file.parent.iterdir())) + 1, step=int(numbers[-1]))
        return write(file, content)

    return wrapped


def _after_save(fault: Fault, write_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(folder: Path, snapshot: Any) -> Any:
        written = write_checkpoint(folder, snapshot)
        fault.strikes(step=snapshot.position.step)
        return written

    return wrapped


# Of each point the module, or the class in it, whose function is wrapped, and how
POINTS: dict[str, tuple[str, str, Callable[[Fault, Any], Any]]] = {
    "after_sample": ("coterie.rollouts.collect", "collect", _after),
    "in_reward": ("coterie.rewards.time_limit", "time_limit", _in_reward),
    "before_backward": ("coterie.training.step", "take_step", _before_backward),
    "before_step": ("coterie.distributed.reduce", "all_agree", _after),  # the last that is done before the weights move
    "in_save": ("coterie.runs.checkpoint", "_write", _in_save),
    "after_save": ("coterie.runs.checkpoint", "write_checkpoint", _after_save),
    "in_record": ("coterie.runs.store:Store", "metrics", _after),  # inside of a step's transaction
}


def main() -> None:
    from coterie.cli import main as command

    plan(sys.argv.pop(1))
    command()


if __name__ == "__main__":
    main()
