"""What is promised for when things break holds: each experiment of benchmarks/faults.py, with fewer repeats."""

import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from benchmark_code import FOLDER, load

ROOT = Path(__file__).parent.parent
faults = load("faults")
POINTS, plan = load("planned_fault").POINTS, load("planned_fault").plan
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals, locks and limits are tested on Linux")
NAMES = [
    "kills", "trainers", "kills inside saves", "damaged checkpoints", "all damaged", "disk full", "folder lost", "signals",
    "changed inputs", "undeletable", "not finite", "equal rewards", "lengths", "bad recipes", "bad rows", "bad rewards",
    "workers", "no memory", "one folder", "no network", "readers", "blocked output", "lost terminal", "forking reward",
    "damaged kernels", "held database", "moved project", "suspended process", "older run",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def found_by_processes():
    """The processes in which runs are forked import what forks them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(FOLDER))
        yield


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return faults.Lab(tmp_path_factory.mktemp("lab"), quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_is_promised_holds(lab, name):
    outcome = faults.EXPERIMENTS[name](lab)
    assert outcome.wrong == []


def test_every_experiment_is_a_test():
    assert list(faults.EXPERIMENTS) == NAMES


@pytest.mark.parametrize("point", POINTS)
def test_every_point_for_a_fault_is_in_the_code(point):
    """What is wrapped there has the name that planned_fault.py knows it by."""
    wrapped = []
    plan(f"{point}:1:1" if point == "in_save" else f"{point}:1", lambda owner, name, value: wrapped.append(name))
    assert len(wrapped) > 1  # the steps of a run, and what is done at the point


@pytest.mark.slow
def test_an_experiment_can_fail(lab, monkeypatch):
    """A run that was changed on the way is told from one that was left alone."""
    home = lab.home(seed=1)
    assert faults.differences(faults.finished(home), lab.whole()) != []


@pytest.mark.slow
def test_a_stop_while_the_record_is_held_ends_at_a_checkpoint(lab):
    """It waits for the file as long as what sent the signal may wait for it."""
    home = lab.home()
    running = faults.train(home, PACE="0.3")
    running.until("grpo 5/")
    with closing(sqlite3.connect(home / "run" / "run.db", isolation_level=None, timeout=30)) as other:
        other.execute("BEGIN IMMEDIATE")
        running.until("grpo 7/")
        running.send(signal.SIGTERM)
        ended = running.wait()
        other.execute("ROLLBACK")
    assert ended.status == 1, ended.printed
    assert "held by another program for too long" in ended.printed
    assert "The newest checkpoint stands" in ended.printed
    assert sorted(path.name for path in (home / "run" / "checkpoints").glob("step_*"))[-1] in (
        "step_000004",
        "step_000005",
    )
    assert faults.differences(faults.finished(home), lab.whole()) == []


@pytest.mark.slow
def test_a_user_who_has_no_home_can_train(lab):
    """As in a container that is given any number for a user."""
    home = lab.home()
    ended = faults.train(home, limits=["home"]).wait()
    assert ended.status == 0, ended.printed
    assert faults.differences(home / "run", lab.whole()) == []


@pytest.mark.parametrize("name", ["recipe.yaml", "data.jsonl", "reward.py", "model/config.json"])
def test_a_file_that_cannot_be_read_is_named_with_status_2(lab, name):
    home = lab.home()
    faults.make_model(home / "model", lambda weights: None)
    faults.write_recipe(home, {"model": "./model"} if name.startswith("model") else {})
    (home / name).chmod(0)
    ended = faults.train(home, limits=["permissions"]).wait()
    assert (ended.status, Path(name).name in ended.printed) == (2, True), ended.printed
    assert "Traceback" not in ended.printed


SECRETS = {
    "OPENAI_API_KEY": "sk-oai-0123456789abcdef",
    "HF_TOKEN": "hf_0123456789abcdef",
    "AWS_SECRET_ACCESS_KEY": "aws0123456789abcdef",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, "before_backward:3:raise"])
def test_keys_in_the_environment_reach_no_file_and_no_output(lab, fault):
    home = lab.home()
    ended = faults.train(home, "--debug", "--profile", fault=fault, **SECRETS).wait()
    assert (ended.status == 0) == (fault is None), ended.printed
    files = [path for path in home.rglob("*") if path.is_file()]
    assert {"run.db", "recipe.yaml"} <= {path.name for path in files}
    assert fault or "report.html" in {path.name for path in files}
    for secret in SECRETS.values():
        assert secret not in ended.printed
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


LEAKING = """
import os

def letters(completions, **columns):
    raise ValueError(f"Incorrect key {os.environ['OPENAI_API_KEY']}, nor is hf_abcdefghijklmnopqrstuvwxyz one")
"""


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_a_key_in_what_a_reward_raises_is_hidden(lab, share):
    """In run.db, the report, what is printed, and with --debug the traceback."""
    home = lab.home(reward=LEAKING, max_failed_rewards=share)
    ended = faults.train(home, "--debug", **SECRETS).wait()
    assert (ended.status == 0) == (share == 1.0), ended.printed
    if share:
        assert faults.events(home / "run", "reward_failure")[0].endswith(
            "Incorrect key ***, nor is *** one (reward.py, line 5, in letters)"
        )
    for secret in (SECRETS["OPENAI_API_KEY"], "hf_abcdef"):
        assert secret not in ended.printed
        assert [path for path in home.glob("run/**/*") if path.is_file() and secret.encode() in path.read_bytes()] == []


def test_pickled_weights_are_refused_and_never_read(lab):
    """A pickle that would leave a mark if it were loaded, under each name that transformers knows."""
    home = lab.home()
    faults.make_model(home / "model", lambda weights: None)
    mark = home / "read"
    (home / "model" / "model.safetensors").unlink()
    bomb = f"cos\nsystem\n(S'touch {mark}'\ntR.".encode()
    for name in ("pytorch_model.bin", "model.bin", "tf_model.h5"):
        (home / "model" / name).write_bytes(bomb)
    faults.write_recipe(home, {"model": "./model", "tokenizer": None})
    for command in (["train", "recipe.yaml", "--out", "run"], ["sample", "./model", "hello"], ["check", "recipe.yaml"]):
        ended = faults.Command(home, *command).wait()
        assert (ended.status, "safetensors" in ended.printed) == (2, True), ended.printed
    assert not mark.exists()


def test_make_faults_runs_the_experiments():
    shown = subprocess.run(["make", "--dry-run", "faults"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "benchmarks/faults.py" in shown.stdout
