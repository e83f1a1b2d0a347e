"""Sandboxes for model-written Python: hostile programs are held, by every backend, as root and as a plain user."""

import functools
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import hostile
import pytest

import coterie
from coterie.errors import UserError
from coterie.sandbox import forked, make
from coterie.sandbox.base import Limits, Program, SandboxError
from coterie.sandbox.inside import confine, syscalls
from coterie.sandbox.make import make_sandbox

ROOT = Path(coterie.__file__).parent.parent
BACKENDS = ("landlock", "bubblewrap")
pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="sandboxes need Linux")


def need(backend):
    if backend == "landlock" and not confine.landlock_version():
        pytest.skip("this kernel has no Landlock")
    if backend == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed")


@pytest.fixture(scope="module", params=BACKENDS)
def box(request):
    need(request.param)
    made = make_sandbox(request.param, num_workers=2)
    yield made
    made.close()


def call(source, *arguments, function="f", **limits):
    return Program(source, [list(arguments)], function, Limits(**limits))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("user", ["this user", "a plain user"])
def test_hostile_programs_are_held(backend, user):
    need(backend)
    found = hostile.attacked(backend, as_nobody=user == "a plain user")
    if "refused" in found:
        pytest.skip(found["refused"])
    assert found["through"] == {}
    assert found["programs"] >= 33
    assert found["growth_megabytes"] < 100


def test_outputs_keep_their_types(box):
    (output,) = box.run(call("def f(x): return [x, True, 1.0, (1, {2}), {1: None}]", "é\ud800")).outputs
    assert output.value == ["é\ud800", True, 1.0, {"tuple": [1, {"set": [2]}]}, {"dict": [[1, None]]}]
    assert [type(one) for one in output.value[:3]] == [str, bool, float]


def test_a_whole_program_is_run_on_each_input(box):
    source = """
import sys, os
from collections import deque
def main():
    n = int(input())
    if n == 3: exit()
    if n == 4: sys.exit(2)
    if n == 5: os.write(1, b"five"); os._exit(0)
    if n == 6: raise KeyError(n)
    print(n, *map(int, sys.stdin.readline().split()))
    sys.stdout.buffer.write(b"end")
if __name__ == "__main__":
    main()
"""
    inputs = ["1\n2 3\n", "3\n", "4\n", "5\nrest", "6\n", "", "7\n" + "8 " * 200_000]
    outputs = box.run(Program(source, inputs)).outputs
    assert [output.error for output in outputs] == [
        None, None, "exit status 2", None, "KeyError: 6", "EOFError: EOF when reading a line", None,
    ]  # fmt: skip
    assert outputs[0].text == "end1 2 3\n"  # as without a sandbox: the buffer below is not flushed first
    assert outputs[3].text == "five"
    read = Program("import os\nos.write(1, open(0).read().upper().encode())", ["ab\nc", "é"])
    assert [output.text for output in box.run(read).outputs] == ["AB\nC", "É"]
    assert outputs[1].text == ""
    assert len(outputs[6].text.split()) >= 200_001


def test_what_a_program_says_of_itself_is_no_sandbox_failure(box):
    """A program that could make the sandbox look broken would abstain where it should score 0."""
    ways = [
        "import os\nos._exit(0)", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "raise SystemExit(3)",
        "import os\nos.closerange(0, 100)", "def f(): raise MemoryError", "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()",
        "import ctypes\nctypes.string_at(1)", "\0", "def f(): return object()", "x = '\\ud800'\ndef f(): return print",
    ]  # fmt: skip
    outcomes = box.run_all([call(source, memory_megabytes=64, wall_seconds=3) for source in ways])
    assert [outcome.failed for outcome in outcomes] == [None] * len(ways)
    assert all(outcome.outputs[0].error for outcome in outcomes)


