"""What coterie promises when things break: twenty-one experiments that break real runs, each with what must hold.

`make faults`, or `python benchmarks/faults.py`, prints `held` or `failed` with the figure for each and writes
benchmarks/results/faults.json and faults.md. `--quick` repeats less; the tests run that. `--only kills` runs one.
Linux only. Some need root: a file system of their own, permissions that hold for root too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broken_runs import (
    RECIPE,
    REWARD,
    ROOT,
    TRAINERS,
    Command,
    Lab,
    all_finite,
    copied,
    differences,
    events,
    finished,
    metric,
    query,
    rows,
    steps_of,
    train,
    write_recipe,
)
from tables import RESULTS, stamp, write_json

from coterie.errors import UserError
from coterie.models.codec import Codec
from coterie.models.load import make_byte_tokenizer
from coterie.runs.store import Store
from coterie.settings import DatasetTask
from coterie.tasks.dataset import Dataset
from coterie.training.checkpoint import Position, find_checkpoint

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
            ended = train(home).wait()
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


OBJECTIVES = """
import resource
import torch

calls = 0

def _loss(terms):
    global calls
    calls += 1
    return -terms.advantages * terms.ratio("token")

def nan(terms):
    return _loss(terms) * (float("nan") if calls == 3 else 1.0)

def infinite(terms):
    return _loss(terms) * (float("inf") if calls == 3 else 1.0)

def gradient(terms):
    loss = _loss(terms)
    if calls == 3:
        terms.policy_logprobs.register_hook(lambda g: torch.where(torch.arange(len(g)) == 0, float("inf"), g))
    return loss

def always(terms):
    return _loss(terms) * float("nan")

def no_memory(terms):
    if _loss(terms) is not None and calls == 3:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    return _loss(terms)

def limited(terms):
    loss = _loss(terms)
    if calls == 3:
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (64 << 20), resource.RLIM_INFINITY))
        torch.ones(1 << 28)
    return loss
"""


def not_finite(lab: Lab) -> Outcome:
    """NaN and infinity in the loss, one gradient, logits, and rewards: never in the weights. The step is skipped and
    recorded, its rows are kept, and after `limits.skipped_steps` in a row the run stops."""
    wrong = []
    kinds = (("gradient", None), (None, "before_backward:3:nan"), ("nan", None), ("infinite", None))
    for name, fault in kinds[:2] if lab.quick else kinds:
        loss = {"objective": f"objective.py:{name}", "kl_weight": 0} if name else {"kl_weight": 0}
        home = lab.home(files={"objective.py": OBJECTIVES}, loss=loss, checkpoint={"every": 1, "keep_last": 9})
        ended = train(home, fault=fault).wait()
        wrong += refused(ended, 0, "step 3: the loss or its gradient was not finite")
        wrong += [f"{name or fault}: {text}" for text in _not_skipped(home / "run", 3)]
    home = lab.home(
        files={"objective.py": OBJECTIVES},
        loss={"objective": "objective.py:always", "kl_weight": 0},
        limits={"skipped_steps": 3},
    )
    wrong += refused(train(home).wait(), 1, "3 steps in a row", "learning_rate")
    if steps_of(home / "run") != [1, 2, 3] or not all_finite(home / "run"):
        wrong.append(f"the run that is never finite has the steps {steps_of(home / 'run')}")
    wrong += _broken_logits(lab)
    wrong += _not_finite_elsewhere(lab)
    values = ("nan",) if lab.quick else ("nan", "inf", "-inf")
    for value in values:
        reward = f"def letters(completions, **columns):\n    return [float('{value}')] * len(completions)\n"
        home = lab.home(reward=reward)
        wrong += refused(train(home).wait(), 2, f"returned {value}")
        some = f"if n % 4 else float('{value}') for n, text in enumerate(completions)]"
        home = lab.home(reward=REWARD.replace("for text in completions]", some), max_failed_rewards=1.0)
        survived = train(home).wait().status == 0 and all_finite(home / "run")
        if not survived or set(metric(home / "run", "reward/num_failed").values()) != {2.0}:
            wrong.append(f"a share of rewards of {value} is not survived, or not counted")
    num_kinds = 2 if lab.quick else 4
    return Outcome(
        wrong,
        f"{num_kinds} kinds in loss and gradient, 2 in logits, {len(values)} in rewards; the loss of {len(OTHERS)} other trainers "
        "and of PPO's value model",
    )


def _not_finite_elsewhere(lab: Lab) -> list[str]:
    """The loss of the other trainers NaN in one step; of PPO's value model; and of SFT in all of them, across a resume."""
    wrong = []
    cases = {name: TRAINERS[name] for name in OTHERS}
    cases["ppo"] = {**cases["ppo"], "optimiser": {"learning_rate": 1.0e-2, "updates_per_batch": 1}}
    cases["ppo's value model"] = {**cases["ppo"], "value": {"learning_rate": 1.0e-2, "warmup_steps": 4}}
    for name in ("ppo's value model", "sft") if lab.quick else cases:
        home = lab.home(**{**cases[name], "checkpoint": {"every": 1, "keep_last": 20}})
        wrong += [
            f"{name}: {text}" for text in refused(train(home, fault="before_backward:3:nan").wait(), 0, "not finite")
        ]
        stage, num_rows = "cold_start" if name == "staged" else "train", 8 if "ppo" in name else 2
        file = "value" if "value" in name else "model"
        found = _not_skipped(home / "run", 3, stage=stage, num_rows=num_rows, file=file)
        wrong += [f"{name}: {text}" for text in found]
    return wrong


