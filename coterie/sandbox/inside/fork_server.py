"""The process that programs are forked from: started once, so that a program costs a fork and not a new interpreter.

It runs no program itself and never reads one: a job comes as file descriptors, which only the forked child reads. So a child finds
nothing in its memory but this code and its own job. Standard input is a socket to the process that started it.

Protocol on the socket: it is sent one line of JSON, a list of what may be read, and answers one, {"ready": ...} or {"error": ...}.
A request is the byte `r` with two descriptors: a file with the job as JSON, and the pipe that records go to. The byte `k` kills the
program that runs. When it has ended, for whichever reason, its wait status comes back as four bytes. The end of the socket is the end
of this process.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import mmap
import os
import resource
import select
import signal
import socket
import struct
from typing import Any

from . import confine, runner

# Loaded once for all programs; shared libraries that they need can't be loaded later.
_PRELOADED = (
    "abc", "array", "ast", "base64", "binascii", "bisect", "bz2", "calendar", "cmath", "collections", "contextlib", "copy", "csv",
    "dataclasses", "datetime", "decimal", "difflib", "enum", "fractions", "functools", "hashlib", "heapq", "inspect", "io",
    "itertools", "json", "lzma", "math", "numbers", "operator", "pickle", "pprint", "queue", "random", "re", "secrets", "shlex",
    "statistics", "string", "struct", "textwrap", "threading", "time", "traceback", "types", "typing", "unicodedata", "uuid",
    "zlib", "encodings.idna", "encodings.latin_1",
)  # fmt: skip
_SPARE_FILES = 32
_exit = os._exit


def serve(options: dict[str, Any]) -> None:
    """Answer requests until the socket ends. options: {"confined": bool, "landlock": bool, "parent": process id or null}."""
    control = socket.socket(fileno=os.dup(0))
    with control.makefile("rb", buffering=0) as lines:
        readable = json.loads(lines.readline())
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    try:
        if options["parent"] is not None:
            confine.die_with_parent(options["parent"])
        for name in _PRELOADED:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        ruleset = confine.make_ruleset(readable) if options["landlock"] else None
    except Exception as error:
        control.sendall(json.dumps({"error": str(error)}).encode() + b"\n")
        return
    options = {**options, "own_address_space": _address_space()}
    wake, woken = os.pipe()
    for descriptor in (wake, woken):
        os.set_blocking(descriptor, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    control.sendall(json.dumps({"ready": confine.landlock_version()}).encode() + b"\n")
    while True:
        message, descriptors, *_ = socket.recv_fds(control, 1, 2)
        if not message:
            return
        if message != b"r":
            continue  # it was to be killed, and had ended already
        server = os.getpid()
        child = os.fork()
        if child == 0:
            _become(descriptors[0], descriptors[1], server, options, ruleset)
        for descriptor in descriptors:
            os.close(descriptor)
        _watch(child, control, wake)


def _address_space() -> int:
    """Bytes that this process has mapped, to a megabyte: the smallest limit under which it can map another page.

    There is no /proc in some sandboxes to say it.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    low, high = 0, 4096  # megabytes
    while high - low > 1:
        middle = (low + high) // 2
        try:
            resource.setrlimit(resource.RLIMIT_AS, (middle << 20, before[1]))
            mmap.mmap(-1, mmap.PAGESIZE).close()
            high = middle
        except (OSError, ValueError, MemoryError):
            low = middle
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
    return high << 20


def _watch(child: int, control: socket.socket, wake: int) -> None:
    """Until the child has ended and what it was is said. Kills it when told to, and when nobody is left to tell."""
    waiting: list[Any] = [control, wake]
    while True:
        ready = select.select(waiting, [], [])[0]
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake, 512)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                control.sendall(struct.pack("<i", status))
                return
        if control in ready:
            gone = not control.recv(1)
            with contextlib.suppress(OSError):  # a child without a session of its own yet
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            if gone:
                os._exit(0)


def _become(job_file: int, results: int, server: int, options: dict[str, Any], ruleset: int | None) -> None:
    """In the child: read the job, give up everything else, and run the program. Does not return."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        with open(job_file, "rb") as file:
            file.seek(0)
            job = json.load(file)
        channel = runner.Channel(results, job["mark"])
        try:
            inputs = _prepare(job, results, server, options, ruleset)
        except BaseException as error:
            channel.say(setup=f"{type(error).__name__}: {error}")
            _exit(1)
        channel.say(ready=True)
        runner.run(job, channel, inputs)
    finally:
        _exit(0)  # nothing of the program's runs at the end


def _prepare(job: dict[str, Any], results: int, server: int, options: dict[str, Any], ruleset: int | None) -> list[int]:
    """Everything that has to be given up before the program is looked at. Returns the descriptors of its inputs."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, this process goes first
    whole = job["function"] is None
    kept = [results] + ([ruleset] if ruleset is not None else [])
    inputs = []
    null = os.open(os.devnull, os.O_RDWR)  # opened for this program alone: what it sets on it ends with it
    for descriptor in (0, 2):
        os.dup2(null, descriptor)
    os.dup2(results if whole else null, 1)
    _close_all_but(kept)
    if whole:
        inputs = [runner.input_file(text) for text in job["inputs"]]
    limits = job["limits"]
    if options["confined"]:
        confine.drop_capabilities()
    if options["parent"] is not None or options["confined"]:
        confine.die_with_parent(server)
    confine.limit_resources(
        cpu_seconds=limits["cpu_seconds"],
        address_space=options["own_address_space"] + (limits["memory_megabytes"] << 20),
        open_files=max([results, *inputs]) + _SPARE_FILES,
    )
    if options["confined"]:
        confine.no_new_privileges()
        if ruleset is not None:
            confine.landlock(ruleset)
            os.close(ruleset)
        confine.allow_only_listed_calls()
    return inputs


def _close_all_but(kept: list[int]) -> None:
    """Close every descriptor from 3 on that is not kept."""
    start = 3
    for descriptor in sorted(kept):
        os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, 1 << 20)
