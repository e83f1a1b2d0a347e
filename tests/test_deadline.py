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


def test_what_a_run_that_failed_leaves_behind_ends_nobody(tmp_path):
    """An exception is kept, as a notebook does: the step's time limit must not outlive the run with it."""
    code = f"""
import time, sys
sys.path.insert(0, {str(__file__).rpartition("/")[0]!r})
from pathlib import Path
import coterie
from coterie.training.optimise import optimise
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