def test_records_that_a_program_writes_itself_are_only_outputs(box):
    forged = """
import gc
channel = [one for one in gc.get_objects() if type(one).__name__ == "Channel"][0]
channel.say(setup="broken", failed=True)
channel.say(test=0, value=[1])
channel.say(test=7, value=2)
channel.say(test="0")
channel.say(all={"x": 1})
def f(): return 3
"""
    outcome = box.run(call(forged))
    assert outcome.failed is None
    assert len(outcome.outputs) == 1
    assert outcome.outputs[0].value == [1]


def test_limits_are_those_of_the_program(box):
    spin = "import time\ndef f(s):\n    end = time.process_time() + s\n    while time.process_time() < end: pass\n    return 1"
    quick, slow, waits = box.run_all([
        call(spin, 0.1, seconds=1), call(spin, 3.0, seconds=1, wall_seconds=30),
        call("import time\ndef f(): time.sleep(9)", seconds=1, wall_seconds=0.3),
    ])  # fmt: skip
    assert quick.outputs[0].value == 1
    assert slow.outputs[0].error == "was killed: out of processor time or memory"
    assert waits.outputs[0].error == "took longer than 0.3 s"
    small = call("def f(n): return len(bytearray(n << 20))", 100, memory_megabytes=50)
    large = call("def f(n): return len(bytearray(n << 20))", 100, memory_megabytes=200)
    assert "MemoryError" in box.run(small).outputs[0].error
    assert box.run(large).outputs[0].value == 100 << 20


@pytest.mark.timed
@pytest.mark.slow
def test_a_program_that_sleeps_holds_its_worker_to_its_limit(box):
    sleeps = "import time\ndef f():\n    time.sleep(60)"
    stops = "import os, signal\ndef f():\n    os.kill(os.getpid(), signal.SIGSTOP)"
    both = "import time\ndef f():\n    end = time.process_time() + 0.6\n    while time.process_time() < end: pass\n    time.sleep(60)"
    for source in (sleeps, stops, both):
        start = time.monotonic()
        assert box.run(call(source, seconds=1)).outputs[0].error == "took longer than 1 s"
        assert time.monotonic() - start < 2.5
    longer = box.run(call("import time\ndef f():\n    time.sleep(1.7)\n    return 1", seconds=1, wall_seconds=20))
    assert longer.outputs[0].value == 1


@pytest.mark.timed
@pytest.mark.slow
def test_a_program_that_a_busy_machine_holds_up_has_its_time(box):
    """Six that spin share what cores there are with it, and what it computes is all that counts."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(6 * os.cpu_count())]
    try:
        spin = "import time\ndef f():\n    end = time.process_time() + 0.5\n    while time.process_time() < end: pass\n    return 1"
        start = time.monotonic()
        assert box.run(call(spin, seconds=2)).outputs[0].value == 1
        assert time.monotonic() - start < 6.5
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def test_what_a_program_sets_on_its_descriptors_ends_with_it(box):
    """All have /dev/null for their standard input and errors, and each has opened it for itself."""
    source = """
import fcntl, os
def f(flags):
    before = [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (0, 1, 2)]
    for fd in (0, 1, 2):
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    return before
"""
    first, second, third = (box.run(call(source, os.O_NONBLOCK | os.O_APPEND)).outputs[0].value for _ in range(3))
    assert first == second == third
    assert not any(flags & (os.O_NONBLOCK | os.O_APPEND) for flags in first)


def test_outputs_before_the_end_count(box):
    source = "def f(n):\n    while n == 2: pass\n    return n"
    outcome = box.run(Program(source, [[1], [2], [3]], "f", Limits(wall_seconds=0.3)))
    assert [output.error for output in outcome.outputs] == [None, "took longer than 0.3 s", "took longer than 0.3 s"]


def test_programs_share_nothing_but_python(box):
    leave = "import math, builtins, sys\nmath.pi = 3\nbuiltins.left = 1\nsys.modules['json'] = None\ndef f(): return 1"
    look = "import math, json, random\ndef f(): return [math.pi > 3.1, 'left' in dir(__builtins__), random.random()]"
    first, _, second = box.run_all([call(look), call(leave), call(look)])
    assert first == second
    assert first.outputs[0].value[:2] == [True, False]


def test_usual_modules_are_there_and_installed_ones_are_not(box):
    source = """
