"""Whole steps on a real pretrained model against TRL's: SmolLM2-135M-Instruct, 8 prompts with 8 completions each.

`python benchmarks/versus_trl.py --real`. Both trainers have the same weights, prompts, reward, learning rate, optimiser and number
of tokens: every completion has its full length, because the token that ends one is set, in the folder that both load, to one that
the model does not write. The reward is a number that the completion's tokens are hashed to, so every group has signal; with
`half`, the completions of half of a step's prompts all get the same, so half of the groups are silent. Which share was silent
is measured on both sides.

Each trainer is a process of its own. They take turns, so that a slow minute of the machine meets both: a step that is not timed
each, then `--rounds` rounds of `--steps` steps. Where several of TRL's settings are given, each is tried first for as many steps
(and a step that is not timed), and the fastest is compared with. What is found is written after every turn, into its part of
benchmarks/results/versus_trl_real.json and the table beside it; parts of other work stay.

`--curves` compares what both learn instead: the arithmetic task with the reward `answer`, completions ending as they will.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from versus_trl import Side, train_ours, train_theirs

RESULT = "versus_trl_real"
PROMPTS, GROUP, NUM_PROMPTS = 8, 8, 512
NEVER_WRITTEN = "<empty_output>"  # a token of SmolLM2's that ends completions in place of its own
RANK = 16
PAGES = {"page_size": 256, "max_batch_tokens": 512, "num_blocks": 264, "max_requests_per_batch": PROMPTS * GROUP}
SETTINGS: dict[str, dict[str, Any]] = {  # of TRL's: rows of a micro-batch, what was documented to be faster
    "4": {"per_device_train_batch_size": 4},
    "8": {"per_device_train_batch_size": 8},
    "16": {"per_device_train_batch_size": 16},
    "64": {"per_device_train_batch_size": 64},
    "8-static-cache": {"per_device_train_batch_size": 8, "cache_implementation": "static"},
    "8-torch-compile": {"per_device_train_batch_size": 8, "torch_compile": True},
    "8-continuous-batching": {
        "per_device_train_batch_size": 8,
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": PAGES,
    },
}
LONG_SYSTEM_MESSAGE = """You are a patient tutor of arithmetic for pupils who have just learned to add and to take away numbers of two digits.
Read each question to its end before you begin. Say first which of the two operations it asks for, and write both numbers down as they
stand, with the tens below the tens and the ones below the ones. When you add, begin with the ones: if they come to ten or more, write
the last digit and carry one to the tens. When you take away, begin with the ones as well: if the upper digit is too small, borrow ten
from its neighbour and remember that the neighbour is one less. If the number that is taken away is the larger one, take the smaller
from the larger and put a minus sign before the result. Then check what you found by the opposite operation: a sum less one of its two
numbers has to give the other, and a difference plus what was taken away has to give what was there before. If the check fails, go
back to the ones and look for the slip; most slips are a carry that was forgotten or was counted twice. Estimate as well: round both
numbers to the nearest ten, and see whether your result is near what the rounded numbers give. Never guess. Do not use a calculator, a
table or a program, and do not leave the answer as a formula. Be friendly and brief, and use words that a child of eight understands. Do
not talk about other subjects, and do not ask questions of your own unless the pupil's question can't be read. If it can't, say
which part you could not read. Give the result as a number in digits, with no unit, as the last thing that you write, on a line of
its own, so that the pupil finds it at once and can copy it into the exercise book."""
WORKLOADS: dict[str, dict[str, Any]] = {
    "32": {"new_tokens": 32, "system": None},
    "128": {"new_tokens": 128, "system": LONG_SYSTEM_MESSAGE},
}
SPEED_UPS = {("32", "all"): 5.0, ("32", "half"): 8.0, ("128", "all"): 6.0}  # what is aimed at in mixed precision


@dataclass(frozen=True)
class Work:
    """What is compared. workload: of WORKLOADS. signal: all, half, or answers, which is no timing. lora: a low-rank adapter on both."""

    precision: str
    workload: str
    signal: str
    lora: bool = False

    @property
    def name(self) -> str:
        return f"{self.precision}{', LoRA' if self.lora else ''}, {self.workload} tokens, {self.signal}"

    @property
    def learning_rate(self) -> float:
        return 1e-4 if self.lora else 1e-5

    @property
    def targets(self) -> dict[str, float]:
        """The least speed-up and the most memory that are aimed at."""
        if self.precision != "mixed":
            return {}
        if self.lora:
            return {"memory_share": 0.45}
        speed_up = SPEED_UPS.get((self.workload, self.signal))
        return {**({"speed_up": speed_up} if speed_up else {}), "memory_share": 0.7}


# Rewards, of the signature that both trainers call


def hashed(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A number in [0, 1) for each completion, which depends on its tokens alone: no two of a group are likely to be equal."""
    return [zlib.crc32(json.dumps(tokens).encode()) / 2**32 for tokens in completion_ids]


