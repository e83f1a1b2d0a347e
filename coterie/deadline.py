"""An end for what hangs: the moment at which the process ends, if it hangs where no exception can reach it, in C or with the lock
held; and a limit on what Python code may compute."""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_moments: list[float] = []  # of the blocks under way, monotonic


@contextmanager
def hard_deadline(seconds: float) -> Iterator[None]:
    """End the process, status 1, if the block takes longer: every thread's stack is printed first. Blocks may be nested."""
    _moments.append(time.monotonic() + seconds)
    _arm()
    try:
        yield
    finally:
        _moments.pop()
        _arm()


def _arm() -> None:
    if not _moments or sys.__stderr__ is None:
        faulthandler.cancel_dump_traceback_later()
    else:
        left = max(0.001, min(_moments) - time.monotonic())
        faulthandler.dump_traceback_later(left, exit=True, file=sys.__stderr__)


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block once it has computed for so long. What spins in C is not reached, nor another thread than the
    main one; time in which the process stands still does not count."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)
