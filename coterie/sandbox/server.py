"""A server that programs are forked from (inside/fork_server.py), as its client sees it: start it, run a program, read what came.

A program's memory, processor time and files are bounded by the kernel; how long it takes and how much it writes, here, while it is
read. This process never holds more of its output than `output_bytes`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coterie.processes import Server
from coterie.sandbox.base import Outcome, Output, Program, SandboxError
from coterie.sandbox.inside.runner import memory_file

_START_SECONDS = 60.0
_GRACE = 10.0  # seconds in which a killed program must be gone
_CHUNK = 1 << 16
_SLACK = 0.5  # seconds in which a program is started, and the kernel ends one that has had its processor time
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1", "LANG": "C.UTF-8"}


class ForkServer(Server):
    """One process that programs are forked from, one at a time."""

    def __init__(self, command: Sequence[str], options: dict[str, Any], readable: Sequence[str]) -> None:
        """Start it; `readable` is what its programs may read. Raises SandboxError where it does not come up."""
        self._control, theirs = socket.socketpair()
        with tempfile.TemporaryFile() as complaints:
            try:
                super().__init__(
                    [*command, json.dumps(options)],
                    stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=complaints, env=_ENVIRONMENT, cwd="/",
                )  # fmt: skip
            except OSError as error:
                self._control.close()
                raise SandboxError(f"{command[0]} does not start: {error}") from error
            finally:
                theirs.close()
            try:
                self._hello(readable)
            except (OSError, ValueError, SandboxError) as error:
                self.close()
                complaints.seek(0)
                said = complaints.read(2000).decode(errors="replace").strip()
                raise SandboxError(" ".join(f"{error} {said}".split())) from error
        self._server = _offer_when_memory_runs_out(self._process.pid)

    def _hello(self, readable: Sequence[str]) -> None:
        self._control.settimeout(_START_SECONDS)
        self._control.sendall(json.dumps(readable).encode() + b"\n")
        line = b""
        while not line.endswith(b"\n"):
            more = self._control.recv(1000)
            if not more:
                raise SandboxError("its process ended at the start.")
            line += more
        hello = json.loads(line)
        if "error" in hello:
            raise SandboxError(hello["error"])

    def run(self, program: Program) -> Outcome:
        """Raises SandboxError when the server is gone; it must be closed then."""
        mark = secrets.token_hex(16)
        job = _job_file(program, mark)
        results, theirs = os.pipe()
        try:
            try:
                socket.send_fds(self._control, [b"r"], [job, theirs])
            except OSError as error:
                raise SandboxError(f"the sandbox's process is gone: {error}") from error
            finally:
                os.close(job)
                os.close(theirs)
            data, why = self._read(results, program)
        finally:
            os.close(results)
        ended = self._wait(kill=why is not None)
        return read_outcome(data, mark, program, why or _say_end(ended))

    def _read(self, results: int, program: Program) -> tuple[bytes, str | None]:
        """What it writes until it ends, or until it has had its share of time or output, and which of these it was."""
        limits = program.limits
        poll = select.poll()
        poll.register(results, select.POLLIN)
        started = time.monotonic()
        deadline = started + limits.wall
        share = math.inf if limits.wall_seconds is not None else limits.cpu_seconds + _SLACK  # computing and asleep
        look = started + share
        most = limits.output_bytes + 200 * len(program.inputs)  # the records' own bytes
        data = bytearray()
        while True:
            now = time.monotonic()
            if now >= look:
                look = now + share - (now - started - self._kept_waiting(now - started))
            if now >= min(deadline, look):
                return bytes(data), f"took longer than {limits.wall if now >= deadline else limits.seconds:g} s"
            if not poll.poll(1000 * (min(deadline, look) - now)):
                continue
            more = os.read(results, _CHUNK)
            if not more:
                return bytes(data), None
            data += more
            if len(data) > most:
                return bytes(data[:most]), f"wrote more than {limits.output_bytes} bytes"

    def _kept_waiting(self, most: float) -> float:
        """Seconds in which the program could have run and had no core; all of `most` where the kernel does not say."""
        try:
            (program, *_) = _children(self._server)
            return int(Path(f"/proc/{program}/schedstat").read_text().split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            return most

    def _wait(self, kill: bool) -> int:
        """The wait status of the program, which has closed its pipe or is killed."""
        with contextlib.suppress(OSError):
            self._control.send(b"k")  # one that closed the pipe without ending has nothing more to say either
        self._control.settimeout(_GRACE)
        status = b""
        try:
            while len(status) < 4:
                more = self._control.recv(4 - len(status))
                if not more:
                    raise SandboxError("the sandbox's process died")
                status += more
        except OSError as error:
            raise SandboxError(f"a program could not be ended: {error}") from error
        return int(struct.unpack("<i", status)[0])

    def close(self) -> None:
        """End it, and with it what it runs: it ends by itself when nobody speaks to it any more."""
        self._control.close()
        self.kill(patience=2.0)


def _offer_when_memory_runs_out(pid: int) -> int:
    """Let the kernel end a server and what it forks before it ends the trainer. Returns the last of the processes, the server."""
    family = [pid]
    for one in family:
        with contextlib.suppress(OSError):
            family += _children(one)
        with contextlib.suppress(OSError):
            Path(f"/proc/{one}/oom_score_adj").write_text("500")
    return family[-1]


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _job_file(program: Program, mark: str) -> int:
    """A file descriptor with everything that the child needs to know, and nothing else."""
    limits = {"cpu_seconds": program.limits.cpu_seconds, "memory_megabytes": math.ceil(program.limits.memory_megabytes)}
    job = {
        "source": program.source,
        "function": program.function,
        "inputs": program.inputs,
        "mark": mark,
        "limits": limits,
    }
    return memory_file(json.dumps(job).encode("ascii"))


def _say_end(status: int) -> str:
    """Why a program that said nothing of an input has ended."""
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return "was killed: out of processor time or memory" if name in ("SIGKILL", "SIGXCPU") else f"crashed ({name})"
    return "ended early"


def read_outcome(data: bytes, mark: str, program: Program, end: str) -> Outcome:
    """What stands on a program's channel. It may hold anything; the worst that it can say is a wrong output.

    end: why there is no more, which is the error of the inputs that nothing is said of. Where the first record is not the
    server's own word that everything is set up, the sandbox has failed.
    """
    pieces = data.split(b"\n" + mark.encode() + b" ")
    first, *records = [piece.partition(b"\n") for piece in pieces[1:]] or [(b"", b"", b"")]
    setup = _record(first[0])
    if "ready" not in setup:
        return Outcome(failed=f"{setup['setup']}" if "setup" in setup else f"it ended before the program: {end}")
    texts = [first[2], *(rest for _, _, rest in records)]
    found: dict[int, Output] = {}
    for text, (line, ended, _) in zip(texts, records, strict=False):
        record = _record(line) if ended else {}
        if "all" in record:
            end = _short(record["all"])
            break
        index = record.get("test")
        if type(index) is int and 0 <= index < len(program.inputs):
            error = record.get("error")
            said = text.decode(errors="replace") if program.function is None else ""
            output = Output(json.dumps(record.get("value")), said, None if error is None else _short(error))
            found.setdefault(index, output)
    return Outcome(tuple(found.get(index, Output(error=end)) for index in range(len(program.inputs))))


def _record(line: bytes) -> dict[str, Any]:
    """A record, empty where it is none: too many digits and too deep are the program's doing, and no record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _short(text: object) -> str:
    return str(text)[:300] if isinstance(text, str) else "an error that is no text"