def _not_skipped(run: Path, step: int, *, stage: str = "train", num_rows: int = 8, file: str = "model") -> list[str]:
    """What is wrong with a run that had to skip this step alone."""
    from safetensors.torch import load_file

    of = "value" if file == "value" else "optimiser"
    skipped = {at for at, share in metric(run, f"{of}/skipped_share", stage).items() if share}
    folders = (run / "checkpoints" / Position(stage, at).name for at in (step - 1, step))
    before, after = (load_file(folder / f"{file}.safetensors") for folder in folders)
    wrong = [] if skipped == {step} else [f"skipped {skipped}"]
    wrong += (
        [] if all(before[name].equal(after[name]) for name in before) else ["the weights moved in the skipped step"]
    )
    wrong += [] if all_finite(run) else ["weights are not finite"]
    wrong += [] if events(run, "step_skipped") else ["there is no event"]
    kept = run / "skipped" / f"{stage}_{step:06d}.jsonl"
    if not kept.is_file() or len(kept.read_text().splitlines()) != num_rows:
        wrong.append("its rows are not kept")
    return wrong


def _broken_logits(lab: Lab) -> list[str]:
    """A model whose logits are not finite: the run must end by saying so."""
    wrong = []
    for value in ("nan", "inf"):
        home = lab.home(steps=8)
        make_model(home / "model", lambda weights, value=value: weights["lm_head.weight"][7].fill_(float(value)))
        write_recipe(home, {"model": "./model", "tokenizer": None})
        ended = train(home).wait()
        if ended.status not in (1, 2) or "finite" not in ended.printed:
            wrong.append(f"logits of {value}: status {ended.status}: {ended.printed[-400:]}")
    return wrong