def half_hashed(prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """The same, but 0.5 for all completions of half of the prompts of a call."""
    asked = sorted(set(prompts), key=lambda prompt: zlib.crc32(prompt.encode()))
    silent = asked[: len(asked) // 2]
    return [0.5 if prompt in silent else value for prompt, value in zip(prompts, hashed(completion_ids), strict=True)]


def answered(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """coterie's own reward `answer`, for TRL."""
    from coterie.rewards.maths.answers import Answer

    return [float(value) for value in Answer()(completions, answer=answer)]  # type: ignore[arg-type]


REWARDS: dict[str, Callable[..., list[float]]] = {"all": hashed, "half": half_hashed, "answers": answered}


# What both trainers start from


def make_start(folder: Path, source: str, work: Work) -> float:
    """The folder `model`, and `prompts.jsonl`: how many tokens a prompt has on average. For a timing prompts are rendered beforehand,
    and completions never end early."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from coterie.tasks.arithmetic import sums

    target = folder / "model"
    target.mkdir()
    for file in Path(source).iterdir():
        (target / file.name).symlink_to(file.resolve())
    system = WORKLOADS[work.workload]["system"]
    chats = [
        [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": problem.question}]
        for problem in sums()[0][:NUM_PROMPTS]
    ]
    rows: list[dict[str, Any]] = [
        {"prompt": chat, "answer": str(p.answer)} for chat, p in zip(chats, sums()[0], strict=False)
    ]
    tokenizer, config = AutoTokenizer.from_pretrained(source), AutoConfig.from_pretrained(source)
    rendered = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    if work.signal != "answers":
        rows = [{"prompt": text} for text in rendered]
        tokenizer.chat_template = None
        if NEVER_WRITTEN in tokenizer.get_vocab():
            tokenizer.eos_token = NEVER_WRITTEN
        settings = GenerationConfig.from_model_config(config)
        settings.eos_token_id = config.eos_token_id = tokenizer.eos_token_id
        for file in target.iterdir():
            if file.suffix != ".safetensors":
                file.unlink()
        for part in (tokenizer, config, settings):
            part.save_pretrained(target)
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return statistics.mean(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in rendered)


# The two sides


def run_side(name: str, folder: Path, asked: dict[str, Any]) -> None:
    """A worker: one trainer, until it is told to stop."""
    work = Work(**asked["work"])
    if name == "coterie":
        train_ours(folder, our_recipe(folder, work))
        return
    from peft import LoraConfig

    rows = SETTINGS[asked["settings"]]["per_device_train_batch_size"]
    given = {
        "bf16": work.precision == "mixed", "seed": 0, "max_steps": 10_000, "num_generations": GROUP,
        "gradient_accumulation_steps": PROMPTS * GROUP // rows, "learning_rate": work.learning_rate, "adam_beta2": 0.99,
        "max_completion_length": WORKLOADS[work.workload]["new_tokens"],
    }  # fmt: skip
    adapter = LoraConfig(r=RANK, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    others = {"peft_config": adapter} if work.lora else {}
    train_theirs(folder, given | SETTINGS[asked["settings"]], REWARDS[work.signal], **others)


def our_recipe(folder: Path, work: Work) -> dict[str, Any]:
    own = f"{Path(__file__).resolve()}:{REWARDS[work.signal].__name__}"
    return {
        "preset": "grpo",
        "task": {"data": str(folder / "prompts.jsonl"), "heldout": 0},
        "rewards": ["answer" if work.signal == "answers" else own],
        "model": str(folder / "model"),
        "precision": work.precision,
        "loss": {"kl_weight": 0.0},
        "steps": 10_000,  # the process is ended before it saves
        "prompts_per_step": PROMPTS,
        "group_size": GROUP,
        "sampling": {"max_new_tokens": WORKLOADS[work.workload]["new_tokens"]},
        "optimiser": {"learning_rate": work.learning_rate},
        "checkpoint": {"every": 10_000},
        **({"lora": {"rank": RANK, "alpha": 32}} if work.lora else {}),
    }


def start(name: str, folder: Path, work: Work, settings: str) -> Side:
    asked = {"work": asdict(work), "settings": settings}
    return Side(name, folder, json.dumps(asked), program=__file__)


# The comparison


def try_settings(folder: Path, work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """Each of TRL's settings by itself: the median seconds of a step and the peak memory, or why it does not run."""
    found: dict[str, Any] = {}
    for settings in options.settings:
        side = start("trl", folder, work, settings)
        try:
            rows = [side.step() for _ in range(options.warmup + options.steps)]
            found[settings] = of_side([rows], options.warmup)
        except RuntimeError as error:
            found[settings] = f"does not run here: {str(error).strip().splitlines()[-1][:200]}"
        finally:
            side.close()
        print(f"  TRL with {settings}: {found[settings]}", flush=True)
    return found


def compare(folder: Path, work: Work, settings: str, options: argparse.Namespace, keep: Any) -> None:
    """Rounds of both, in turn. A side begins when its first turn comes and is ended after its last one. keep: given what there is
    after every turn."""
    sides: dict[str, Side] = {}
    rounds: dict[str, list[list[dict[str, Any]]]] = {"coterie": [], "trl": []}
    try:
        for number in range(options.rounds):
            for name, of_rounds in rounds.items():
                if name not in sides:
                    sides[name] = start(name, folder, work, settings)
                num_steps = options.steps + (options.warmup if number == 0 else 0)
                of_rounds.append([sides[name].step() for _ in range(num_steps)])
                if number == options.rounds - 1:
                    sides[name].close()
                both = min(map(len, rounds.values()))
                found = {
                    side: of_side(turns[: both or None], options.warmup) for side, turns in rounds.items() if turns
                }
                keep(judged(work, found) if both else found)
    finally:
        for side in sides.values():
            side.close()


def of_side(rounds: list[list[dict[str, Any]]], warmup: int) -> dict[str, Any]:
    """What a side's rounds come to, without the steps before the first timed one."""
    timed = [rounds[0][warmup:], *rounds[1:]]
    every = [row for one in timed for row in one]
    seconds = [row["seconds"] for row in every]
    return {
        "step_seconds": statistics.median(seconds),
        "step_seconds_by_round": [[row["seconds"] for row in one] for one in timed],
        "warm_up_seconds": [row["seconds"] for row in rounds[0][:warmup]],
        "sampling_share": sum(row["sample_seconds"] for row in every) / sum(seconds),
        "tokens_per_completion": statistics.mean(row["tokens"] for row in every) / PROMPTS / GROUP,
        "silent_share": statistics.mean(row["silent_share"] for row in every),
        "process_megabytes": every[-1]["process_megabytes"],
        "peak_megabytes": every[-1]["peak_megabytes"],
    }


def judged(work: Work, sides: dict[str, Any]) -> dict[str, Any]:
    """The ratio of the medians with those of single rounds, and which targets are held."""
    theirs, ours = sides["trl"], sides["coterie"]
    of_rounds = [
        statistics.median(one) / statistics.median(other)
        for one, other in zip(theirs["step_seconds_by_round"], ours["step_seconds_by_round"], strict=True)
    ]
    found = {
        "speed_up": theirs["step_seconds"] / ours["step_seconds"],
        "speed_up_by_round": of_rounds,
        "memory_share": ours["process_megabytes"] / theirs["process_megabytes"],
        "targets": work.targets,
    }
    held = {name: found[name] >= work.targets[name] for name in ("speed_up",) if name in work.targets}
    held |= {name: found[name] <= work.targets[name] for name in ("memory_share",) if name in work.targets}
    return {**found, "held": held, **sides}


def curves(folder: Path, work: Work, settings: str, options: argparse.Namespace, keep: Any) -> None:
    """The rewards of both, one trainer after the other: the mean of every step, and of the first and last five with their intervals."""
    from coterie.evals.statistics import mean_interval

    found: dict[str, Any] = {"learning_rate": work.learning_rate}
    for name in ("coterie", "trl"):
        side, steps = start(name, folder, work, settings), []
        try:
            for _ in range(options.steps):
                steps.append(side.step())
                rewards = [row["rewards"] for row in steps]
                groups = [[of_step[i : i + GROUP] for i in range(0, len(of_step), GROUP)] for of_step in rewards]
                ends = {"first": groups[:5], "last": groups[-5:]}
                found[name] = {"rewards": [statistics.mean(of_step) for of_step in rewards]} | {
                    when: asdict(mean_interval([group for of_step in part for group in of_step], low=0, high=1))
                    for when, part in ends.items()
                }
                keep(found)
                print(f"  {name}, step {len(steps)}: {found[name]['rewards'][-1]:.3f}", flush=True)
        finally:
            side.close()


# What is written


def cell(found: dict[str, Any], what: str, shape: str) -> str:
    """A ratio, with its target and whether that is held, if there is one."""
    if what not in found["targets"]:
        return format(found[what], shape)
    return f"**{found[what]:{shape}}** ({found['targets'][what]:g}: {'held' if found['held'][what] else 'missed'})"


def table(parts: dict[str, Any]) -> list[str]:
    lines = [
        "| work | TRL's micro-batch | silent groups | rounds | TRL: s a step | coterie: s a step | speed-up (target) | by round | sampling | peak MB | memory (target) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for part in parts.values():
        if "speed_up" not in part.get("result", {}):
            continue
        found = part["result"]
        theirs, ours = found["trl"], found["coterie"]
        rounds = ", ".join(f"{one:.1f}" for one in found["speed_up_by_round"])
        lines.append(
            f"| {part['work']} | {part['settings']} | {theirs['silent_share']:.0%} / {ours['silent_share']:.0%} | {len(found['speed_up_by_round'])} "
            f"| {theirs['step_seconds']:.1f} | {ours['step_seconds']:.2f} | {cell(found, 'speed_up', '.1f')} | {rounds} "
            f"| {theirs['sampling_share']:.0%} / {ours['sampling_share']:.0%} "
            f"| {theirs['process_megabytes']:,.0f} / {ours['process_megabytes']:,.0f} | {cell(found, 'memory_share', '.2f')} |"
        )
    return lines


def write(out: Path, part: str, values: dict[str, Any]) -> None:
    """Put a part into the results, beside those of other work."""
    from tables import rounded, stamp, write_json

    file = out / f"{RESULT}.json"
    parts = json.loads(file.read_text())["parts"] if file.exists() else {}
    about = stamp(
        [word for place, word in enumerate(sys.argv) if "--out" not in sys.argv[max(place - 1, 0) : place + 1]]
    )
    about["versions"]["trl"] = version("trl")
    parts[part] = {**about, **rounded(values)}
    write_json(RESULT, {"parts": parts}, out)
    (out / f"{RESULT}.md").write_text("\n".join(table(parts)) + "\n")


def measure(work: Work, options: argparse.Namespace) -> None:
    from coterie.models.gguf import model_home

    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        about = {"work": work.name, "prompt_tokens": make_start(folder, model_home(options.model), work)}
        print(f"{work.name}, prompts of {about['prompt_tokens']:.0f}", flush=True)

        def keep(part: str, **found: Any) -> None:
            write(options.out, part, {**about, **found})

        settings = options.settings[0]
        if options.curves:
            name = f"curves: {work.name}"
            curves(folder, work, settings, options, lambda found: keep(name, settings=settings, curves=found))
            return
        if len(options.settings) > 1:
            tried = try_settings(folder, work, options)
            keep(f"TRL's settings: {work.name}", tried=tried)
            ran = {name: found["step_seconds"] for name, found in tried.items() if isinstance(found, dict)}
            settings = min(ran, key=ran.__getitem__)
        compare(folder, work, settings, options, lambda result: keep(work.name, settings=settings, result=result))


def main() -> None:
    from tables import RESULTS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="this comparison, and not that of toys")
    parser.add_argument(
        "--workloads",
        nargs="+",
        default=list(WORKLOADS),
        choices=list(WORKLOADS),
        metavar="N",
        help="tokens of a completion",
    )
    parser.add_argument("--precision", nargs="+", default=["mixed", "float32"], choices=["mixed", "float32"])
    parser.add_argument(
        "--signal", nargs="+", default=["all", "half"], choices=["all", "half"], help="groups with signal"
    )
    parser.add_argument("--lora", action="store_true", help=f"LoRA of rank {RANK} on every linear layer of both")
    parser.add_argument(
        "--settings",
        nargs="+",
        default=["8", "16"],
        choices=list(SETTINGS),
        help="of TRL: rows of a micro-batch, and more",
    )
    parser.add_argument("--rounds", type=int, default=3, help="0: only try TRL's settings")
    parser.add_argument(
        "--steps", type=int, default=1, help="of each side in a round, and of each of TRL's settings; of --curves"
    )
    parser.add_argument("--warmup", type=int, default=1, help="steps of each side before those that are timed")
    parser.add_argument("--curves", action="store_true", help="what both learn in --steps steps of arithmetic")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the result files")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, folder, asked = options.worker
        run_side(name, Path(folder), json.loads(asked))
        return
    signals = ["answers"] if options.curves else options.signal
    for precision, workload, signal in itertools.product(options.precision, options.workloads, signals):
        measure(Work(precision, workload, signal, options.lora), options)
    if (options.out / f"{RESULT}.md").exists():
        print((options.out / f"{RESULT}.md").read_text())


if __name__ == "__main__":
    main()
