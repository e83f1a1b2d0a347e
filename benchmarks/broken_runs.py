"""Tiny runs in processes of their own, to be broken on purpose and compared with one that was left alone.

A `Lab` makes folders with a recipe, data and a reward; a `Command` is `coterie ...` under way in one of them. Most are forked
from a process that has done the slow imports already; `apart=True` starts the interpreter anew, as a user does.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import termios
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planned_fault import plan

ROOT = Path(__file__).parent.parent
MARK = "COTERIE_LAB"  # in the environment of everything that a command starts
REWARD = """
import os, time

def letters(completions, **columns):
    time.sleep(float(os.environ.get("PACE", "0")))
    return [float(sum(letter.isalpha() for letter in text)) for text in completions]
"""
MODEL = {"type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": True}  # fmt: skip
RECIPE = {
    "preset": "grpo", "model": MODEL, "tokenizer": "bytes", "task": {"data": "data.jsonl", "heldout": 0.25},
    "rewards": ["reward.py:letters"], "steps": 8, "prompts_per_step": 2, "group_size": 4, "device": "cpu",
    "sampling": {"max_new_tokens": 8}, "optimiser": {"learning_rate": 1.0e-2},
    "evaluation": {"prompts": 4, "samples": 1}, "checkpoint": {"every": 2, "keep_last": 3},
}  # fmt: skip
_PAIRS = {"data": "data.jsonl", "heldout": 0.25, "answer": "good", "chosen": "good", "rejected": "bad"}
_WITHOUT = {"group_size": None, "rewards": None}
TRAINERS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "moving reference": {"reference": {"kind": "moving", "decay": 0.9}, "loss": {"kl_weight": 0.1}},
    "adaptive weights": {
        "kl": {"target": 0.001}, "loss": {"kl_weight": 0.1}, "entropy": {"weight": 0.01, "target": 5.0},
    },
    "lora": {"lora": {"rank": 2}},
    "staged": {
        "task": {"data": "data.jsonl", "heldout": 0.25, "answer": "good"},
        "cold_start": {"steps": 6, "rows_per_step": 2, "warmup_steps": 1},
    },
    "ppo": {"preset": "ppo", "value": {"learning_rate": 1.0e-2}},
    "dpo": {"preset": "dpo", "task": _PAIRS, **_WITHOUT},
    "sft": {"preset": "sft", "task": _PAIRS, **_WITHOUT},
    "reward model": {
        "preset": "reward_model", "task": _PAIRS, "sampling": None, "evaluation": {"prompts": 4}, **_WITHOUT,
    },
    "dynamic sampling": {"dynamic_sampling": {"rounds": 2}},
}  # fmt: skip

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["coterie.cli", "coterie.training.train", "transformers.models.qwen3.modeling_qwen3"])


@dataclass(frozen=True)
class Ended:
    """status: as a shell gives it, 128 + the number of the signal that ended it. printed: both streams."""

    status: int
    printed: str
    seconds: float


class Command:
    """`coterie ARGUMENTS` in a folder.

    fault: as `planned_fault.plan` reads it. limits: names of what to do in the process before it begins, of LIMITS. output: the descriptor that an
    `apart` command prints into, in place of a log.
    """

    def __init__(
        self,
        home: Path,
        *arguments: str,
        fault: str | None = None,
        limits: Sequence[str] = (),
        apart: bool = False,
        output: int | None = None,
        **environment: str,
    ) -> None:
        self._started = time.monotonic()
        self.mark = uuid.uuid4().hex
        self.log = home.parent / f"printed_{self.mark[:8]}.txt"
        environment |= {MARK: self.mark, "XDG_STATE_HOME": str(home / "state")}
        self._forked = None if apart else _fork(home, self.log, arguments, environment, fault, limits)
        self._apart = _start(home, self.log, arguments, environment, fault, limits, output) if apart else None
        process = self._forked or self._apart
        assert process is not None
        assert process.pid is not None
        self.pid: int = process.pid

    def printed(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def until(self, text: str, seconds: float = 60) -> None:
        """Wait until it has printed this. RuntimeError if it ends before, or takes too long."""
        end = time.monotonic() + seconds
        while text not in self.printed():
            if time.monotonic() > end or not self.running:
                raise RuntimeError(f"{text!r} was not printed:\n{self.printed()}")
            time.sleep(0.005)

    @property
    def running(self) -> bool:
        if self._forked is not None:
            return self._forked.exitcode is None
        assert self._apart is not None
        return self._apart.poll() is None

    def send(self, number: int) -> None:
        if self.running:
            os.kill(self.pid, number)

    def wait(self, seconds: float = 120) -> Ended:
        """Until it ends; killed if that takes too long."""
        if self._forked is not None:
            self._forked.join(seconds)
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end:
            time.sleep(0.005)
        if self.running:
            self.send(signal.SIGKILL)
            raise RuntimeError(f"still running after {seconds:g} s:\n{self.printed()}")
        code = self._forked.exitcode if self._forked is not None else self._apart.returncode  # type: ignore[union-attr]
        assert code is not None
        return Ended(code if code >= 0 else 128 - code, self.printed(), time.monotonic() - self._started)

    def orphans(self) -> list[int]:
        """Processes that it started and that live on."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal() and int(folder.name) not in (self.pid, os.getpid()):
                try:
                    environment = (folder / "environ").read_bytes()
                except OSError:
                    continue
                if f"{MARK}={self.mark}".encode() in environment:
                    found.append(int(folder.name))
        return found


