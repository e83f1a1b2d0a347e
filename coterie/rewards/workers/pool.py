"""Processes that call one function and can be killed: for what can hang, spin in C, eat memory or crash.

The workers are fresh interpreters, so they hold nothing of the trainer: not its memory, its files or its GPU. Nothing here
imports torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from coterie.deadline import running
from coterie.errors import RewardError, UserError
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

# The kernel ends a worker when the *thread* that started it ends, so all are started by one that lives as long as the process.
_starter = ThreadPoolExecutor(1, thread_name_prefix="coterie-worker-starter")


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
        self._workers: list[_Worker] = []
        self._has_served = False
        self._lock = threading.Lock()

    def map(self, calls: Sequence[dict[str, Any]], *, seconds: float | None = None) -> list[Any]:
        """`target(**call)` for each, in order: what it returned, or a RewardError that says why there is nothing.

        Raises UserError where the target can't be imported.
        """
        with self._lock:
            return _Round(self, calls, seconds or self.seconds).run() if calls else []

    def close(self) -> None:
        """Kill the workers. The pool may be used again, with new ones."""
        with self._lock:
            for worker in self._workers:
                worker.kill()
            self._workers.clear()

    def __del__(self) -> None:
        for worker in getattr(self, "_workers", []):  # the constructor may have raised
            worker.kill()


class _Round:
    """One `map`: calls are given out to whichever worker is free, until each has an answer."""

    def __init__(self, pool: WorkerPool, calls: Sequence[dict[str, Any]], seconds: float) -> None:
        self.pool, self.seconds = pool, seconds
        self.waiting = deque(enumerate(calls))
        self.answers: list[Any] = [None] * len(calls)
        self.num_missing = len(calls)

    def run(self) -> list[Any]:
        for worker in [
            worker for worker in self.pool._workers if not worker.idle
        ]:  # died, or was killed, since last time
            self._remove(worker)
        try:
            while self.num_missing:
                self._staff()
                self._wait()
                for worker in list(self.pool._workers):
                    self._look_after(worker)
        except BaseException:  # a call is under way whose answer nobody would read
            for worker in list(self.pool._workers):
                if worker.call is not None:
                    self._remove(worker)
            raise
        return self.answers

    def _staff(self) -> None:
        """Give waiting calls to free workers, and start as many more as there is work for."""
        for worker in self.pool._workers:
            if worker.ready and worker.call is None and self.waiting:
                index, call = self.waiting.popleft()
                try:
                    worker.give(index, call, self.seconds)
                except Exception as error:  # arguments that can't be pickled
                    self._answered(index, RewardError(f"could not be sent to a worker: {error}"))
        num_starting = sum(not worker.ready for worker in self.pool._workers)
        for _ in range(min(len(self.waiting) - num_starting, self.pool.num_workers - len(self.pool._workers))):
            self.pool._workers.append(_Worker(self.pool.target, self.pool.memory_megabytes, self.pool._home))

    def _wait(self) -> None:
        """Until a worker has something to say or can take more, or its time is up."""
        busy = [worker for worker in self.pool._workers if worker.deadline is not None]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.out, selectors.EVENT_READ)
                if worker.unsent:
                    selector.register(worker.into, selectors.EVENT_WRITE)
            first = min((worker.deadline or 0.0 for worker in busy), default=0.0)
            selector.select(max(0.0, first - running()))

    def _look_after(self, worker: _Worker) -> None:
        if worker.deadline is None:
            return
        message = worker.exchange()
        if message is not None:
            self._heard(worker, message)
        elif worker.ended:
            self._lost(worker, f"the worker died: {worker.last_words()}")
        elif running() >= worker.deadline:
            self._lost(worker, f"took longer than {self.seconds if worker.ready else _START_SECONDS:g} s")

    def _heard(self, worker: _Worker, message: dict[str, Any]) -> None:
        if worker.call is not None:
            self._answered(worker.call, _value(message))
            worker.rest()
        elif "ready" in message:
            self.pool._has_served = True
            worker.start_serving()
        else:
            self._lost(worker, str(message.get("refused")))

    def _lost(self, worker: _Worker, reason: str) -> None:
        """The worker is of no more use: the call it was at fails, or the one that it was started for.

        Raises UserError where no worker ever came to serve: then it is the target that is wrong.
        """
        index = worker.call
        self._remove(worker)
        if index is None:
            if not self.pool._has_served:
                raise UserError(f"rewards: {self.pool.target} can't be used in a worker: {reason}")
            if not self.waiting:
                return
            index, _ = self.waiting.popleft()
            reason = f"a worker could not be started: {reason}"
        self._answered(index, RewardError(reason))

    def _answered(self, index: int, answer: Any) -> None:
        self.answers[index] = answer
        self.num_missing -= 1

    def _remove(self, worker: _Worker) -> None:
        worker.kill()
        self.pool._workers.remove(worker)


def _value(message: dict[str, Any]) -> Any:
    """What a call returned, or why it did not."""
    if "value" in message:
        return message["value"]
    if "raised" in message:
        error = RewardError(f"raised {message['raised']}")
        error.add_note(f"In the worker:\n{message.get('traceback', '')}")  # which a traceback shows
        return error
    return RewardError(str(message.get("unsendable", "the worker's answer can't be read")))


def _failures(value: dict[str, Any]) -> Any:
    return RewardError(str(value[FAILURE])) if set(value) == {FAILURE} else value


class _Worker:
    """One process: its pipes, the index of the call it is at, and when that must be done."""

    def __init__(self, target: str, memory_megabytes: int | None, home: str) -> None:
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115, open as long as the process
        fcntl.fcntl(self._printed, fcntl.F_SETFL, os.O_APPEND)  # the worker writes at the end, also after it was cut
        numbers = [str(memory_megabytes or 0), str(os.getpid())]
        started = _starter.submit(
            subprocess.Popen,
            [sys.executable, "-P", "-c", _RUN, json.dumps(sys.path), target, *numbers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            cwd=home,
            env={"OMP_NUM_THREADS": "1"} | os.environ,  # the workers share the cores with one another
            start_new_session=True,  # a group of its own, to be killed as a whole; and Ctrl-C is for us
        )
        self._process: subprocess.Popen[bytes] = started.result()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.into, self.out = self._process.stdin, self._process.stdout
        for pipe in (self.into, self.out):  # a stopped worker must not stop us
            os.set_blocking(pipe.fileno(), False)
        self.unsent, self._received = b"", bytearray()
        self.call: int | None = None
        self.ready = self.ended = False
        self.deadline: float | None = running() + _START_SECONDS

    @property
    def idle(self) -> bool:
        """Whether it waits for a call, alive and silent."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.out, selectors.EVENT_READ)
            return self.ready and self.call is None and not selector.select(0)

    def start_serving(self) -> None:
        self.ready, self.deadline = True, None

    def give(self, index: int, call: dict[str, Any], seconds: float) -> None:
        """Begin a call. Raises what pickling its arguments raises."""
        data = pickle.dumps(call)
        self.unsent = LENGTH.pack(len(data)) + data
        self.call, self.deadline = index, running() + seconds
        self._write()

    def rest(self) -> None:
        """The call is over."""
        self.call, self.deadline = None, None
        self._printed.truncate(0)  # last words are those of the call in which it dies

    def exchange(self) -> dict[str, Any] | None:
        """Send and receive what is possible now. A whole message, or None."""
        self._write()
        try:
            while chunk := os.read(self.out.fileno(), 1 << 16):
                self._received += chunk
                if len(self._received) > _MAX_ANSWER:
                    self.ended = True
                    return None
            self.ended = True
        except BlockingIOError:
            pass
        end = LENGTH.size + (LENGTH.unpack_from(self._received)[0] if len(self._received) >= LENGTH.size else 0)
        if len(self._received) < max(end, LENGTH.size + 1):
            return None
        body = bytes(self._received[LENGTH.size : end])
        self._received.clear()
        try:
            message = json.loads(body, object_hook=_failures)
        except (ValueError, RecursionError):
            return {}
        return message if isinstance(message, dict) else {}

    def _write(self) -> None:
        try:
            while self.unsent:
                self.unsent = self.unsent[os.write(self.into.fileno(), self.unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # its answers may still be there to be read, and end too
            self.unsent = b""

    def last_words(self) -> str:
        """How it ended, and the last of what it printed."""
        self._kill()
        code = self._process.returncode
        how = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
        size = os.fstat(self._printed.fileno()).st_size
        self._printed.seek(max(0, size - 4 * _LAST_WORDS))
        words = self._printed.read().decode("utf-8", "replace").strip()[-_LAST_WORDS:]
        return f"{how}: {words}" if words else how

    def kill(self) -> None:
        """End it and what it started, and give back its pipes."""
        self._kill()
        for stream in (self.into, self.out, self._printed):
            stream.close()

    def _kill(self) -> None:
        """Until it is waited for its number is its own, so the group that is killed is no other's."""
        if self._process.returncode is None:
            if self.ended:  # a process that dies by itself has an exit status to tell
                _await_exit(self._process.pid, seconds=1.0)
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _await_exit(process: int, *, seconds: float) -> None:
    """Until it has exited, or that long; its number stays taken, since it is not waited for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.01)
