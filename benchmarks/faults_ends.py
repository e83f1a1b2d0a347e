"""How runs end and go on: kills, saves, disks, folders, signals, changes."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broken_runs import (
    REWARD,
    TRAINERS,
    Command,
    Lab,
    copied,
    differences,
    events,
    finished,
    rows,
    steps_of,
    train,
)

from coterie.runs.checkpoint import find_checkpoint

FILES = ("model.safetensors", "optimiser.safetensors", "position.json", "manifest.json")
BLOCK = 4096


@dataclass(frozen=True)
class Outcome:
    """wrong: what did not hold, in words; empty where all of it did. figure: what was counted or measured."""

    wrong: list[str]
    figure: str


def kills(lab: Lab) -> Outcome:
    """`kill -9` at random moments of a 30-step run, then the same command: the uninterrupted run's bits, each step once."""
    num_kills, apart = (3, False) if lab.quick else (20, True)
    changes = {"steps": 30}
    whole = lab.whole(**changes)
    moments = random.Random(0)
    wrong, done, num_runs = [], 0, 0
    while done < num_kills:
        home, num_runs = lab.home(**changes), num_runs + 1
        while True:
            session = train(home, apart=apart)
            if done < num_kills:
                _await_a_moment(session, moments)
                done += session.running
                session.send(signal.SIGKILL)
            ended = session.wait()
            if ended.status == 0:
                break
            if ended.status != 128 + signal.SIGKILL:
                return Outcome([f"status {ended.status}: {ended.printed[-500:]}"], "")
        wrong += [f"run {num_runs} differs in {what}" for what in differences(home / "run", whole)]
        if steps_of(home / "run") != list(range(1, 31)):
            wrong.append(f"run {num_runs} has the steps {steps_of(home / 'run')}")
    return Outcome(wrong, f"{done} kills in {num_runs} runs, every tensor, metric and completion equal")


def _await_a_moment(session: Command, moments: random.Random) -> None:
    """Until some steps are done, up to ten, and a little longer; in one of six cases it is in the start."""
    if moments.random() < 1 / 6:
        time.sleep(moments.uniform(0, 3))
        return
    num_steps = moments.randint(0, 10)
    while session.running and len(re.findall(r"^grpo ", session.printed(), re.MULTILINE)) < num_steps:
        time.sleep(0.002)
    time.sleep(moments.uniform(0, 0.1))


def trainers(lab: Lab) -> Outcome:
    """Every trainer, killed twice in a step between two saves, a staged one in each stage: the uninterrupted run's bits."""
    wrong = []
    names = list(TRAINERS)[1::3] if lab.quick else list(TRAINERS)
    for name in names:
        changes = TRAINERS[name]
        home = lab.home(**changes)
        for fault in ("before_step:4", "before_step:7"):
            killed = train(home, fault=fault).wait()
            if killed.status != 128 + signal.SIGKILL:
                wrong.append(f"{name}: was not killed: {killed.printed[-300:]}")
        wrong += [f"{name} differs in {what}" for what in differences(finished(home), lab.whole(**changes))]
    return Outcome(wrong, f"{len(names)}: {', '.join(names)}")


def kills_inside_saves(lab: Lab) -> Outcome:
    """Killed inside a save, before each of its files: the checkpoint before it is used. Killed right after it: this one is.
    The bits are the same."""
    wrong = []
    numbers = (2, 4) if lab.quick else range(1, len(FILES) + 1)
    for fault, used in [(f"in_save:{number}:4", 2) for number in numbers] + [("after_save:4", 4)]:
        home = lab.home()
        killed = train(home, fault=fault).wait()
        resumed = train(home).wait()
        if killed.status != 128 + signal.SIGKILL or not resumes_after(resumed.printed, used):
            wrong.append(f"{fault}: {killed.status}, {resumed.printed[:300]}")
        wrong += [f"{fault}: differs in {what}" for what in differences(home / "run", lab.whole())]
    return Outcome(wrong, f"before {len(numbers)} of {len(FILES)} files, and after the last")


