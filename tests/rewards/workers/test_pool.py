"""Killable worker processes: whatever one call does, the others get their answers."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from coterie.errors import RewardError, UserError
from coterie.rewards.workers.pool import WorkerPool

WAYS = """
import os, signal, subprocess, sys, time

def act(what, number=0):
    if what == "double":
        return 2 * number
    if what == "pid":
        time.sleep(0.1)
        return os.getpid()
    if what == "sleep":
        time.sleep(1000)
    if what == "spin":
        return sum(range(10**12))
    if what == "power":
        return 9 ** 9 ** 9 % 2
    if what == "ignore":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            try:
                time.sleep(1000)
            except BaseException:
                pass
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "grandchild":
        with open(number, "w") as file:
            file.write(str(subprocess.Popen(["sleep", "1000"]).pid))
        time.sleep(1000)
    if what == "raise":
        raise ValueError("no such thing")
    if what == "exit":
        print("goodbye", flush=True)
        os._exit(3)
    if what == "memory":
        return len(bytearray(3 << 30))
    if what == "print":
        print("x" * 3_000_000)
        os.write(1, b"and to the file descriptor" * 1000)
        return sys.stdin.read()
    if what == "object":
        return object()
    if what == "huge":
        return [10 ** 5000]
    if what == "plain":
        return [None, True, 1, 0.5, float("inf"), "text \\ud800", {"key": [1]}, (1, 2), [ValueError("in a list")]]
    if what == "fd":
        return sorted(os.listdir("/proc/self/fd"))
    if what == "modules":
        return [name for name in ("torch", "transformers") if name in sys.modules]
    if what == "long":
        return len(number)
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    path = tmp_path_factory.mktemp("ways") / "ways.py"
    path.write_text(WAYS)
    return f"{path}:act"


@pytest.fixture
def pool(target):
    made = WorkerPool(target, num_workers=2, seconds=10.0)
    yield made
    made.close()


def doubles(count):
    return [{"what": "double", "number": number} for number in range(count)]


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def await_end(process, seconds=5.0):
    end = time.monotonic() + seconds
    while alive(process) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(process)


def test_answers_come_back_in_order_from_several_workers(pool):
    assert pool.map([]) == []
    assert pool.map(doubles(50)) == [2 * number for number in range(50)]
    pids = pool.map([{"what": "pid"}] * 6)
    assert len(set(pids)) == 2
    assert os.getpid() not in pids
    assert set(pool.map([{"what": "pid"}] * 6)) == set(pids), "workers are kept from call to call"


@pytest.mark.timed
@pytest.mark.parametrize("what", ["sleep", "spin", "power", "ignore", "stop"])
def test_a_call_over_its_time_is_killed_and_its_worker_replaced(pool, what):
    before = set(pool.map([{"what": "pid"}] * 6))
    began = time.monotonic()
    answers = pool.map([*doubles(5), {"what": what}, *doubles(5)], seconds=0.7)
    assert 0.7 <= time.monotonic() - began < 10
    assert isinstance(answers[5], RewardError)
    assert str(answers[5]) == "took longer than 0.7 s"
    assert answers[:5] == answers[6:] == [0, 2, 4, 6, 8]
    after = set(pool.map([{"what": "pid"}] * 6))
    assert len(before & after) == 1
    assert len(after) == 2
    assert all(await_end(process) for process in before - after)


def test_what_a_killed_worker_started_is_killed_with_it(pool, tmp_path):
    (answer,) = pool.map([{"what": "grandchild", "number": str(tmp_path / "pid")}], seconds=1.0)
    assert isinstance(answer, RewardError)
    assert await_end(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV])
def test_a_worker_killed_or_stopped_from_outside_is_replaced(pool, number):
    """Between calls, and in the midst of one."""
    pids = pool.map([{"what": "pid"}] * 6)
    os.kill(pids[0], number)
    time.sleep(0.2)
    answers = pool.map(doubles(20), seconds=1.5)
    assert sum(isinstance(answer, RewardError) for answer in answers) <= (number == signal.SIGSTOP)
    victim = pool.map([{"what": "pid"}])[0]
    threading.Timer(0.5, os.kill, (victim, number)).start()
    answers = pool.map([{"what": "sleep"}, {"what": "sleep"}], seconds=1.5)
    assert all(isinstance(answer, RewardError) for answer in answers)
    assert min(map(str, answers)) == (
        "took longer than 1.5 s" if number == signal.SIGSTOP else f"the worker died: {number.name}"
    )
    assert pool.map(doubles(3)) == [0, 2, 4]


def test_a_stopped_worker_does_not_block_a_long_message(pool):
    """More than a pipe holds is sent to a process that does not read."""
    pids = set(pool.map([{"what": "pid"}] * 6))
    for process in pids:
        os.kill(process, signal.SIGSTOP)
    answers = pool.map([{"what": "long", "number": "x" * 5_000_000}] * 2, seconds=1.0)
    assert [str(answer) for answer in answers] == ["took longer than 1 s"] * 2
    assert pool.map([{"what": "long", "number": "x" * 5_000_000}]) == [5_000_000]