def _fork(
    home: Path,
    log: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    fault: str | None,
    limits: Sequence[str],
) -> Any:
    process = _FORKED.Process(
        target=_run_forked, args=(str(home), str(log), list(arguments), dict(environment), fault, list(limits))
    )
    sys.path.insert(0, str(ROOT / "benchmarks"))  # by which the process finds this module too
    try:
        process.start()
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return process


def _start(
    home: Path,
    log: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    fault: str | None,
    limits: Sequence[str],
    output: int | None,
) -> subprocess.Popen[bytes]:
    command = [str(ROOT / "benchmarks" / "planned_fault.py"), fault] if fault else ["-m", "coterie.cli"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("wb") as printed:
        return subprocess.Popen(
            [sys.executable, *command, *arguments],
            cwd=home,
            env={"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": path} | dict(environment),
            stdout=printed if output is None else output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: [LIMITS[name]() for name in limits],
        )


def _run_forked(
    home: str, log: str, arguments: list[str], environment: dict[str, str], fault: str | None, limits: list[str]
) -> None:
    """The command, in a process whose imports are done."""
    import torch

    from coterie.cli import main

    printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(printed, number)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(environment)
    os.chdir(home)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    for name in limits:
        LIMITS[name]()
    if fault:
        plan(fault)
    sys.argv = ["coterie", *arguments]
    main()


_PR_CAPBSET_DROP, _DAC_OVERRIDE, _DAC_READ_SEARCH, _CAPABILITY_3 = 24, 1, 2, 0x20080522


def _without_override() -> None:
    """Let permissions hold for root too: a process without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (_DAC_OVERRIDE, _DAC_READ_SEARCH):
            libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_3, 0)
        data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; low words, then high ones
        if libc.capget(header, data) or _capset(libc, header, data):
            raise OSError(ctypes.get_errno(), "capabilities can't be dropped")


def _capset(libc: ctypes.CDLL, header: Any, data: Any) -> int:
    for place in (0, 1, 2):
        data[place] &= ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH)
    return int(libc.capset(header, data))


def _without_network() -> None:
    """A network of its own, with nothing in it."""
    new_user, new_network = 0x10000000, 0x40000000
    flags = new_network | (new_user if os.geteuid() else 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        raise OSError(ctypes.get_errno(), "no network of its own can be made")


def _without_home() -> None:
    """A user whom the system knows no name of, nor a home."""
    user = os.getuid()
    if ctypes.CDLL(None, use_errno=True).unshare(0x10000000):
        raise OSError(ctypes.get_errno(), "no users of its own can be made")
    Path("/proc/self/uid_map").write_text(f"23456 {user} 1")
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        os.environ.pop(name, None)


def _with_terminal() -> None:
    """In a session of its own, whose terminal is what it prints to."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.setsid()
    fcntl.ioctl(1, termios.TIOCSCTTY, 0)


def _ignoring_hangups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


LIMITS = {
    "permissions": _without_override, "network": _without_network, "terminal": _with_terminal, "nohup": _ignoring_hangups,
    "home": _without_home,
}  # fmt: skip


class Lab:
    """A folder in which runs are made and broken. quick: fewer repeats."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self._whole: dict[str, Path] = {}
        self._number = 0

    def home(self, /, *, reward: str = REWARD, files: Mapping[str, str] | None = None, **changes: Any) -> Path:
        """A new folder with recipe.yaml, data.jsonl and reward.py. A setting of None is left out."""
        self._number += 1
        home = self.folder / f"home_{self._number}"
        home.mkdir(parents=True)
        write_recipe(home, changes)
        (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(16)))
        for name, text in {"reward.py": reward, **(files or {})}.items():
            (home / name).write_text(text)
        return home

    def whole(self, /, **changes: Any) -> Path:
        """The run folder of an uninterrupted run of such a recipe."""
        key = json.dumps(changes, sort_keys=True)
        if key not in self._whole:
            home = self.home(**changes)
            ended = train(home).wait()
            if ended.status:
                raise RuntimeError(f"the run that is left alone fails:\n{ended.printed}")
            self._whole[key] = home / "run"
        return self._whole[key]


def rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"number {n}: ", "good": "yes", "bad": f"no {n}"} for n in range(count)]


def write_recipe(home: Path, changes: Mapping[str, Any]) -> None:
    values = {name: value for name, value in {**RECIPE, **changes}.items() if value is not None}
    (home / "recipe.yaml").write_text(json.dumps(values))  # YAML, too


def train(home: Path, *more: str, **options: Any) -> Command:
    """Begin the run of a home, or go on with it where there is one."""
    begun = (home / "run" / "recipe.yaml").is_file()
    return Command(
        home, "train", *(["--resume", "run"] if begun else ["recipe.yaml", "--out", "run"]), *more, **options
    )


def finished(home: Path, **options: Any) -> Path:
    """Go on to the end, and say where the run is."""
    ended = train(home, **options).wait()
    if ended.status:
        raise RuntimeError(f"the run can't be finished:\n{ended.printed}")
    return home / "run"


def digests(run: Path) -> dict[str, str]:
    """sha256 of every tensor of the final model."""
    from safetensors.torch import load_file

    tensors = load_file(run / "model" / "model.safetensors")
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def recorded(run: Path) -> dict[str, list[Any]]:
    """Everything in run.db that does not depend on the clock."""
    queries = {
        "metrics": "SELECT * FROM metrics WHERE name NOT LIKE 'time/%' ORDER BY stage, step, name",
        "completions": "SELECT * FROM completions ORDER BY stage, step, prompt_number, completion_number",
        "evaluations": "SELECT * FROM evaluations ORDER BY stage, step, mode, name",
        "examples": "SELECT * FROM examples ORDER BY stage, step, number",
    }
    with closing(sqlite3.connect(run / "run.db")) as db:
        return {name: db.execute(query).fetchall() for name, query in queries.items()}


def differences(run: Path, other: Path) -> list[str]:
    """In what two finished runs differ: their tensors, and each table of run.db. Empty where they are the same bits."""
    found = [] if digests(run) == digests(other) else ["the final model"]
    one, two = recorded(run), recorded(other)
    return found + [name for name in one if one[name] != two[name]]


def steps_of(run: Path, stage: str = "train") -> list[int]:
    """The steps that run.db holds metrics of."""
    return [row["step"] for row in query(run, "SELECT DISTINCT step FROM metrics WHERE stage = ? ORDER BY step", stage)]


def query(run: Path, text: str, *values: Any) -> list[sqlite3.Row]:
    with closing(sqlite3.connect(run / "run.db")) as db:
        db.row_factory = sqlite3.Row
        return db.execute(text, values).fetchall()


def metric(run: Path, name: str, stage: str = "train") -> dict[int, float | None]:
    """A metric's value by step."""
    found = query(run, "SELECT step, value FROM metrics WHERE stage = ? AND name = ?", stage, name)
    return {row["step"]: row["value"] for row in found}


def events(run: Path, kind: str) -> list[str]:
    return [row["message"] for row in query(run, "SELECT message FROM events WHERE kind = ? ORDER BY time", kind)]


def all_finite(run: Path) -> bool:
    """Whether every weight of the final model, or of the newest checkpoint, is a finite number."""
    from safetensors.torch import load_file

    model = run / "model" / "model.safetensors"
    file = model if model.is_file() else sorted((run / "checkpoints").glob("step_*/model.safetensors"))[-1]
    return all(bool(tensor.isfinite().all()) for tensor in load_file(file).values())


def copied(home: Path, name: str) -> Path:
    """A copy of a home, beside it. Its run goes on with its own data and rewards."""
    return Path(shutil.copytree(home, home.with_name(f"{home.name}_{name}")))
