"""Standard output and error of a run, which outlives them: a full pipe, `| head`, a full disk, a closed terminal.

What is printed is handed to a thread that writes it. What nobody reads, or can't be written, is dropped and counted, and the run
goes on. Only a process's own two streams are replaced: a notebook's are left as they are.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_MOST = 1 << 20  # bytes that wait to be read; more is dropped
_PIECE = 4096  # bytes that are written at once, so that progress shows
_PATIENCE = 5.0  # seconds without progress for which the end waits for the last lines to be read
_FOR_NOW = (errno.ENOSPC, errno.EDQUOT)  # after which a later line may be written again


class Outlet(io.RawIOBase):
    """The end of a stream that never blocks and never raises: bytes wait here for the thread that writes them."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._waiting = bytearray()
        self._awake = threading.Event()
        self._moved = time.monotonic()  # when something was written last
        self._num_dropped = 0  # lines, since a note last said so
        self._gone = False
        self._direct = False  # written at once, by whoever prints
        self.trouble: str | None = None  # the first reason for which something was dropped
        threading.Thread(target=self._write_on, name="outlet", daemon=True).start()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        given = bytes(data)
        if self._direct:
            return os.write(self._descriptor, given)
        with self._lock:
            if self._gone or len(self._waiting) + len(given) > _MOST:
                self._drop(given, "nobody reads it")
            else:
                self._waiting += given
        self._awake.set()
        return len(given)

    def leave(self) -> None:
        """Wait until all is written, as long as there is progress."""
        self._moved = time.monotonic()
        while self._waiting and time.monotonic() - self._moved < _PATIENCE:
            time.sleep(0.002)

    def be_direct(self) -> None:
        """In a forked process, which has no thread that writes."""
        self._direct = True

    def _drop(self, data: bytes, reason: str) -> None:
        self._num_dropped += data.count(b"\n")
        self.trouble = self.trouble or reason

    def _write_on(self) -> None:
        while not self._gone:
            self._awake.wait()
            self._awake.clear()
            while self._waiting:
                self._write_piece()

    def _write_piece(self) -> None:
        piece = bytes(self._waiting[:_PIECE])
        try:
            written = os.write(self._descriptor, piece)
        except BlockingIOError:  # another process, with which the file is shared, has made it so
            select.select([], [self._descriptor], [], 1.0)
            return
        except OSError as error:
            with self._lock:
                self._gone = error.errno not in _FOR_NOW
                self._drop(bytes(self._waiting), os.strerror(error.errno or errno.EIO))
                self._waiting.clear()
            return
        with self._lock:
            del self._waiting[:written]
            self._moved = time.monotonic()
            if self._num_dropped and len(self._waiting) < _MOST // 2:
                self._waiting += f"... {self._num_dropped} lines are left out here: {self.trouble}\n".encode()
                self._num_dropped = 0


_replaced: dict[str, tuple[TextIO, Outlet]] = {}  # by the name in sys: what stood there, and what does now


@contextmanager
def outliving_console() -> Iterator[None]:
    """Within the block the process's own standard output and error neither block nor fail. May be nested."""
    mine = [name for name in ("stdout", "stderr") if name not in _replaced and _is_plain(name)]
    for name in mine:
        before = getattr(sys, name)
        outlet = next((o for _, o in _replaced.values() if _same_file(o.fileno(), before.fileno())), None)
        _replaced[name] = before, outlet or Outlet(before.fileno())
        buffered = io.BufferedWriter(_replaced[name][1])
        setattr(sys, name, io.TextIOWrapper(buffered, before.encoding, "backslashreplace", line_buffering=True))
    try:
        yield
    finally:
        for name in mine:
            with suppress(OSError, ValueError):
                getattr(sys, name).flush()
        for name in mine:
            before, outlet = _replaced.pop(name)
            setattr(sys, name, before)
            outlet.leave()


def troubles() -> dict[str, str]:
    """Why something that was printed was dropped, by the stream it went to."""
    return {name: outlet.trouble for name, (_, outlet) in _replaced.items() if outlet.trouble is not None}


def _is_plain(name: str) -> bool:
    """Whether a stream is what the process began with, and stands on a file."""
    stream = getattr(sys, name)
    if stream is None or stream is not getattr(sys, f"__{name}__"):
        return False
    try:
        stream.flush()
        return stream.fileno() >= 0
    except (OSError, ValueError):
        return False


def _same_file(one: int, other: int) -> bool:
    return os.path.samestat(os.fstat(one), os.fstat(other))


def _as_in_any_process() -> None:
    for name, (before, outlet) in _replaced.items():
        outlet.be_direct()
        setattr(sys, name, before)
    _replaced.clear()


os.register_at_fork(after_in_child=_as_in_any_process)
