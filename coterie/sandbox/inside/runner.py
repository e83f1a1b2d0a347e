"""Run one program on its inputs, in a process that has given up everything else, and say what came out.

What this code says is not believed: the program shares its memory and may change or imitate it. So nothing here knows what is right;
it only turns outputs into data, and whoever reads them compares. On the channel stands, for each input, what the program printed,
then a line with the job's mark and a JSON record.
"""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import json
import os
import random
import sys
import types
from collections.abc import Callable
from typing import Any

_MAX_DEPTH = 100
_MAX_ERROR = 300


class Channel:
    """Where records go: a pipe that the other side reads to its end."""

    def __init__(self, descriptor: int, mark: str) -> None:
        self.descriptor = descriptor
        self.mark = mark

    def say(self, **record: Any) -> None:
        _write(self.descriptor, f"\n{self.mark} {json.dumps(record)}\n".encode("ascii"))


def run(job: dict[str, Any], channel: Channel, inputs: list[int]) -> None:
    """`job` as fork_server.py reads it; `inputs`: for each stdin a file descriptor that holds it."""
    random.seed(0)  # a program that draws gets the same verdict when a run is resumed
    vars(builtins).update(exit=sys.exit, quit=sys.exit)
    if job["function"] is None:
        _run_whole(job["source"], channel, inputs)
    else:
        _run_function(job["source"], job["function"], job["inputs"], channel)


def _run_function(source: str, name: str, inputs: list[list[Any]], channel: Channel) -> None:
    """One call of the function for each input. `Class.method` is called on a new object each time."""
    try:
        module = _module("solution")
        with contextlib.suppress(SystemExit):  # what came before it counts
            exec(compile(source, "solution.py", "exec"), module.__dict__)
        _find(module, name)
    except BaseException as error:
        channel.say(all=_say_error(error))
        return
    for index, arguments in enumerate(inputs):
        try:
            channel.say(test=index, value=plain(_find(module, name)(*arguments)))
        except BaseException as error:
            channel.say(test=index, error=_say_error(error))


def _find(module: types.ModuleType, name: str) -> Callable[..., Any]:
    found: Any = module
    for part in name.split("."):
        found = getattr(found() if isinstance(found, type) else found, part)
    return found


def _run_whole(source: str, channel: Channel, inputs: list[int]) -> None:
    """The whole program, once for each input, as if it had been started anew."""
    try:
        code = compile(source, "solution.py", "exec")
    except BaseException as error:
        channel.say(all=_say_error(error))
        return
    vars(os)["_exit"] = sys.exit  # one input's end is not that of the others
    for index, descriptor in enumerate(inputs):
        os.dup2(descriptor, 0)
        os.close(descriptor)
        sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        sys.stdout = out = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        failure = None
        try:
            exec(code, _module("__main__").__dict__)
        except SystemExit as ended:
            failure = f"exit status {ended.code!s:.80}" if ended.code else None
        except BaseException as raised:
            failure = _say_error(raised)
        try:
            for stream in (sys.stdout, out):
                stream.flush()
        except BaseException as raised:
            failure = failure or _say_error(raised)
        channel.say(test=index, error=failure)


def _module(name: str) -> types.ModuleType:
    """A new module of that name, which dataclasses and typing look for."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module


def _say_error(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:_MAX_ERROR]
    except BaseException:  # its __str__ may be the program's
        return "an error that can't be shown"


def plain(value: Any, depth: int = 0) -> Any:
    """The value as JSON that keeps types apart: {"tuple": [...]}, {"set": [...]}, {"dict": [[key, value], ...]}, lists as they are.

    Raises TypeError for what is not plain data. A subclass of a container counts as that; one of int, float or str does not.
    """
    if depth > _MAX_DEPTH:
        raise ValueError("the value is nested too deeply")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        return [plain(inner, depth + 1) for inner in list.__iter__(value)]
    if isinstance(value, tuple):
        return {"tuple": [plain(inner, depth + 1) for inner in tuple.__iter__(value)]}
    if isinstance(value, set | frozenset):
        return {"set": [plain(inner, depth + 1) for inner in value]}
    if isinstance(value, dict):
        return {"dict": [[plain(k, depth + 1), plain(v, depth + 1)] for k, v in dict.items(value)]}
    raise TypeError(f"returned a {type(value).__name__}, which is not plain data")


def input_file(text: str) -> int:
    """A file descriptor that holds the text and can't be written to."""
    descriptor = memory_file(text.encode("utf-8", "replace"))
    os.lseek(descriptor, 0, os.SEEK_SET)
    if hasattr(os, "memfd_create"):  # without it there is no confinement either
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def memory_file(data: bytes) -> int:
    """A file descriptor, at its end, of a file without a name that holds the data."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("data", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        import tempfile

        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    _write(descriptor, data)
    return descriptor


def _write(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]