def make_model(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A model folder with changed weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = make_byte_tokenizer()
    shape = {name: value for name, value in RECIPE["model"].items() if name not in ("type", "tie_word_embeddings")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen3", vocab_size=len(tokenizer), tie_word_embeddings=False, eos_token_id=0, **shape)
    )
    with torch.no_grad():
        change(dict(model.named_parameters()))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def equal_rewards(lab: Lab) -> Outcome:
    """Equal rewards for every completion of every step: all stays finite, and a metric and an event say that there is no
    signal."""
    home = lab.home(reward="def letters(completions, **columns):\n    return [0.95] * len(completions)\n", steps=20)
    wrong = refused(train(home).wait(), 0, "no signal 100%")
    run = home / "run"
    if set(metric(run, "group/no_signal_share").values()) != {1.0} or not all_finite(run):
        wrong.append("a step without signal is not counted, or weights are not finite")
    if len(events(run, "sign/no_signal")) != 1:
        wrong.append(f"not one event says so: {events(run, 'sign/no_signal')}")
    if any(value is None for value in metric(run, "loss/total").values()):
        wrong.append("a loss is not finite")
    return Outcome(wrong, "20 steps, group/no_signal_share 1 in each, one event")


def lengths(lab: Lab) -> Outcome:
    """Completions that are all empty, and all cut at the limit, are learned from; a prompt over the context is refused by row."""
    wrong = []
    for name, bias in (("empty", 1e4), ("cut", -1e4)):
        home = lab.home()
        make_model(home / "model", lambda weights, bias=bias: _bias_end(weights, bias))
        write_recipe(home, {"model": "./model", "tokenizer": None})
        wrong += refused(train(home).wait(), 0)
        texts = [row["text"] for row in query(home / "run", "SELECT text FROM completions")]
        if not all_finite(home / "run") or (name == "empty" and any(texts)):
            wrong.append(f"{name}: not finite, or not empty: {texts[:3]}")
        expected = 0.0 if name == "empty" else 1.0
        if set(metric(home / "run", "completion/truncated_share").values()) != {expected}:
            wrong.append(f"{name}: completion/truncated_share is not {expected}")
    home = lab.home()
    (home / "data.jsonl").write_text(json.dumps({"prompt": "a" * 70}) + "\n" + json.dumps({"prompt": "b"}) + "\n")
    wrong += refused(train(home).wait(), 2, "data.jsonl:1", "70 tokens", "context of 64")
    return Outcome(wrong, "empty, cut, over the context")


def _bias_end(weights: dict[str, Any], bias: float) -> None:
    """Make the end token, number 0, far likelier or unlikelier than all others, whatever came before."""
    for name, weight in weights.items():
        if "layers" in name and ("o_proj" in name or "down_proj" in name):
            weight.zero_()
        if name == "model.embed_tokens.weight":
            weight.fill_(1.0)  # so the last hidden state is all ones
    weights["lm_head.weight"].mul_(0.01)
    weights["lm_head.weight"][0].fill_(bias / 1000)


BAD_RECIPES: dict[str, tuple[dict[str, Any] | str, str]] = {
    "unknown key": ({"stpes": 3}, "did you mean 'steps'"),
    "unknown inner key": ({"sampling": {"max_new_token": 3}}, "did you mean 'max_new_tokens'"),
    "text for a number": ({"steps": "many"}, "steps"),
    "negative": ({"steps": -1}, "steps"),
    "zero": ({"group_size": 0}, "group_size"),
    "a share above one": ({"max_failed_rewards": 1.5}, "max_failed_rewards"),
    "NaN": ({"optimiser": {"learning_rate": float("nan")}}, "optimiser.learning_rate"),
    "infinity": ({"optimiser": {"learning_rate": float("inf")}}, "optimiser.learning_rate"),
    "yes for a number": ({"seed": True}, "seed"),
    "a list for a section": ({"sampling": [1]}, "sampling"),
    "unknown preset": ({"preset": "gropo"}, "did you mean 'grpo'"),
    "unknown objective": ({"loss": {"objective": "clipp"}}, "did you mean 'clip'"),
    "unknown task": ({"task": "equatoins"}, "task"),
    "greedy sampling": ({"sampling": {"temperature": 0}}, "temperature"),
    "a group of one": ({"group_size": 1}, "group_size"),
    "no rewards": ({"rewards": []}, "rewards"),
    "two rewards of a name": ({"rewards": ["reward.py:letters", "reward.py:letters"]}, "same name"),
    "a setting without effect": ({"preset": "dr_grpo", "kl": {"target": 0.1}}, "no effect"),
    "not YAML": ("steps: [1\n", "YAML"),
    "a key twice": ("steps: 1\nsteps: 2\n", "twice"),
}


def bad_recipes(lab: Lab) -> Outcome:
    """Twenty wrong recipes: each refused in one paragraph with status 2 in under 2 s, before torch is imported."""
    script = "import sys; from coterie.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    seconds, wrong = [], []
    names = list(BAD_RECIPES)[::5] if lab.quick else list(BAD_RECIPES)
    for name in names:
        changes, word = BAD_RECIPES[name]
        home = lab.home() if isinstance(changes, str) else lab.home(**changes)
        if isinstance(changes, str):
            (home / "recipe.yaml").write_text(changes)
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", script, "train", "recipe.yaml"],
            cwd=home, env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(home)}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        seconds.append(time.monotonic() - started)
        if done.returncode != 2 or word not in done.stderr or "Traceback" in done.stderr or done.stdout != "False\n":
            wrong.append(f"{name}: status {done.returncode}: {done.stdout}{done.stderr}")
    wrong += [f"{name} took {took:.1f} s" for name, took in zip(names, seconds, strict=True) if took >= 2]
    return Outcome(wrong, f"{len(names)} refused, the slowest in {max(seconds):.2f} s")


