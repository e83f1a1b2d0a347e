"""What stands around a run: its console and terminal, what its rewards fork, its caches, its neighbours, its place, its age."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import sqlite3
import tarfile
import time
from contextlib import closing, suppress
from pathlib import Path

from broken_runs import REWARD, ROOT, Command, Lab, copied, differences, events, finished, train
from faults_ends import Outcome, refused

LOUD = REWARD.replace("    time.sleep", "    print('x' * 300_000)\n    time.sleep")


def blocked_output(lab: Lab) -> Outcome:
    """Output into a pipe that nobody reads, a closed one, a full disk: the run goes on to the same bits. Told to stop while the
    pipe is full, it saves and ends."""
    wrong = []
    for kind in ("full pipe", "closed pipe", "full disk"):
        home = lab.home(reward=LOUD)
        reading, end = _end_of(kind)
        ended = train(home, apart=True, output=end).wait()
        wrong += [f"{kind}: status {ended.status}"] if ended.status else []
        wrong += [f"{kind}: differs in {what}" for what in differences(finished(home), lab.whole())]
        wrong += [] if events(home / "run", "output_lost") else [f"{kind}: no event says so"]
        _close(reading, end)
    home = lab.home(reward=LOUD)
    reading, end = _end_of("full pipe")
    running = train(home, apart=True, output=end, PACE="0.5")
    _await(home / "run" / "checkpoints" / "step_000002", running)
    running.send(signal.SIGTERM)
    sent = time.monotonic()
    ended = running.wait()
    seconds = time.monotonic() - sent
    if ended.status != 128 + signal.SIGTERM or seconds > 20:
        wrong.append(f"SIGTERM into a full pipe: status {ended.status} after {seconds:.0f} s")
    wrong += [f"stopped: differs in {what}" for what in differences(finished(home), lab.whole())]
    _close(reading, end)
    return Outcome(wrong, f"3 outputs, and a stop that took {seconds:.1f} s, 5 of them for a reader who might come")


def _end_of(kind: str) -> tuple[int | None, int]:
    """What to write into, and the other end, which has to stay open."""
    if kind == "full disk":
        return None, os.open("/dev/full", os.O_WRONLY)
    reading, end = os.pipe()
    if kind == "closed pipe":
        os.close(reading)
        return None, end
    return reading, end


def _close(*descriptors: int | None) -> None:
    for descriptor in descriptors:
        if descriptor is not None:
            os.close(descriptor)


def _await(path: Path, running: Command, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        if not running.running or time.monotonic() > end:
            raise RuntimeError(f"{path} did not come")
        time.sleep(0.01)


def lost_terminal(lab: Lab) -> Outcome:
    """A terminal that is closed, and SIGUSR1: saved and stopped in order, status 129 and 138, resumed to the same bits. With nohup
    the run goes on."""
    wrong = []
    for limits, status in ((["terminal"], 128 + signal.SIGHUP), (["terminal", "nohup"], 0)):
        home = lab.home()
        ours, theirs = pty.openpty()
        running = train(home, apart=True, output=theirs, limits=limits, PACE="0.6")
        os.close(theirs)
        _await(home / "run" / "checkpoints" / "step_000002", running)
        os.close(ours)
        ended = running.wait()
        wrong += [f"closed, {limits}: status {ended.status}"] if ended.status != status else []
        wrong += [f"closed, {limits}: differs in {what}" for what in differences(finished(home), lab.whole())]
    home = lab.home()
    running = train(home, PACE="0.2")
    running.until("grpo 3/")
    running.send(signal.SIGUSR1)
    wrong += refused(running.wait(), 128 + signal.SIGUSR1, "SIGUSR1: stopping and saving", "--resume")
    wrong += [f"SIGUSR1: differs in {what}" for what in differences(finished(home), lab.whole())]
    return Outcome(wrong, "closed with and without nohup, and SIGUSR1")


POOLS = """
import multiprocessing, subprocess, sys
import helper

def letters(completions, **columns):
    values = []
    for kind in KINDS:
        with multiprocessing.get_context(kind).Pool(2) as pool:
            values.append(pool.map(helper.letters_of, completions))
    script = "import sys; print(sum(letter.isalpha() for letter in sys.stdin.buffer.read().decode()))"
    done = [subprocess.run([sys.executable, "-c", script], input=text.encode(), capture_output=True) for text in completions[:1]]
    assert float(done[0].stdout) == values[0][0] and all(found == values[0] for found in values)
    return values[0]
