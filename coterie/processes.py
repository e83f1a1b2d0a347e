"""Processes that serve one caller at a time: started when they are needed, replaced when they fail, and killed with all they start.

Nothing here imports torch.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

# The kernel ends such a process when the *thread* that started it ends, so all are started by one that lasts as long as this process.
_starter = ThreadPoolExecutor(1, thread_name_prefix="coterie-starter")


class Server:
    """A process that serves one caller at a time, in a group of its own: it is killed as a whole, and Ctrl-C is not for it."""

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        """Start it with the options of Popen. Raises OSError where that fails."""
        popen: Any = subprocess.Popen  # whose overloads can't be told apart by options
        self._process: subprocess.Popen[bytes] = _starter.submit(
            popen, command, start_new_session=True, **options
        ).result()
        self._ending = threading.Lock()

    @property
    def idle(self) -> bool:
        """Whether it waits for a caller."""
        return self._process.poll() is None

    def kill(self, *, patience: float = 0.0) -> int:
        """End it and what it started, and return its exit status.

        patience: seconds in which it may end by itself, with a status that tells more than that it was killed.
        """
        with self._ending:
            if self._process.returncode is None:  # until it is waited for the group's number is no other's
                end = time.monotonic() + patience
                while time.monotonic() < end and not _has_exited(self._process):
                    time.sleep(0.01)
                with suppress(ProcessLookupError, PermissionError):  # gone, or of another user as a setuid bwrap is
                    os.killpg(self._process.pid, signal.SIGKILL)
            return self._process.wait()

    def close(self) -> None:
        """End it, and give back what was opened for it."""
        self.kill()


def _has_exited(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has; where the system can say so, without waiting for it, which would free its number."""
    if not hasattr(os, "waitid"):
        return process.poll() is not None
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


Kind = TypeVar("Kind", bound=Server)


class Crew(Generic[Kind]):
    """At most `size` servers, each made by `start` when there is work for it and no other is free."""

    def __init__(self, start: Callable[[], Kind], size: int) -> None:
        self._start = start
        self._closed = False
        self._free: queue.LifoQueue[Kind | None] = queue.LifoQueue()  # a None for each that is not started
        for _ in range(size):
            self._free.put(None)
        self.servers: list[Kind] = []

    @contextmanager
    def server(self) -> Iterator[Kind]:
        """One that nobody else uses meanwhile. Where the block raises it is ended, and the next caller gets a new one."""
        server = self._free.get()
        is_good = False
        try:
            if server is not None and not server.idle:  # it died, or was killed, since it was last used
                self._end(server)
                server = None
            if server is None:
                server = self._start()
                self.servers.append(server)
            yield server
            is_good = not self._closed
        finally:
            if server is not None and not is_good:
                self._end(server)
                server = None
            self._free.put(server)

    def _end(self, server: Kind) -> None:
        if server in self.servers:
            self.servers.remove(server)
            server.close()

    def close(self) -> None:
        """End those that are free now, and the others when their callers are done."""
        self._closed = True
        for _ in range(self._free.qsize()):
            with suppress(queue.Empty):
                server = self._free.get_nowait()
                if server is not None:
                    self._end(server)