def resumes_after(printed: str, step: int) -> bool:
    """Whether the first step that was taken is the one after this."""
    taken = re.findall(r"^\S.*? (\d+)/\d+  ", printed, re.MULTILINE)
    return bool(taken) and int(taken[0]) == step + 1


def damaged_checkpoints(lab: Lab) -> Outcome:
    """Each file of the newest checkpoint truncated, deleted, zeroed, or with a bit flipped: found, named, the one before used."""
    stopped = lab.home()
    train(stopped, "--stop-after", "6").wait()
    cases = list(itertools.product(FILES, HARMS))
    resumed = [(FILES[0], "flip"), (FILES[3], "truncate")] if lab.quick else cases
    wrong = []
    for file, harm in cases:
        home = copied(stopped, f"{file.partition('.')[0]}_{harm}")
        HARMS[harm](home / "run" / "checkpoints" / "step_000006" / file)
        reports: list[str] = []
        if find_checkpoint(home / "run" / "checkpoints", reports.append).step != 4 or file.partition(".")[
            0
        ] not in "".join(reports):
            wrong.append(f"{harm} {file}: {reports}")
        if (file, harm) in resumed:
            ended = train(home, "--trust").wait()  # a copy's code has not been run where it lies
            if file.partition(".")[0] not in ended.printed or not resumes_after(ended.printed, 4):
                wrong.append(f"{harm} {file}: {ended.printed[:300]}")
            wrong += [f"{harm} {file}: differs in {what}" for what in differences(home / "run", lab.whole())]
    return Outcome(wrong, f"{len(cases)} of {len(cases)} found, {len(resumed)} of them resumed to the same bits")


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