def test_what_a_call_raises_and_a_workers_last_words_are_told(pool):
    raised, died, late = pool.map([{"what": "raise"}, {"what": "exit"}, {"what": "double", "number": 4}])
    assert re.fullmatch(r"raised ValueError: no such thing \(.*ways\.py, line \d+, in act\)", str(raised))
    assert "raise ValueError" in raised.__notes__[0]
    assert str(died) == "the worker died: exit status 3: goodbye"
    assert late == 8


def test_memory_is_limited(target):
    pool = WorkerPool(target, num_workers=1, seconds=10.0, memory_megabytes=512)
    answer, after = pool.map([{"what": "memory"}, {"what": "double", "number": 1}])
    pool.close()
    assert "MemoryError" in str(answer)
    assert after == 2


def test_printing_does_not_break_the_protocol(pool):
    """Nor does reading: a worker's own stdin is empty."""
    assert pool.map([{"what": "print"}, *doubles(3), {"what": "print"}]) == ["", 0, 2, 4, ""]


def test_only_plain_values_come_back(pool):
    plain, thing, huge = pool.map([{"what": "plain"}, {"what": "object"}, {"what": "huge"}])
    assert plain[:8] == [None, True, 1, 0.5, float("inf"), "text \ud800", {"key": [1]}, [1, 2]]
    assert str(plain[8][0]) == "raised ValueError: in a list"
    assert "no plain value" in str(thing)
    assert isinstance(huge, RewardError)


def test_arguments_that_cannot_be_sent_fail_alone(pool):
    unsendable, fine = pool.map([{"what": "double", "number": threading.Lock()}, {"what": "double", "number": 2}])
    assert isinstance(unsendable, RewardError)
    assert fine == 4


def test_workers_inherit_no_files_and_no_torch(pool, tmp_path):
    with open(tmp_path / "secret", "w") as secret:
        os.set_inheritable(secret.fileno(), True)
        descriptors, modules = pool.map([{"what": "fd"}, {"what": "modules"}])
    assert len(descriptors) <= 6, descriptors  # the standard three, two pipes, and the listing's own
    assert modules == []


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("import nowhere_at_all", "f", "No module named 'nowhere_at_all'"),
        ("raise RuntimeError('not today')", "f", "RuntimeError: not today"),
        ("raise SystemExit(4)", "f", "SystemExit: 4"),
        ("import os; os.write(2, b'farewell'); os._exit(5)", "f", "exit status 5: farewell"),
        ("g = print", "f", "no function 'f'"),
    ],
)
def test_a_target_that_cannot_be_imported_is_the_users_error(tmp_path, text, name, message):
    (tmp_path / "bad.py").write_text(text)
    pool = WorkerPool(f"{tmp_path}/bad.py:{name}")
    with pytest.raises(UserError, match=message):
        pool.map(doubles(3))
    pool.close()


def test_a_relative_target_is_found_after_the_folder_changed(tmp_path, monkeypatch):
    (tmp_path / "near.py").write_text("def double(number): return 2 * number")
    monkeypatch.chdir(tmp_path)
    pool = WorkerPool("near.py:double", num_workers=1)
    monkeypatch.chdir("/")
    assert pool.map([{"number": 3}]) == [6]
    pool.close()


def test_workers_outlive_the_thread_that_first_called(pool):
    pids = []
    thread = threading.Thread(target=lambda: pids.extend(pool.map([{"what": "pid"}] * 6)))
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert all(alive(process) for process in pids)
    assert set(pool.map([{"what": "pid"}] * 6)) == set(pids)


def test_close_ends_the_workers_and_the_pool_may_begin_again(pool):
    pids = set(pool.map([{"what": "pid"}] * 6))
    pool.close()
    pool.close()
    assert not any(alive(process) for process in pids)
    assert pool.map(doubles(2)) == [0, 2]


@pytest.mark.parametrize("what", ["double", "spin", "stop"])
def test_workers_die_with_their_parent(target, what, tmp_path):
    """kill -9 of the parent while its workers wait, spin in C and are stopped."""
    program = f"""
        from coterie.rewards.workers.pool import WorkerPool
        pool = WorkerPool({target!r}, num_workers=2, seconds=1000.0)
        print(*set(pool.map([dict(what="pid")] * 6)), flush=True)
        pool.map([dict(what={what!r})] * 2)
        input()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        pids = [int(word) for word in parent.stdout.readline().split()]
        time.sleep(0.5)
        assert len(pids) == 2
        assert all(alive(process) for process in pids)
        parent.kill()
    assert all(await_end(process) for process in pids)
