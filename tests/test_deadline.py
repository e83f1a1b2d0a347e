"""A block that hangs where no exception reaches it ends the process; one that ends in time does not."""

import subprocess
import sys
import time

import pytest


def run(code):
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    return done, time.monotonic() - started


HANGS = "import ctypes; hang = lambda: ctypes.PyDLL(None).sleep(30)\n"  # in C, with Python's lock held
IMPORT = "import time\nfrom coterie.deadline import hard_deadline\n"


@pytest.mark.parametrize(
    "code",
    [
        "with hard_deadline(0.3): hang()",
        "with hard_deadline(30):\n    with hard_deadline(0.3): hang()",
        "with hard_deadline(0.5):\n    with hard_deadline(30): pass\n    hang()",  # the outer one is armed again
    ],
)
def test_a_block_that_hangs_in_c_ends_the_process_with_its_stack(code):
    done, seconds = run(IMPORT + HANGS + code)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "in <lambda>" in done.stderr
    assert seconds < 20


def test_a_block_that_ended_in_time_leaves_nothing_armed():
    done, _ = run(IMPORT + "with hard_deadline(0.2): pass\ntime.sleep(0.6)\nprint('alive')")
    assert (done.returncode, done.stdout) == (0, "alive\n")


STOPPED = """
import os, signal, subprocess, sys, time
from coterie.rewards.time_limit import TookTooLong, time_limit
from coterie.deadline import running
def stop():
    subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -STOP {os.getpid()}; sleep 2; kill -CONT {os.getpid()}"])
"""


@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.parametrize(
    "code",
    [
        "stop()\nwith hard_deadline(1.5): time.sleep(3.3)",  # a sleep's time goes on
        "stop()\nwith time_limit(1.5):\n    for _ in range(10): time.sleep(0.1)",
        "start, ran = time.monotonic(), running(); stop(); time.sleep(2.8)\n"
        "assert running() - ran < 1.5 < 2.5 < time.monotonic() - start, running() - ran",
    ],
)
def test_time_for_which_the_process_is_stopped_does_not_count(code):
    done, seconds = run(IMPORT + STOPPED + code + "\nprint('alive')")
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
    assert seconds > 2


@pytest.mark.slow
@pytest.mark.timed
def test_what_ran_into_its_limit_after_a_stop_ends_all_the_same():
    code = "stop()\ntry:\n    with time_limit(1.5): time.sleep(30)\nexcept TookTooLong: print('late')"
    done, seconds = run(IMPORT + STOPPED + code)
    assert done.stdout == "late\n", done.stderr
    assert 3 < seconds < 20
    done, seconds = run(IMPORT + HANGS + STOPPED + "stop()\nwith hard_deadline(1): hang()")
    assert (done.returncode, "Timeout" in done.stderr) == (1, True)
    assert 2.75 < seconds < 20  # a second, and the stop of two, of which a quarter of a second counts


def test_the_end_waits_for_no_reader_of_its_stacks():
    """Standard error is a full pipe."""
    code = "import os; os.set_blocking(2, False)\ntry:\n    while True: os.write(2, b'x' * 4096)\nexcept BlockingIOError: os.set_blocking(2, True)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORT + HANGS + code + "with hard_deadline(0.3): hang()"], stderr=subprocess.PIPE
    )
    assert process.wait(25) == 1
    process.stderr.close()


def test_without_a_compiler_it_ends_too():
    code = "import os; os.environ['PATH'] = ''\nwith hard_deadline(0.3): hang()"
    done, _ = run(IMPORT + HANGS + code)
    assert (done.returncode, "Timeout" in done.stderr) == (1, True)


@pytest.mark.slow
def test_what_a_run_that_failed_leaves_behind_ends_nobody(tmp_path):
    """An exception is kept, as a notebook does: the step's time limit must not outlive the run with it."""
    code = f"""
import time, sys
sys.path.insert(0, {str(__file__).rpartition("/")[0]!r})
from pathlib import Path
import coterie
from coterie.training.policy_update import optimise
from coterie.training import grpo
def fails(*given, **more):
    raise RuntimeError("on purpose")
grpo.optimise = fails
recipe = ["cold_start=null", "limits.step_seconds=3", "evaluation={{prompts: 2, samples: 1}}", "prompts_per_step=2", "group_size=2",
          "sampling.max_new_tokens=4"]
try:
    coterie.train("equations", overrides=recipe, out={str(tmp_path / "run")!r})
except RuntimeError as error:
    kept = error
time.sleep(4)
print("alive")
"""
    done, _ = run(code)
    assert done.stdout.endswith("alive\n"), done.stderr