BAD_ROWS: dict[str, tuple[bytes, str]] = {
    "not UTF-8": (b'{"prompt": "\xff"}', "UTF-8"),
    "not JSON": (b'{"prompt": "x"', "JSON"),
    "10 MB that are not JSON": (b"x" * 10_000_000, "JSON"),
    "deeply nested": (b"[" * 100_000, "JSON"),
    "a list": (b'["x"]', "list"),
    "a number": (b"3", "int"),
    "without the column": (b'{"promt": "x"}', "did you mean 'promt'"),
    "a number for the prompt": (b'{"prompt": 3}', "int"),
    "null for the prompt": (b'{"prompt": null}', "NoneType"),
    "an empty prompt": (b'{"prompt": " "}', "empty"),
    "no messages": (b'{"prompt": []}', "no messages"),
    "a message without content": (b'{"prompt": [{"role": "user"}]}', "content"),
    "NaN": (b'{"prompt": "x", "good": NaN}', "NaN"),
    "a key twice": (b'{"prompt": "x", "prompt": "y"}', "stands twice"),
    "half of a character": (b'{"prompt": "\\ud800"}', "half of a character"),
    "a duplicate": (b'{"prompt": "number 0: ", "good": "yes", "bad": "no 0"}', "the same as"),
}


def bad_rows(lab: Lab) -> Outcome:
    """Rows of every wrong kind: refused by file and line, or left out and counted where the task is lenient, up to its share."""
    wrong = []
    good = b"".join(json.dumps(row).encode() + b"\n" for row in rows(16))
    codec = Codec.of(make_byte_tokenizer())
    home = lab.home()
    file = home / "data.jsonl"
    for name, (line, word) in BAD_ROWS.items():
        file.write_bytes(good + b"\n   \n" + line + b"\n")
        try:
            Dataset(DatasetTask(data=str(file)), codec)
            wrong.append(f"{name}: was taken")
        except UserError as error:
            if not str(error).startswith(f"{file}:19: ") or word not in str(error) or len(str(error)) > 500:
                wrong.append(f"{name}: {error!s:.300}")
    file.write_bytes(good + b"\n".join(line for line, _ in BAD_ROWS.values()) + b"\n")
    lenient = Dataset(DatasetTask(data=str(file), lenient=True, max_left_out=0.5), codec)
    if len(lenient.train) + len(lenient.heldout) != 16 or lenient.left_out.total() != len(BAD_ROWS):
        wrong.append(f"lenient: {lenient.left_out}")
    try:
        Dataset(DatasetTask(data=str(file), lenient=True), codec)
        wrong.append("lenient: more than the share was left out")
    except UserError as error:
        wrong += [] if "max_left_out" in str(error) else [str(error)]
    size = 100_000 if lab.quick else 10_000_000
    file.write_bytes(good + b'{"prompt": "' + b"x" * size + b'"}\n')
    reason = f"{size} tokens" if lab.quick else "10,000,000 characters"  # more than any prompt may have
    wrong += refused(train(home).wait(), 2, "data.jsonl:17", reason)
    return Outcome(wrong, f"{len(BAD_ROWS)} kinds, strict and lenient, and a prompt of {size / 1e6:g} MB")


BAD_REWARDS = {
    "raises": ("raise ValueError('my mistake')", "my mistake"),
    "exits": ("raise SystemExit(0)", "sys.exit(0)"),
    "hangs": ("time.sleep(600)", "took longer than 1 s"),
    "hangs and catches everything": (
        "\n    while True:\n        try: time.sleep(600)\n        except BaseException: pass", "took longer",
    ),
    "text": ("return ['good'] * len(completions)", "'good'"),
    "too few": ("return [1.0]", "1 values for"),
    "nothing": ("return None", "None"),
    "a dict": ("return {}", "{}"),
}  # fmt: skip


