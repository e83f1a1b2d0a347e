"""What runs inside a worker of coterie/rewards/workers/pool.py: import one function, then answer calls until the pipe ends.

Messages are a length of four bytes and then that many bytes: a pickled dict of arguments comes in, JSON goes out. JSON, because
the arguments hold text that a model wrote: whatever it does to the function, its answer is plain values and nothing that the
trainer would run on reading it.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

from coterie.errors import UserError
from coterie.sandbox.inside.confine import die_with_parent
from coterie.user_code import awaited, described, load_function

LENGTH = struct.Struct(">I")
FAILURE = "__reward_failure__"  # the key of a dict that stands for an exception


def main(target: str, megabytes: str, parent: str) -> None:
    """Serve `target`. megabytes: of address space, 0 for no limit. parent: the process that this one must not outlive."""
    die_with_parent(int(parent))
    if int(megabytes):
        resource.setrlimit(resource.RLIMIT_AS, (int(megabytes) << 20,) * 2)
    calls, answers = _own_pipes()
    try:
        function = load_function(target, "worker")
    except UserError as error:
        return _send(answers, json.dumps({"refused": str(error)}))
    except BaseException as error:  # a module may even exit when it is imported
        return _send(answers, json.dumps({"refused": f"{target} can't be imported: {described(error)}"}))
    _send(answers, json.dumps({"ready": True}))
    while header := calls.read(LENGTH.size):
        arguments = pickle.loads(calls.read(*LENGTH.unpack(header)))
        _send(answers, _answer(function, arguments))


def _own_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The two ends that carry messages, moved away from where a function prints: its stdout is our stderr from now on."""
    calls, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return os.fdopen(calls, "rb"), os.fdopen(answers, "wb")


def _send(answers: BinaryIO, text: str) -> None:
    data = text.encode("utf-8", "backslashreplace")
    answers.write(LENGTH.pack(len(data)) + data)
    answers.flush()


def _answer(function: Callable[..., Any], arguments: dict[str, Any]) -> str:
    try:
        value = awaited(function(**arguments))
    except Exception as error:
        return json.dumps({"raised": described(error), "traceback": "".join(traceback.format_exception(error))})
    try:
        return json.dumps({"value": value}, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        return json.dumps({"unsendable": f"returned a {type(value).__name__}, which is no plain value: {error}"})


def _plain(value: Any) -> Any:
    """What JSON has no word for: an exception in a list, and numbers and arrays of numpy or torch, known by their methods."""
    if isinstance(value, Exception):
        return {FAILURE: f"raised {described(value)}" if type(value).__name__ != "RewardError" else str(value)}
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} can't be sent")