import asyncio, dataclasses, decimal, hashlib, unittest, zoneinfo
import importlib.util
@dataclasses.dataclass
class A:
    x: int
def f():
    return [A(2).x, hashlib.sha256(b"").hexdigest()[:4], importlib.util.find_spec("coterie") is None]
"""
    assert box.run(call(source)).outputs[0].value == [2, "e3b0", True]


def test_a_server_that_dies_is_replaced(box):
    """Between programs, which costs none, and in the midst of one, which costs that one."""

    def kill_all():
        assert box._crew.servers
        for server in list(box._crew.servers):
            server.kill()

    returns = call("def f(): return 1")
    box.run(returns)
    kill_all()
    assert [box.run(returns).outputs[0].value for _ in range(3)] == [1, 1, 1]
    under_way = box.submit(call("import time\ndef f(): time.sleep(100)", seconds=50))
    time.sleep(0.5)
    kill_all()
    assert under_way.result(20).failed is not None
    assert box.run(returns).outputs[0].value == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_dies_with_the_trainer(backend):
    need(backend)
    source = "import time\ndef f():\n    time.sleep(100)"
    code = (
        "import os, threading, time, sys\nfrom coterie.sandbox.base import *\nfrom coterie.sandbox.make import make_sandbox\n"
        f"box = make_sandbox({backend!r}, num_workers=1)\n"
        f"threading.Thread(target=box.run, args=(Program({source!r}, [[]], 'f', Limits(seconds=50)),), daemon=True).start()\n"
        "time.sleep(0.5)\nprint('running', flush=True)\ntime.sleep(100)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, text=True)
    assert trainer.stdout.readline() == "running\n"
    family = hostile.descendants(trainer.pid)
    assert len(family) >= 2  # a server and a program
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 10
    alive = family
    while alive and time.monotonic() < deadline:
        alive = {pid for pid in family if _runs(pid)}
        time.sleep(0.02)
    assert not alive


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_nothing_runs_where_nothing_holds(monkeypatch):
    def fails(*_, **__):
        raise SandboxError("no such thing here")

    monkeypatch.setattr(make, "SANDBOXES", dict.fromkeys(make.SANDBOXES, fails))
    with pytest.raises(
        UserError, match=r"are not run, because nothing on this machine holds them.*landlock: no such thing"
    ):
        make_sandbox("auto")
    with pytest.raises(UserError, match="landlock can't be used here: no such thing"):
        make_sandbox("landlock")


@pytest.mark.parametrize(
    ("hole", "noticed"), [("'x': (41, 198)", "network"), ("'x': (57, None), 'y': (56, 220)", "fork")]
)
def test_a_sandbox_that_lets_something_through_is_refused(hole, noticed, monkeypatch):
    """The probes meet a filter with a hole: sockets, or processes."""
    need("landlock")
    real = forked.Landlock._command

    def with_hole(self):
        command, options = real(self)
        start = f"from inside import syscalls; syscalls.ALLOWED.update({{{hole}}}); serve("
        return [*command[:-1], command[-1].replace("serve(", start)], options

    monkeypatch.setattr(forked.Landlock, "_command", with_hole)
    with pytest.raises(UserError, match=f"hostile programs got through: .*{noticed}"):
        make_sandbox("landlock", num_workers=1)


def test_files_that_lie_open_are_noticed(monkeypatch):
    need("landlock")
    monkeypatch.setattr(forked.Landlock, "_readable", lambda self: ["/."])
    with pytest.raises(UserError, match="hostile programs got through: read"):
        make_sandbox("landlock", num_workers=1)


def test_a_plain_process_is_only_used_by_name():
    with pytest.warns(UserWarning, match="with all of this user's rights"):
        plain = make_sandbox("subprocess", num_workers=1)
    assert "holds nothing" in plain.report
    assert plain.run(call("def f(): return 1")).outputs[0].value == 1
    plain.close()
    assert plain.run(call("def f(): return 1")).failed == "the sandbox is closed"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("landlok", "did you mean 'landlock'"),
        ("http", "needs the address"),
        ("http://127.0.0.1:9", "no sandbox server answers"),
    ],
)
def test_a_sandbox_that_is_not_there_is_named(name, says):
    with pytest.raises((UserError, SandboxError), match=says):
        make_sandbox(name)


@pytest.mark.parametrize(("column", "header"), [(0, "x86_64-linux-gnu/asm/unistd_64.h"), (1, "asm-generic/unistd.h")])
def test_system_call_numbers_are_those_of_the_kernel(column, header):
    path = Path("/usr/include") / header
    if not path.exists():
        pytest.skip(f"there is no {path}")
    numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text()))
    for name, given in syscalls.ALLOWED.items():
        known = numbers.get(name) or numbers.get(name.removeprefix("new"))
        assert given[column] == (int(known) if known is not None else None), name


make_filter = functools.lru_cache(confine.make_filter)


def decide(machine, number, *arguments, pid=77):
    """What the filter answers, by running it as the kernel would."""
    program = list(struct.iter_unpack("HBBI", make_filter(machine, pid)))
    data = struct.pack("<iIQ6Q", number, confine._ARCHITECTURES[machine], 0, *arguments, *[0] * (6 - len(arguments)))
    at = held = 0
    while True:
        code, yes, no, constant = program[at]
        at += 1
        if code == 0x06:
            return {0x7FFF0000: "allow", 0x00050001: "refuse", 0x80000000: "kill"}[constant]
        if code == 0x20:
            (held,) = struct.unpack_from("<I", data, constant)
        else:
            true = {0x15: held == constant, 0x35: held >= constant, 0x45: bool(held & constant)}[code]
            at += yes if true else no


@pytest.mark.parametrize(
    ("machine", "openat", "kill", "prlimit", "affinity", "clock", "clone", "execve", "socket"),
    [("x86_64", 257, 62, 302, 204, 228, 56, 59, 41), ("aarch64", 56, 129, 261, 123, 113, 220, 221, 198)],
)
def test_the_filter_decides_alike_on_both_architectures(
    machine, openat, kill, prlimit, affinity, clock, clone, execve, socket
):
    assert decide(machine, openat, -100 & (2**64 - 1), 0, os.O_CLOEXEC) == "allow"
    for flag in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_CREAT):
        assert decide(machine, openat, 0, 0, flag) == "refuse"
    assert decide(machine, kill, 77, 9) == "allow"
    for pid in (0, 1, 78, 2**32 - 1):
        assert decide(machine, kill, pid, 9) == "refuse"
    assert decide(machine, prlimit, 0, 7, 0, 1) == "allow"
    assert decide(machine, prlimit, 0, 7, 1 << 32, 1) == decide(machine, prlimit, 0, 7, 1, 1) == "refuse"
    for number in (clone, execve, socket, 100_000):
        assert decide(machine, number) == "refuse"
    allowed = {numbers[list(confine._ARCHITECTURES).index(machine)] for numbers in syscalls.ALLOWED.values()}
    for pid, decision in ((0, "allow"), (77, "allow"), (78, "refuse"), (1, "refuse")):
        assert decide(machine, prlimit, pid, 7, 0, 1) == decision
        assert decide(machine, affinity, pid) == decision
        assert decide(machine, clock, ((~pid << 3) | 2) & (2**64 - 1)) == decision
        assert decide(machine, clock, ((~pid << 3) | 6) & (2**64 - 1)) == decision
    assert [decide(machine, clock, number) for number in (0, 1, 2, 11, 12)] == ["allow"] * 4 + ["refuse"]
    restricted = {numbers[list(confine._ARCHITECTURES).index(machine)] for numbers, *_ in syscalls.restricted(77)}
    assert {number for number in range(600) if decide(machine, number) == "allow"} <= allowed | restricted
    if machine == "x86_64":
        assert decide(machine, 0x40000000) == "refuse"
