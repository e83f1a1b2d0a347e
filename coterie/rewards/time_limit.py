"""A time limit on code that runs in this process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coterie.deadline import hard_deadline, running

_GRACE = 20.0  # seconds in which Python code can answer the alarm
_AGAIN = 0.2  # the alarm rings on, for code that catches everything


class TookTooLong(BaseException):
    """Not an Exception, so that a function's own `except Exception` does not swallow it."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise TookTooLong in the block after `seconds`. None sets no limit.

    Python code and sleep are interrupted. What spins in C can't be: `_GRACE` seconds later the process ends and prints where
    it hung. Only the main thread of a process can be interrupted; elsewhere there is no limit.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    end = running() + seconds

    def ring(*_: Any) -> None:
        left = end - running()
        if left < _AGAIN:
            raise TookTooLong
        signal.setitimer(signal.ITIMER_REAL, left, _AGAIN)  # the process was stopped meanwhile

    before = signal.signal(signal.SIGALRM, ring)
    with hard_deadline(seconds + _GRACE):
        signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
