"""The moment at which the process ends, if what it does hangs where no exception can reach it: in C, or with the lock held."""

from __future__ import annotations

import faulthandler
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

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