def bad_rewards(lab: Lab) -> Outcome:
    """Rewards that raise, exit, hang or return nonsense: the run ends with status 2 and the first reason, or counts them where
    they are few."""
    wrong = []
    left_out = ("hangs and catches everything", "text", "nothing") if lab.quick else ()
    cases = {name: case for name, case in BAD_REWARDS.items() if name not in left_out}
    for name, (body, word) in cases.items():
        reward = f"import time\ndef letters(completions, **columns):\n    {body}\n"
        home = lab.home(reward=reward, rewards=[{"function": "reward.py:letters", "timeout": 1}])
        ended = train(home).wait()
        if "everything" in name:  # no exception reaches it: the process ends, with every stack
            if ended.status != 1 or "Timeout" not in ended.printed:
                wrong.append(f"{name}: status {ended.status}: {ended.printed[-400:]}")
        else:
            wrong += [f"{name}: {text}" for text in refused(ended, 2, "letters", word)]
    few = "def letters(completions, **columns):\n    return [1 / (len(text) % 7) for text in completions]\n"
    home = lab.home(reward=few, max_failed_rewards=1.0)
    wrong += refused(train(home).wait(), 0)
    failed = sum(value or 0 for value in metric(home / "run", "reward/num_failed").values())
    if not failed or not all(value is None or value > 0 for value in metric(home / "run", "reward/letters").values()):
        wrong.append("failures were not counted, or became zeros")
    return Outcome(wrong, f"{len(cases)} kinds; {failed:.0f} failures counted in a run that goes on")


def workers(lab: Lab) -> Outcome:
    """Reward workers killed and stopped while they work: replaced, and the run goes on, or it ends within 30 s and says why."""
    wrong, figures = [], []
    slow = REWARD.replace("time.sleep(", "time.sleep(0.05 + ")
    for number in (signal.SIGKILL, signal.SIGSTOP):
        spec = {"function": "reward.py:letters", "workers": 2, "timeout": 3}
        home = lab.home(reward=slow, rewards=[spec], max_failed_rewards=1.0, steps=4)
        running = train(home)
        running.until("grpo 1/")
        found = running.orphans()  # while the run goes on these are its workers
        for worker in found:
            os.kill(worker, number)
        hit = time.monotonic()
        ended = running.wait()
        seconds = time.monotonic() - hit
        if len(found) != 2 or ended.status or seconds > 30 or running.orphans():
            wrong.append(
                f"{number.name} of {len(found)}: status {ended.status} after {seconds:.0f} s: {ended.printed[-300:]}"
            )
        figures.append(f"{number.name}: finished after {seconds:.1f} s")
    return Outcome(wrong, ", ".join(figures))


def no_memory(lab: Lab) -> Outcome:
    """Memory that runs out, on a GPU (as its error) and on the CPU (under a real limit): the step and micro-batch
    are named, and what to lower."""
    wrong = []
    for name in ("no_memory", "limited"):
        loss = {"objective": f"objective.py:{name}", "kl_weight": 0}
        ended = train(lab.home(files={"objective.py": OBJECTIVES}, loss=loss)).wait()
        words = (
            "out of memory in step",
            ", micro-batch 1 of 1, ",
            "tokens of 8 rows",
            "micro_batch_tokens",
            "max_cache_megabytes",
            "--resume",
        )
        wrong += [f"{name}: {text}" for text in refused(ended, 1, *words)]
    return Outcome(wrong, "a GPU's error and a real limit on address space")


def one_folder(lab: Lab) -> Outcome:
    """Two runs on one folder: the second is refused by the first's process number. A dead process's lock holds nobody, even
    where a reward has forked a process that lives on."""
    home = lab.home(reward=FORKING)
    running = train(home, PACE="0.3")
    running.until("grpo 1/")
    wrong = refused(Command(home, "train", "--resume", "run").wait(), 2, "in use", str(running.pid))
    wrong += refused(Command(home, "train", "recipe.yaml", "--out", "run").wait(), 2, "in use")
    forked = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    running.send(signal.SIGKILL)
    running.wait()
    wrong += [f"differs in {what}" for what in differences(finished(home), lab.whole())]
    for process in forked:
        os.kill(int(process), signal.SIGKILL)
    return Outcome(wrong + ([] if forked else ["no process lived on"]), "2 refused, 1 resumed")