"""
HELPER = "def letters_of(text):\n    return float(sum(letter.isalpha() for letter in text))\n"


def forking_reward(lab: Lab) -> Outcome:
    """A reward with multiprocessing pools that fork and that spawn, and with subprocesses: the same bits, nothing left behind, and
    a signal stops it as any other."""
    kinds = ("fork",) if lab.quick else ("fork", "spawn")
    reward = POOLS.replace("KINDS", repr(kinds))
    wrong = []
    home = lab.home(reward=reward, files={"helper.py": HELPER})
    running = train(home, apart=True)  # as a user does: what is spawned imports what the command is
    running.until("grpo 2/")
    running.send(signal.SIGTERM)
    wrong += refused(running.wait(), 128 + signal.SIGTERM, "--resume")
    wrong += ["left processes behind"] if running.orphans() else []
    wrong += [f"differs in {what}" for what in differences(finished(home, apart=True), lab.whole())]
    return Outcome(wrong, f"pools by {' and '.join(kinds)}, and a subprocess, stopped and resumed")


def damaged_kernels(lab: Lab) -> Outcome:
    """The compiled loops in the user's cache cut in half, and emptied: the run goes on to the same bits."""
    wrong, count = [], 0
    for harm in ("half", "empty"):
        home = lab.home()
        cache = home / "cache"
        cache.mkdir(mode=0o700)
        first = lab.home()
        wrong += refused(train(first, apart=True, XDG_CACHE_HOME=str(cache)).wait(), 0)
        for file in cache.rglob("*.so"):
            os.truncate(file, file.stat().st_size // 2 if harm == "half" else 0)
            count += 1
        ended = train(home, apart=True, XDG_CACHE_HOME=str(cache)).wait()
        wrong += [f"{harm}: {text}" for text in refused(ended, 0)]
        wrong += [f"{harm}: differs in {what}" for what in differences(finished(home), lab.whole())]
    return Outcome(wrong + ([] if count else ["nothing was cached"]), f"{count} files, cut in half and emptied")


def held_database(lab: Lab) -> Outcome:
    """run.db held by another program for longer than SQLite would wait: steps are kept in memory, said, and recorded once it is free."""
    home, seconds = lab.home(), 8.0 if lab.quick else 45.0
    pace = seconds / 80
    running = train(home, PACE=str(pace))
    running.until("grpo 1/")
    with closing(sqlite3.connect(home / "run" / "run.db", isolation_level=None, timeout=30)) as other:
        other.execute("BEGIN IMMEDIATE")
        time.sleep(seconds)
        other.execute("ROLLBACK")
    ended = running.wait()
    wrong = refused(ended, 0, "is held by another program", "is free again")
    wrong += [f"differs in {what}" for what in differences(home / "run", lab.whole())] if not wrong else []
    return Outcome(wrong, f"held for {seconds:g} s")


def moved_project(lab: Lab) -> Outcome:
    """A project that is renamed goes on to the same bits with its own files; a copy never with the original's."""
    home = lab.home()
    train(home, "--stop-after", "4").wait()
    copy = copied(home, "copy")
    (copy / "data.jsonl").write_text(json.dumps({"prompt": "other"}) + "\n" + json.dumps({"prompt": "rows"}) + "\n")
    wrong = refused(train(copy, "--trust").wait(), 2, "task.data: the file is not what it was")
    (copy / "data.jsonl").unlink()
    wrong += refused(train(copy, "--trust").wait(), 2, "is not there", "--set task.data=PATH")
    moved = home.rename(home.with_name(f"{home.name}_moved"))
    ended = train(moved, "--trust").wait()
    wrong += refused(ended, 0)
    wrong += [f"differs in {what}" for what in differences(moved / "run", lab.whole())] if not wrong else []
    return Outcome(wrong, "1 renamed, 2 copies refused")


def suspended_process(lab: Lab) -> Outcome:
    """A run that is stopped (SIGSTOP, as by Ctrl-Z) for longer than its limits, in a reward and in a step: it goes on to the same bits."""
    changes = {"limits": {"step_seconds": 6}, "rewards": [{"function": "reward.py:letters", "timeout": 3}]}
    home = lab.home(**changes)
    running = train(home, PACE="0.5")
    running.until("grpo 2/")
    time.sleep(0.2)
    running.send(signal.SIGSTOP)
    time.sleep(8)
    running.send(signal.SIGCONT)
    wrong = refused(running.wait(), 0)
    wrong += [f"differs in {what}" for what in differences(home / "run", lab.whole(**changes))] if not wrong else []
    return Outcome(wrong, "stopped for 8 s, with limits of 3 and 6")


def older_run(lab: Lab) -> Outcome:
    """A run that an older version began, in a project that lies elsewhere by now: resumed to what it would have ended with."""
    home = lab.folder / "older"
    with tarfile.open(ROOT / "tests" / "training" / "older_run.tar.gz") as opened:
        opened.extractall(home, filter="data")
    home = home / "project"
    ended = Command(home, "train", "--resume", "runs/project", "--trust").wait()
    wrong = refused(ended, 0, "the project was moved or copied", "in other surroundings")
    run = home / "runs" / "project"
    found = json.loads((home / "expected" / "record.json").read_text())["completions"] if not wrong else []
    if not wrong:
        with closing(sqlite3.connect(run / "run.db")) as db:
            query = "SELECT step, prompt_number, completion_number, tokens, reward FROM completions ORDER BY 1, 2, 3"
            wrong += [] if [list(row) for row in db.execute(query)] == found else ["differs in completions"]
        wrong += [] if _largest_difference(run, home) < 1e-6 else ["differs in the final model"]
    with suppress(OSError):
        shutil.rmtree(home.parent)
    return Outcome(wrong, f"{len(found)} completions equal, no weight further than 1e-6 from the older version's")


def _largest_difference(run: Path, home: Path) -> float:
    from safetensors.torch import load_file

    one = load_file(run / "model" / "model.safetensors")
    other = load_file(home / "expected" / "model.safetensors")
    return max(float((one[name] - other[name]).abs().max()) for name in other)
