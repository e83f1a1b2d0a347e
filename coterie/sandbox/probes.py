"""What a sandbox must hold before it is trusted with anything: a few hostile programs, tried when it starts."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from coterie.sandbox.base import Limits, Outcome, Program, SandboxError

_LIMITS = Limits(seconds=10, memory_megabytes=128, output_bytes=100_000)
_ENDLESS_SECONDS = 0.2

# Every function tries something and returns what it got; a sandbox that holds makes it raise.
_SOURCE = """
import ctypes, os, signal, socket, subprocess, sys, threading

def fork(secret, folder, parent):
    if os.fork() == 0:
        os._exit(0)
    return "a process"

def thread(secret, folder, parent):
    threading.Thread(target=print).start()
    return "a thread"

def execute(secret, folder, parent):
    os.execv(sys.executable, [sys.executable, "-c", ""])

def read(secret, folder, parent):
    return open(secret).read()

def environment(secret, folder, parent):
    return open(f"/proc/{parent}/environ").read()

def write(secret, folder, parent):
    open(folder + "/written", "w").close()
    return "a file"

def temporary(secret, folder, parent):
    open("/tmp/" + os.path.basename(folder) + ".written", "w").close()
    return "a file"

def change(secret, folder, parent):
    os.chmod(secret, 0o777)
    return "its mode"

def network(secret, folder, parent):
    socket.socket()
    return "a socket"

def local(secret, folder, parent):
    socket.socket(socket.AF_UNIX)
    return "a socket"

def signals(secret, folder, parent):
    os.kill(parent, 0)
    return "the parent"

def priority(secret, folder, parent):
    os.setpriority(os.PRIO_PROCESS, parent, 19)
    return "the parent"

def trace(secret, folder, parent):
    library = ctypes.CDLL(None, use_errno=True)
    if library.ptrace(0x4206, parent, 0, 0) == -1:
        raise OSError(ctypes.get_errno(), "ptrace")
    return "the parent"

def namespaces(secret, folder, parent):
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(0x10000000) == -1:
        raise OSError(ctypes.get_errno(), "unshare")
    return "a namespace"

def memory(secret, folder, parent):
    return len(bytearray(1 << 29))

def attempt(name, *given):
    try:
        return globals()[name](*given)
    except (OSError, RuntimeError, MemoryError) as error:
        return None
"""
_NAMES = re.findall(r"^def (\w+)\(secret", _SOURCE, re.MULTILINE)


def probe(run: Callable[[Program], Outcome]) -> str:
    """Try them all. Returns a line for the log; raises SandboxError with what got through, or with why none could be run."""
    can_compute(run)
    start = time.perf_counter()  # a server is up by now
    with tempfile.TemporaryDirectory(prefix="coterie-probe-") as folder:
        secret = Path(folder) / "secret"
        secret.write_text(secrets.token_hex(16))
        os.chmod(secret, 0o644)
        os.chmod(folder, 0o777)
        before = secret.stat().st_mode
        inputs = [[name, str(secret), folder, os.getpid()] for name in _NAMES]
        outcome = run(Program(_SOURCE, inputs, function="attempt", limits=_LIMITS))
        if outcome.failed:
            raise SandboxError(outcome.failed)
        got = [name for name, output in zip(_NAMES, outcome.outputs, strict=True) if output.error or output.value]
        outside = Path("/tmp") / f"{os.path.basename(folder)}.written"
        if outside.exists():
            outside.unlink()
            got.append("temporary")
        if os.listdir(folder) != ["secret"] or secret.stat().st_mode != before:
            got.append("the folder is changed")
    if got:
        raise SandboxError(f"hostile programs got through: {', '.join(dict.fromkeys(got))}")
    _ends_what_does_not_end(run)
    return f"{len(_NAMES) + 1} hostile programs held, in {time.perf_counter() - start:.1f} s"


def can_compute(run: Callable[[Program], Outcome]) -> None:
    """Raises SandboxError where a sum is not what it should be."""
    outcome = run(Program("def add(a, b):\n    return a + b", [[2, 3]], function="add", limits=_LIMITS))
    if outcome.failed:
        raise SandboxError(outcome.failed)
    if outcome.outputs[0].value != 5:
        raise SandboxError(f"2 + 3 gave {outcome.outputs[0]}")


def _ends_what_does_not_end(run: Callable[[Program], Outcome]) -> None:
    source = "import signal\nfor number in range(1, 65):\n    try:\n        signal.signal(number, signal.SIG_IGN)\n"
    source += "    except (OSError, ValueError):\n        pass\nwhile True:\n    pass"
    limits = Limits(seconds=5, wall_seconds=_ENDLESS_SECONDS)
    start = time.perf_counter()
    outcome = run(Program(source, [[]], function="none", limits=limits))
    if outcome.failed or time.perf_counter() - start > _ENDLESS_SECONDS + 10:
        raise SandboxError(f"an endless program was not ended: {outcome.failed}")
