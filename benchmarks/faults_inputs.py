"""What runs are given: numbers that are not finite, recipes, rows, rewards, memory, networks; and who reads them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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
from faults_ends import OTHERS, Outcome, refused

from coterie.errors import UserError
from coterie.models.codec import Codec
from coterie.models.load import make_byte_tokenizer
from coterie.recipe.settings import DatasetTask
from coterie.runs.checkpoint import Position
from coterie.runs.reader import Reader
from coterie.tasks.dataset import Dataset

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
    store = Reader(run / "run.db")
    try:
        found = store.read(
            "SELECT step, (SELECT COUNT(*) FROM completions c WHERE c.stage = m.stage AND c.step = m.step) AS number "
            "FROM metrics m WHERE stage = 'train' AND name = 'loss/total' ORDER BY step"
        )
    finally:
        store.close()
    wrong += [f"step {row['step']} has {row['number']} completions" for row in found if row["number"] != 8]
    return found[-1]["step"] if found else 0
