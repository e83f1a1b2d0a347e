"""A stop that was asked for, and where the step under way may be left for it: before it changes anything.

A step of a large model takes minutes, and what asks a process to stop gives it seconds. Until its weights move, a step can be
thrown away: a resume takes it again, the same.
"""

from __future__ import annotations


class StepLeftError(BaseException):
    """The step under way is given up. Not an Exception, so that nothing on the way takes it for a failure."""


_asked = _too_late = False


def ask(stop: bool = True) -> None:
    """The run should stop, or with False go on."""
    global _asked
    _asked = stop


def allow(leaving: bool) -> None:
    """Whether a step may be left from here on: True at its start, False once the weights are about to move."""
    global _too_late
    _too_late = not leaving


def may_stop() -> None:
    """Between two pieces of work: StepLeftError where a stop was asked for and nothing has changed yet."""
    if _asked and not _too_late:
        raise StepLeftError
