"""Processes that call one function and can be killed: for what can hang, spin in C, eat memory or crash.

The workers are fresh interpreters, so they hold nothing of the trainer: not its memory, its files or its GPU. Nothing here
imports torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from coterie.deadline import running
from coterie.errors import RewardError, UserError
from coterie.processes import Crew, Server
from coterie.rewards.workers.worker import FAILURE, LENGTH

_START_SECONDS = 120.0  # for the interpreter and the import of the target's module
_MAX_ANSWER = 16 << 20  # bytes of an answer; a longer one is no answer
_LAST_WORDS = 300  # characters of what a dead worker printed
_RUN = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from coterie.rewards.workers.worker import main
main(*sys.argv[2:])
"""


class WorkerPool:
    """Calls `target` in processes of its own, each call with its own time.

    target: "module:function" or "file.py:function", imported once in each worker, which is not counted as a call's time.
    seconds: of a call; a worker over its time is killed with all that it started, and replaced. memory_megabytes: address
    space of a worker, None for no limit. Workers start at the first call and die with this process. What the function returns
    must be plain values, as in JSON (a tuple comes back as a list).
    """

    def __init__(
        self, target: str, *, num_workers: int = 2, seconds: float = 2.0, memory_megabytes: int | None = 1024
    ) -> None:
        assert num_workers > 0
        self.target, self.num_workers = target, num_workers
        self.seconds, self.memory_megabytes = seconds, memory_megabytes
        self._home = os.getcwd()  # a relative target is found again when a worker is replaced
        self._has_served = False
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="workers")  # each waits for one worker
        self._crew = Crew(self._start, num_workers)

    @property
    def _workers(self) -> list[_Worker]:
        return self._crew.servers

    def map(self, calls: Sequence[dict[str, Any]], *, seconds: float | None = None) -> list[Any]:
        """`target(**call)` for each, in order: what it returned, or a RewardError that says why there is nothing.

        Raises UserError where the target can't be imported.
        """
        running()  # the process's clock begins here, if it has not, and not in several threads at once
        with self._lock:
            futures = [self._threads.submit(self._answer, call, seconds or self.seconds) for call in calls]
            try:
                return [future.result() for future in futures]
            except BaseException:  # calls are under way whose answers nobody would read
                for future in futures:
                    future.cancel()
                while wait(futures, timeout=0.01).not_done:
                    for worker in list(self._workers):
                        worker.kill()
                raise

    def close(self) -> None:
        """Kill the workers. The pool may be used again, with new ones."""
        with self._lock:
            self._crew.close()
            self._crew = Crew(self._start, self.num_workers)

    def __del__(self) -> None:
        if hasattr(self, "_crew"):  # the constructor may have raised
            self._crew.close()

    def _answer(self, call: dict[str, Any], seconds: float) -> Any:
        """What one call returned, or a RewardError."""
        try:
            message = pickle.dumps(call)
        except Exception as error:
            return RewardError(f"could not be sent to a worker: {error}")
        try:
            with self._crew.server() as worker:
                return worker.answer(message, seconds)
        except _LostError as error:
            return RewardError(str(error))

    def _start(self) -> _Worker:
        """Raises UserError where no worker ever came to serve: then it is the target that is wrong."""
        try:
            worker = _Worker(self.target, self.memory_megabytes, self._home)
        except _LostError as error:
            if not self._has_served:
                raise UserError(f"rewards: {self.target} can't be used in a worker: {error}") from None
            raise _LostError(f"a worker could not be started: {error}") from None
        self._has_served = True
        return worker


class _LostError(Exception):
    """A worker is of no more use, and the message says why."""


