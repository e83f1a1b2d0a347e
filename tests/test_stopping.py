"""Signals ask for a stop, wherever they strike; a second one ends the process; forked processes know nothing of it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAD = """
import os, signal, sys, time
from coterie import stopping
told = []
"""


def run(code, **options):
    return subprocess.run(
        [sys.executable, "-c", HEAD + code], capture_output=True, text=True, timeout=60, check=False, **options
    )


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_each_asks_for_a_stop_and_is_told_of(name):
    done = run(f"""
before = signal.getsignal(signal.{name})
with stopping.signals(told.append) as stop:
    os.kill(os.getpid(), signal.{name})
    time.sleep(0.2)
    try:
        stopping.may_stop()
    except stopping.StepLeftError:
        print("left", stop.number == signal.{name} == told[0])
stopping.may_stop()
print("handlers are back", signal.getsignal(signal.{name}) is before)
""")
    assert done.stdout == "left True\nhandlers are back True\n", done.stderr


def test_a_handler_strikes_in_the_middle_of_a_print_that_blocks():
    """The pipe is full and nobody reads it: the first signal is taken note of there, the second ends the process."""
    code = """
with stopping.signals(lambda number: os.write(2, b"told")):
    print("x" * 200_000)
"""
    process = subprocess.Popen([sys.executable, "-c", HEAD + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(1) == b"x"
    process.send_signal(signal.SIGTERM)
    assert process.stderr.read(4) == b"told"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    process.stdout.close()
    process.stderr.close()


def test_the_two_signals_of_a_terminal_that_goes_are_one_event():
    """A shell hands SIGHUP on that the kernel has sent already, and a service manager sends it right after SIGTERM."""
    done = run("""
for first in (signal.SIGHUP, signal.SIGTERM):
    with stopping.signals(told.append) as stop:
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGHUP)
        print(stop.number == first, flush=True)
with stopping.signals(told.append) as stop:
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(1.2)
    os.kill(os.getpid(), signal.SIGHUP)
print("not reached")
""")
    assert (done.returncode, done.stdout.split()) == (129, ["True", "True"])


def test_what_was_ignored_at_the_start_is_ignored():
    done = run(
        "with stopping.signals(told.append) as stop:\n    os.kill(os.getpid(), signal.SIGHUP); print(stop.number)",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert done.stdout == "None\n", done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_forked_process_ends_by_a_signal_as_any_other(number):
    done = run(f"""
with stopping.signals(told.append) as stop:
    stop.number = signal.SIGUSR2
    child = os.fork()
    if not child:
        stopping.may_stop()  # what its parent was asked is not asked of it
        time.sleep(30)
    time.sleep(0.2)
    os.kill(child, {int(number)})
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), stop.number == signal.SIGUSR2, told)
""")
    assert done.stdout == f"{-number} True []\n", done.stderr


EARLY = """
import os, signal
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))  # runs before what is registered later
"""


def test_a_signal_to_a_fresh_fork_is_none_to_its_parent():
    """As a pool sends it, which is closed before all of its processes have come up."""
    code = """
with stopping.signals(told.append) as stop:
    for _ in range(3):
        print(os.waitstatus_to_exitcode(os.waitpid(os.fork() or os._exit(0), 0)[1]), end=" ")
    time.sleep(0.2)
    print(stop.number, told, signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""
    done = subprocess.run(
        [sys.executable, "-c", EARLY + HEAD + code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "-15 -15 -15 None [] set()\n", done.stderr


def test_a_process_forked_behind_python_s_back_ends_by_a_signal():
    done = run(f"""
import ctypes
with stopping.signals(told.append) as stop:
    child = ctypes.CDLL(None).fork()
    if not child:
        for _ in range(100):
            time.sleep(0.1)
        os._exit(0)
    time.sleep(0.2)
    os.kill(child, {int(signal.SIGTERM)})
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert done.stdout == f"{-signal.SIGTERM}\n", done.stderr


@pytest.mark.parametrize("kind", ["fork", "spawn", "forkserver"])
def test_a_pool_of_processes_works_and_ends(tmp_path, kind):
    code = f"""
import multiprocessing
import helper
def work(multiprocess):
    with multiprocessing.get_context("{kind}").Pool(2) as pool:
        return pool.map(helper.double, [1, 2])
"""
    (tmp_path / "helper.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "main.py").write_text(
        f"{HEAD}{code}\nif __name__ == '__main__':\n    with stopping.signals(told.append):\n        print(work(None))\n"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "main.py")], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "[2, 4]\n", done.stderr


def test_a_pool_whose_processes_were_ended_holds_nobody_up():
    """They die with the lock of the pool's queue in their hands, and at the exit the pool waits for it for ever."""
    done = run("""
import multiprocessing
stopping._AT_EXIT = 1.0
pool = multiprocessing.get_context("fork").Pool(2)
pool.map(abs, [1, 2])
for child in multiprocessing.active_children():
    child.terminate()
time.sleep(1)
stopping.end_soon(143)
print(*[child.pid for child in multiprocessing.active_children()])
sys.exit(143)
""")
    assert done.returncode == 143, done.stderr
    assert done.stdout.split()
    time.sleep(0.5)
    lives = [Path("/proc", pid, "stat") for pid in done.stdout.split()]
    assert [stat for stat in lives if stat.exists() and stat.read_text().split()[2] != "Z"] == []
