"""A stop that was asked for, and where the step under way may be left for it: before it changes anything.

A step of a large model takes minutes, and what asks a process to stop gives it seconds. Until its weights move, a step can be
thrown away: a resume takes it again, the same.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Ctrl-C; a service or scheduler; a terminal or a connection that is gone; a scheduler's warning (Slurm); a limit on CPU time.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
_BY_HAND = {signal.SIGINT, signal.SIGTERM}
_ONE_EVENT = 1.0  # seconds in which others belong to the first: a closed terminal sends SIGHUP twice, a service manager two kinds


class StepLeftError(BaseException):
    """The step under way is given up. Not an Exception, so that nothing on the way takes it for a failure."""


_AT_EXIT = 10.0  # seconds for what a reward has left to let go of the process


class Stop:
    """What was asked of a run, and whether it may leave its step for it.

    number: of the signal that asked for a stop, None while none did. may_leave: the step under way; False once the weights move.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.may_leave = True
        self._before: dict[int, Any] = {}  # the handlers that were there, while ours are

    def listen(self, handler: Callable[[int, FrameType | None], None], ignored: list[signal.Signals]) -> None:
        for number in set(SIGNALS).difference(ignored):
            self._before[number] = signal.signal(number, handler)

    def restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


_current: Stop | None = None  # a process's signals are one thing for all of it, to its handlers and to what it forks


def may_stop() -> None:
    """Between two pieces of work: StepLeftError where a stop was asked for and nothing has changed yet."""
    if _current is not None and _current.number is not None and _current.may_leave:
        raise StepLeftError


def weights_move() -> None:
    """From here on the step under way is finished, whatever is asked for."""
    if _current is not None:
        _current.may_leave = False


@contextmanager
def signals(tell: Callable[[int], None]) -> Iterator[Stop]:
    """Within the block one of SIGNALS asks for a stop, which `tell` is called with from a thread; a second one ends the process.

    The handler sets flags. It runs in the main thread, which may be blocked in a write or busy in C, so the number goes through a
    pipe to a thread of its own too, which ends the process where there is a second. What was ignored at the start (nohup) stays ignored. A process that is forked in the
    block has the handlers that were there before. Outside the main thread Python allows no handlers, and nothing is done.
    """
    global _current
    stop, home = Stop(), os.getpid()

    def heed(number: int, _: FrameType | None) -> None:
        if os.getpid() != home:  # forked where Python did not see it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif stop.number is None:
            stop.number = number

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    ignored = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else []
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    listener = threading.Thread(target=_listen, args=(reading, stop, tell), name="signals", daemon=True)
    listener.start()
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    _current = stop
    try:
        stop.listen(heed, ignored)
        yield stop
    finally:
        stop.restore()
        signal.set_wakeup_fd(woken)
        os.write(writing, _END)
        listener.join()
        _current = None
        os.close(reading)
        os.close(writing)


def end_soon(status: int) -> None:
    """Let the process, which is about to exit, end in any case: a pool of which a signal has ended processes too waits for them for ever."""

    def end() -> None:
        time.sleep(_AT_EXIT)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(status)

    threading.Thread(target=end, name="end", daemon=True).start()


_END = b"\0"  # no signal's number


def _listen(reading: int, stop: Stop, tell: Callable[[int], None]) -> None:
    first, since = None, 0.0
    while (read := os.read(reading, 1)) != _END:
        number = read[0]
        if number not in SIGNALS:
            continue
        if first is None:
            first, since = number, time.monotonic()
            stop.number = stop.number or number
            threading.Thread(target=tell, args=(number,), name="notice", daemon=True).start()  # which may block
        elif {number, first} <= _BY_HAND or time.monotonic() - since > _ONE_EVENT:
            os._exit(128 + number)  # an exception could be caught by a reward, or wait for a save


_forking = threading.local()  # mask: of the signals that the forking thread had blocked before


def _hold_signals() -> None:
    """Until a forked process has handlers of its own, a signal to it would go through our pipe, and be taken for one to us."""
    if _current is not None:
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _let_signals_through() -> None:
    mask = _forking.__dict__.pop("mask", None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _as_in_any_process() -> None:
    global _current
    if _current is not None:
        signal.set_wakeup_fd(-1)
        _current.restore()
        _current = None
    _let_signals_through()


os.register_at_fork(before=_hold_signals, after_in_parent=_let_signals_through, after_in_child=_as_in_any_process)