FORKING = REWARD.replace(
    "    time.sleep",
    """
    if os.environ.get("PACE") and not children:
        children.append(os.fork())
        if children == [0]:
            time.sleep(60)
            os._exit(0)
    time.sleep""",
).replace("def letters", "children = []\n\ndef letters")


def no_network(lab: Lab) -> Outcome:
    """A whole run with no network: the same bits."""
    home = lab.home()
    ended = train(home, limits=["network"], apart=not lab.quick).wait()
    wrong = refused(ended, 0)
    wrong += differences(home / "run", lab.whole()) if ended.status == 0 else []
    return Outcome(wrong, f"{len(steps_of(home / 'run'))} steps")


def readers(lab: Lab) -> Outcome:
    """A second process reads run.db while it is written, and after its writer was killed: whole steps only, always."""
    home = lab.home(steps=40)
    running = train(home)
    while not (home / "run" / "recipe.yaml").is_file() and running.running:
        time.sleep(0.002)
    wrong: list[str] = []
    num_reads, newest = 0, 0
    while running.running and newest < 20:
        newest = max(newest, _read_whole_steps(home / "run", wrong))
        num_reads += 1
    running.send(signal.SIGKILL)
    running.wait()
    last = _read_whole_steps(home / "run", wrong)
    if last < newest:
        wrong.append(f"step {newest} was read, and after the kill the last one is {last}")
    if query(home / "run", "PRAGMA integrity_check")[0][0] != "ok":
        wrong.append("run.db is damaged")
    return Outcome(wrong, f"{num_reads} reads beside the writer, 1 after it was killed")


def _read_whole_steps(run: Path, wrong: list[str]) -> int:
    """Read all steps: the last one. Notes those that are not whole."""
    store = Store(run / "run.db", read_only=True)
    try:
        found = store.read(
            "SELECT step, (SELECT COUNT(*) FROM completions c WHERE c.stage = m.stage AND c.step = m.step) AS number "
            "FROM metrics m WHERE stage = 'train' AND name = 'loss/total' ORDER BY step"
        )
    finally:
        store.close()
    wrong += [f"step {row['step']} has {row['number']} completions" for row in found if row["number"] != 8]
    return found[-1]["step"] if found else 0


EXPERIMENTS: dict[str, Callable[[Lab], Outcome]] = {
    "kills": kills,
    "trainers": trainers,
    "kills inside saves": kills_inside_saves,
    "damaged checkpoints": damaged_checkpoints,
    "all damaged": all_damaged,
    "disk full": disk_full,
    "folder lost": folder_lost,
    "signals": signals,
    "changed inputs": changed_inputs,
    "undeletable": undeletable,
    "not finite": not_finite,
    "equal rewards": equal_rewards,
    "lengths": lengths,
    "bad recipes": bad_recipes,
    "bad rows": bad_rows,
    "bad rewards": bad_rewards,
    "workers": workers,
    "no memory": no_memory,
    "one folder": one_folder,
    "no network": no_network,
    "readers": readers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="repeat less")
    parser.add_argument("--only", choices=EXPERIMENTS, help="run one, and write nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the result files")
    given = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        lab = Lab(Path(scratch), quick=given.quick)
        for name in [given.only] if given.only else EXPERIMENTS:
            started = time.monotonic()
            outcome = EXPERIMENTS[name](lab)
            promise = " ".join((EXPERIMENTS[name].__doc__ or "").split())
            results[name] = {"promise": promise, "held": not outcome.wrong, "figure": outcome.figure,
                             "wrong": outcome.wrong, "seconds": round(time.monotonic() - started, 1)}  # fmt: skip
            print(
                f"{'failed' if outcome.wrong else 'held  '}  {name}: {outcome.figure}",
                *outcome.wrong,
                sep="\n  ",
                flush=True,
            )
    if not given.only:
        write_json("faults", {**stamp(sys.argv), "quick": given.quick, "experiments": results}, given.out)
        write_table(given.out, results)
    sys.exit(any(not found["held"] for found in results.values()))


def write_table(folder: Path, results: dict[str, dict[str, Any]]) -> None:
    lines = ["| experiment | what must hold | | figure |", "|---|---|---|---|"]
    for name, found in results.items():
        lines.append(
            f"| {name} | {found['promise']} | {'held' if found['held'] else '**failed**'} | {found['figure']} |"
        )
    (folder / "faults.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
