"""An end for what hangs: the moment at which the process ends, if it hangs where no exception can reach it, in C or with the lock
held; and a limit on what Python code may compute.

Time for which the process is stopped (Ctrl-Z, SIGSTOP, a frozen container) does not count, where there is a C compiler: the clock is
a thread in C. Without one the time counts, and Python's own watchdog ends the process.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

_SOURCE = Path(__file__).with_suffix(".c")
_DUMP = signal.SIGRTMIN + 7 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2  # one that nobody sends


@contextmanager
def hard_deadline(seconds: float) -> Iterator[None]:
    """End the process, status 1, if the block takes longer: every thread's stack is printed first. Blocks may be nested."""
    clock = _clock()
    clock.moments.append(clock.running() + seconds)
    clock.arm()
    try:
        yield
    finally:
        clock.moments.pop()
        clock.arm()


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


def running() -> float:
    """Seconds on a clock that stands still while the process is stopped."""
    return _clock().running()


class _Clock:
    """The time that the process runs, and its end at the first moment of the blocks under way: `moments`, as `running` counts."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self._in_c = _begun()

    def running(self) -> float:
        return float(self._in_c.running()) if self._in_c is not None else time.monotonic()

    def arm(self) -> None:
        if self._in_c is not None:
            self._in_c.end_at(min(self.moments, default=-1.0))
        elif not self.moments or sys.__stderr__ is None:
            faulthandler.cancel_dump_traceback_later()
        else:
            left = max(0.001, min(self.moments) - self.running())
            faulthandler.dump_traceback_later(left, exit=True, file=sys.__stderr__)


def _begun() -> ctypes.CDLL | None:
    """The thread in C, compiled and begun; None where it can't be. A tenth of a second, once a process."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    try:
        with tempfile.TemporaryDirectory(prefix="coterie-") as folder:
            built = Path(folder) / "deadline.so"
            command = [compiler, "-O1", "-w", "-fPIC", "-shared", "-pthread", str(_SOURCE), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            clock = ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError):
        return None
    clock.running.restype, clock.end_at.argtypes = ctypes.c_double, [ctypes.c_double]
    output = -1
    if sys.__stderr__ is not None:
        output = sys.__stderr__.fileno()
        faulthandler.register(_DUMP, file=sys.__stderr__, all_threads=True)
    return clock if clock.begin(int(_DUMP), output) == 0 else None


_clock = cache(_Clock)  # the process's one clock, since what ends the process is a thread in C
os.register_at_fork(after_in_child=_clock.cache_clear)  # which a forked process does not have: its blocks begin anew