HARMS: dict[str, Callable[[Path], Any]] = {
    "truncate": lambda file: os.truncate(file, file.stat().st_size // 2),
    "delete": lambda file: file.unlink(),
    "zero": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "flip": _flip,
}


def all_damaged(lab: Lab) -> Outcome:
    """All checkpoints damaged: a refusal with status 2 that names each."""
    home = lab.home()
    train(home, "--stop-after", "6").wait()
    names = sorted(path.name for path in (home / "run" / "checkpoints").iterdir())
    for name in names:
        HARMS["flip"](home / "run" / "checkpoints" / name / "model.safetensors")
    ended = train(home).wait()
    wrong = [f"{name} is not named: {ended.printed}" for name in names if name not in ended.printed]
    return Outcome(wrong + refused(ended, 2), f"{len(names)} checkpoints named")


def refused(ended: Any, status: int, *words: str) -> list[str]:
    """What is wrong with how a command ended that had to end with this status, these words and no traceback."""
    missing = [word for word in words if word not in ended.printed]
    if ended.status == status and not missing and "Traceback" not in ended.printed:
        return []
    return [f"status {ended.status} instead of {status}, without {missing}: {ended.printed[-600:]}"]


def disk_full(lab: Lab) -> Outcome:
    """The disk full while it saves, and while it records: needed and free space are said, what was saved is whole, and with
    space again the bits are the same."""
    wrong = []
    with small_disk(lab.folder / "small", megabytes=16) as disk:
        if disk is not None:
            home = lab.home()
            shutil.copytree(home, disk, dirs_exist_ok=True)
            train(disk, "--stop-after", "4").wait()
            for left in (
                180_000,
                0,
            ):  # less than a checkpoint takes; nothing at all, so that run.db can't be written either
                _fill(disk / "ballast", leave=left)
                ended = train(disk).wait()
                wrong += refused(ended, 1, "free", "--resume", *(["needs"] if left else []))
                (disk / "ballast").unlink()
                reports: list[str] = []
                if find_checkpoint(disk / "run" / "checkpoints", reports.append).step < 4 or reports:
                    wrong.append(f"what was saved is not whole: {reports}")
            wrong += [f"differs in {what}" for what in differences(finished(disk), lab.whole())]
    for fault in ("in_save:2:4:full", "in_record:4:full"):
        home = lab.home()
        wrong += refused(train(home, fault=fault).wait(), 1, "No space left", "free", "--resume")
        wrong += [f"{fault}: differs in {what}" for what in differences(finished(home), lab.whole())]
    return Outcome(wrong, f"{'a full tmpfs twice, ' if disk is not None else ''}ENOSPC in a save and in a record")


@contextmanager
def small_disk(folder: Path, *, megabytes: int) -> Iterator[Path | None]:
    """A file system of its own, or None where it can't be mounted."""
    folder.mkdir(parents=True)
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "none"]
    mounted = subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(file: Path, *, leave: int) -> None:
    """Write a file until this many bytes are free."""
    free = shutil.disk_usage(file.parent).free // BLOCK * BLOCK
    file.write_bytes(bytes(max(0, free - leave // BLOCK * BLOCK)))


def folder_lost(lab: Lab) -> Outcome:
    """The run folder made read-only, or removed, while it runs: it ends within 30 s, says so, and makes no new folder."""
    wrong, seconds = [], []
    home = lab.home()
    running = train(home, limits=["permissions"], PACE="0.1")
    running.until("grpo 2/")
    locked = (home / "run", home / "run" / "checkpoints")
    for path in locked:
        path.chmod(0o555)
    changed = time.monotonic()
    wrong += refused(running.wait(), 1, "Permission denied", "--resume")
    seconds.append(time.monotonic() - changed)
    for path in locked:
        path.chmod(0o755)
    wrong += [f"read-only: differs in {what}" for what in differences(finished(home), lab.whole())]
    home = lab.home()
    running = train(home, PACE="0.1")
    running.until("grpo 3/")
    changed = time.monotonic()
    (home / "run").rename(home / "gone")
    shutil.rmtree(home / "gone")
    wrong += refused(running.wait(), 1, str(Path("run")), "removed")
    seconds.append(time.monotonic() - changed)
    if (home / "run").exists():
        wrong.append(f"a new folder was made: {list((home / 'run').rglob('*'))}")
    wrong += [f"took {took:.0f} s" for took in seconds if took > 30]
    return Outcome(wrong, f"ended after {max(seconds):.1f} s at most")


PHASES = {"sampling": "after_sample:4", "reward": "in_reward:4", "backward": "before_backward:4", "save": "in_save:2:4",
          "record": "in_record:4", "first evaluation": "in_reward:0", "last save": "in_save:2:8"}  # fmt: skip
OTHERS = ("staged", "sft", "ppo", "dpo", "reward model")
SIGNALS = {"term": signal.SIGTERM, "interrupt": signal.SIGINT}


def signals(lab: Lab) -> Outcome:
    """SIGTERM and Ctrl-C in each phase of a run, and in each trainer: saved, closed, exit 143 and 130, no orphans, resumed to
    the same bits. A second one ends it within 2 s, whatever a reward catches."""
    wrong = []
    cases = [
        (f"{name} in {phase}", f"{PHASES[phase]}:{name}", "grpo") for phase, name in itertools.product(PHASES, SIGNALS)
    ]
    cases = (cases[::4] if lab.quick else cases) + [
        (f"term in {trainer}", "before_backward:4:term", trainer) for trainer in (OTHERS[:1] if lab.quick else OTHERS)
    ]
    for case, fault, trainer in cases:
        home = lab.home(**TRAINERS[trainer])
        running = train(home, fault=fault)
        status = 128 + SIGNALS[fault.rpartition(":")[2]]
        wrong += [f"{case}: {text}" for text in refused(running.wait(), status, "--resume")]
        if running.orphans():
            wrong.append(f"{case}: left processes behind")
        if (home / "run" / "run.db-wal").exists():
            wrong.append(f"{case}: run.db was not closed")
        resumed = train(home).wait()
        if resumes_after(resumed.printed, 2):
            wrong.append(f"{case}: the step before was not saved")
        wrong += [f"{case}: differs in {what}" for what in differences(home / "run", lab.whole(**TRAINERS[trainer]))]
    seconds = _second_signal(lab, wrong)
    return Outcome(wrong, f"{len(cases)} of phase or trainer and signal; a second one ended it in {seconds:.2f} s")


STUBBORN = """
import os, time

def letters(completions, **columns):
    end = time.monotonic() + float(os.environ.get("PACE", "0"))
    while time.monotonic() < end:
        try:
            time.sleep(0.1)
        except BaseException:
            pass
    return [float(sum(letter.isalpha() for letter in text)) for text in completions]
"""


def _second_signal(lab: Lab, wrong: list[str]) -> float:
    """How long a run lives after the second SIGTERM, in a reward that takes half a minute and catches all exceptions."""
    home = lab.home(reward=STUBBORN)
    finished_to_step_4 = train(home, "--stop-after", "4").wait()
    running = train(home, PACE="30")
    running.until("parameters")
    time.sleep(0.5)
    running.send(signal.SIGTERM)
    running.until("again to end at once")
    running.send(signal.SIGTERM)
    sent = time.monotonic()
    ended = running.wait()
    seconds = time.monotonic() - sent
    if ended.status != 143 or seconds > 2 or finished_to_step_4.status:
        wrong.append(f"a second SIGTERM: status {ended.status} after {seconds:.1f} s: {ended.printed[-300:]}")
    wrong += [f"after a second SIGTERM: differs in {what}" for what in differences(finished(home), lab.whole())]
    return seconds


def changed_inputs(lab: Lab) -> Outcome:
    """Another learning rate, group size, model, or data at a resume: refused by name, and done where that is allowed by name."""
    home = lab.home()
    train(home, "--stop-after", "4").wait()
    wrong = []
    changes = {
        "optimiser.learning_rate": "0.02",
        "group_size": "3",
        "model.hidden_size": "16",
        "sampling.temperature": "0.5",
    }
    for name, value in changes.items():
        wrong += refused(train(home, "--set", f"{name}={value}").wait(), 2, f"{name}: was", f"--allow {name}")
    every = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
    wrong += refused(train(home, *every).wait(), 2, *changes)
    (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(12)))
    wrong += refused(train(home).wait(), 2, "task.data", "--allow task.data")
    (home / "reward.py").write_text(REWARD.replace("return [", "return [1 + "))
    allowed = train(home, "--allow", "task.data", "--trust").wait()
    wrong += refused(allowed, 2, "rewards.letters.function")
    ended = train(
        home, "--set", "optimiser.learning_rate=0.02", "--trust",
        *("--allow", "optimiser.learning_rate", "--allow", "task.data", "--allow", "rewards.letters.function"),
    ).wait()  # fmt: skip
    noted = events(home / "run", "changed") if ended.status == 0 else []
    if len(noted) != 3:
        wrong.append(f"what is allowed was not done, or not noted: {noted} {ended.printed[-300:]}")
    wrong += refused(train(home, "--allow", "group_size").wait(), 2, "--allow group_size")
    return Outcome(wrong, f"{len(changes) + 2} changes refused by name, 3 done where allowed")


def undeletable(lab: Lab) -> Outcome:
    """An old checkpoint that can't be deleted: a warning, and the run goes on to the same bits."""
    home = lab.home(checkpoint={"every": 2, "keep_last": 1})
    running = train(home, limits=["permissions"], PACE="0.1")
    running.until("grpo 3/")
    (home / "run" / "checkpoints" / "step_000002").chmod(0o555)
    ended = running.wait()
    wrong = refused(ended, 0, "can't be deleted")
    if not wrong:
        wrong += differences(home / "run", lab.whole(checkpoint={"every": 2, "keep_last": 1}))
        wrong += [] if events(home / "run", "not_deleted") else ["no event says so"]
    return Outcome(wrong, "warned, recorded, finished")