class _Worker(Server):
    """One process with its pipes."""

    def __init__(self, target: str, memory_megabytes: int | None, home: str) -> None:
        """Start it and wait until it serves. Raises _LostError where it does not."""
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115, open as long as the process
        fcntl.fcntl(self._printed, fcntl.F_SETFL, os.O_APPEND)  # the worker writes at the end, also after it was cut
        numbers = [str(memory_megabytes or 0), str(os.getpid())]
        super().__init__(
            [sys.executable, "-P", "-c", _RUN, json.dumps(sys.path), target, *numbers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            cwd=home,
            env={"OMP_NUM_THREADS": "1"} | os.environ,  # the workers share the cores with one another
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._into, self._out = self._process.stdin, self._process.stdout
        for pipe in (self._into, self._out):  # a stopped worker must not stop us
            os.set_blocking(pipe.fileno(), False)
        try:
            hello = self._exchange(b"", _START_SECONDS)
            if "ready" not in hello:
                raise _LostError(str(hello.get("refused")))
        except BaseException:
            self.close()
            raise

    @property
    def idle(self) -> bool:
        """Whether it waits for a call, alive and silent."""
        poll = select.poll()
        poll.register(self._out, select.POLLIN)
        return not poll.poll(0)

    def answer(self, call: bytes, seconds: float) -> Any:
        """What a call, pickled, returned, or a RewardError. Raises _LostError where the worker dies, or takes too long."""
        message = self._exchange(LENGTH.pack(len(call)) + call, seconds)
        self._printed.truncate(0)  # last words are those of the call in which it dies
        if "value" in message:
            return message["value"]
        if "raised" in message:
            error = RewardError(f"raised {message['raised']}")
            error.add_note(f"In the worker:\n{message.get('traceback', '')}")  # which a traceback shows
            return error
        return RewardError(str(message.get("unsendable", "the worker's answer can't be read")))

    def _exchange(self, data: bytes, seconds: float) -> dict[str, Any]:
        """Send `data`, if there is any, and wait for a message."""
        until = running() + seconds
        unsent, received = memoryview(data), bytearray()
        poll = select.poll()
        poll.register(self._out, select.POLLIN)
        if unsent:
            poll.register(self._into, select.POLLOUT)
        while (left := until - running()) > 0:
            for descriptor, _ in poll.poll(1000 * left):
                if descriptor == self._into.fileno():
                    unsent = self._send(unsent)
                    if not unsent:
                        poll.unregister(self._into)
                    continue
                chunk = os.read(descriptor, 1 << 16)
                received += chunk
                if not chunk:
                    raise _LostError(f"the worker died: {self._last_words()}")
                if len(received) > _MAX_ANSWER:
                    raise _LostError(f"the worker's answer has more than {_MAX_ANSWER:,} bytes")
                if len(received) >= LENGTH.size and len(received) >= LENGTH.size + LENGTH.unpack_from(received)[0]:
                    return _message(received[LENGTH.size :])
        raise _LostError(f"took longer than {seconds:g} s")

    def _send(self, data: memoryview) -> memoryview:
        """What is left of it after as much as goes into the pipe now."""
        try:
            return data[os.write(self._into.fileno(), data) :]
        except BrokenPipeError:  # its answers may still be there to be read, and end too
            return data[:0]

    def _last_words(self) -> str:
        """How it ended, and the last of what it printed."""
        code = self.kill(patience=1.0)
        how = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
        size = os.fstat(self._printed.fileno()).st_size
        self._printed.seek(max(0, size - 4 * _LAST_WORDS))
        words = self._printed.read().decode("utf-8", "replace").strip()[-_LAST_WORDS:]
        return f"{how}: {words}" if words else how

    def close(self) -> None:
        self.kill()
        for stream in (self._into, self._out, self._printed):
            stream.close()


def _message(body: bytes | bytearray) -> dict[str, Any]:
    """What a worker sent, empty where it can't be read."""
    try:
        message = json.loads(body, object_hook=_failures)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _failures(value: dict[str, Any]) -> Any:
    return RewardError(str(value[FAILURE])) if set(value) == {FAILURE} else value
