"""Faults on purpose, so that tests can break a real run where they want to.

COTERIE_FAULT=point:step[:action], and for one point in_save:file:step[:action]. Points: after_sample, in_reward, before_backward,
before_step, in_save (before the file of that number, from 1), after_save, in_record. A fault strikes once, the first time that a
stage is in that step. Without the variable nothing here does anything.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass

POINTS = ("after_sample", "in_reward", "before_backward", "before_step", "in_save", "after_save", "in_record")
ACTIONS = ("kill", "term", "interrupt", "raise", "full", "hang", "nan")


@dataclass
class Fault:
    """Where it strikes, and what happens there: kill and nan are the commonest."""

    point: str
    step: int
    action: str
    file: int | None = None

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Raises ValueError for what names no fault."""
        point, *rest = text.split(":")
        if point not in POINTS:
            raise ValueError(f"COTERIE_FAULT={text}: there is no point {point!r}; allowed: {', '.join(POINTS)}")
        numbers = 2 if point == "in_save" else 1
        action = rest[numbers] if len(rest) > numbers else "kill"
        if (
            len(rest) not in (numbers, numbers + 1)
            or not all(n.isdecimal() for n in rest[:numbers])
            or action not in ACTIONS
        ):
            raise ValueError(f"COTERIE_FAULT={text}: write point:step[:action]; actions: {', '.join(ACTIONS)}")
        return cls(point, int(rest[numbers - 1]), action, int(rest[0]) if point == "in_save" else None)


_planned: Fault | None = None
_step = 0


def plan(text: str) -> None:
    """Let this fault strike, as COTERIE_FAULT does."""
    global _planned
    _planned = Fault.parse(text)


def at_step(step: int) -> None:
    """The run is in this step now."""
    global _step
    _step = step


def strikes(point: str, *, file: int | None = None, step: int | None = None) -> bool:
    """Let the planned fault strike if this is its place. Returns whether a number here should become NaN.

    step: what a thread beside the run is about; without it the step that the run is in.
    """
    global _planned
    fault = _planned
    if fault is None or (fault.point, fault.step, fault.file) != (point, _step if step is None else step, file):
        return False
    _planned = None
    if fault.action == "raise":
        raise RuntimeError(f"a fault on purpose: {point}")
    if fault.action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if fault.action == "hang":
        time.sleep(10**6)
    if fault.action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[fault.action])
    return fault.action == "nan"


if "COTERIE_FAULT" in os.environ:
    plan(os.environ["COTERIE_FAULT"])
_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT}
