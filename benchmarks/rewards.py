"""What rewards cost: `python benchmarks/rewards.py [--only answers ...]`.

programs: model-written programs run in each sandbox that holds on this machine, on two workers, each program a function with five
tests. A sandbox's start, with the hostile programs that it is tried with, is measured apart, and so is the memory that
this process takes for a program that prints a gigabyte.

hostile, cheating: hostile programs in each sandbox, as this user and as one without rights, and how many got through; programs that
cheat, and how many have any points. Both are those of the tests.

answers: answers a second of the built-in reward `answer` on two workers: plain numbers, which never leave this process; formulas,
which go to the workers; and seconds for 64 answers that would take for ever to be worked out. pairs: how often it is wrong on the
labelled pairs of tests/rewards.

failing: a user's function in two workers that breaks on nine of 64 completions, in nine ways.

Each part has figures that are held against a target. The parts that are not run keep what rewards.json holds of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tables import RESULTS, ROOT, rounded, stamp, table, write_json

from coterie.errors import UserError
from coterie.recipe.settings import RewardSpec
from coterie.rewards.code.reward import Code
from coterie.rewards.load import load_rewards
from coterie.rewards.maths.answers import Answer
from coterie.rewards.score import score
from coterie.sandbox.base import Limits, Program, Sandbox
from coterie.sandbox.make import make_sandbox
from coterie.types import Completion, Group, Prompt

TESTS = ROOT / "tests" / "rewards"
sys.path += [str(TESTS / "code"), str(ROOT / "tests" / "sandbox")]

from cheating import ADD, CHEATS, HONEST  # noqa: E402
from hostile import attacked  # noqa: E402

WORKERS = 2
SANDBOXES = ("landlock", "bubblewrap")
SOURCE = '''
from collections import Counter

def most_common(words):
    """The word that is there most often, the first in the alphabet of several."""
    counts = Counter(words)
    return min(counts, key=lambda word: (-counts[word], word))
'''
PRINTS_A_GIGABYTE = "import sys\nblock = 'x' * (1 << 20)\nfor _ in range(1 << 10): sys.stdout.write(block)"


def programs(given: argparse.Namespace) -> dict[str, Any]:
    """Programs a second in each sandbox, round by round in turn."""
    count = 8 if given.quick else 300
    sandboxes, found = {}, {}
    for name in SANDBOXES:
        start = time.perf_counter()
        try:
            sandboxes[name] = make_sandbox(name, num_workers=WORKERS)
        except UserError as error:
            found[name] = {"refused": str(error)}
            continue
        found[name] = {"start_seconds": time.perf_counter() - start, "report": sandboxes[name].report}
    rounds: dict[str, list[float]] = {name: [] for name in sandboxes}
    for _ in range(given.rounds):
        for name, sandbox in sandboxes.items():
            rounds[name].append(count / seconds_of(sandbox, count))
    for name, sandbox in sandboxes.items():
        rate = {"median": statistics.median(rounds[name]), "range": [min(rounds[name]), max(rounds[name])]}
        one = 1000 * statistics.median(seconds_of(sandbox, 1) for _ in range(5 if given.quick else 50))
        found[name] |= {"per_second": rate, "one_alone_milliseconds": one}
        found[name]["growth_megabytes_of_a_gigabyte"] = growth_of_a_gigabyte(sandbox)
        sandbox.close()
    figures = []
    for name, one in found.items():
        rate = one.get("per_second", {"median": 0.0})["median"]  # none where there is no such sandbox
        figures.append(at_least(f"{name}: programs a second", rate, 60))
        if rate:
            growth = one["growth_megabytes_of_a_gigabyte"]
            figures.append(below(f"{name}: MB that the trainer grows by for a gigabyte printed", growth, 100))
    return {
        "workers": WORKERS,
        "programs": count,
        "tests_each": 5,
        "rounds": given.rounds,
        "sandboxes": found,
        "figures": figures,
    }


def at_least(what: str, value: float, target: float) -> dict[str, Any]:
    return {"figure": what, "value": value, "target": f"at least {target:,}", "held": value >= target}


def below(what: str, value: float, target: float) -> dict[str, Any]:
    return {"figure": what, "value": value, "target": f"below {target:,}", "held": value < target}


def exactly(what: str, value: float, target: float) -> dict[str, Any]:
    return {"figure": what, "value": value, "target": f"{target:,}", "held": value == target}


def figures_of(found: dict[str, Any]) -> list[str]:
    rows = [
        (
            one["figure"],
            f"{one['value']:,.0f}" if one["value"] >= 1000 else f"{one['value']:.4g}",
            one["target"],
            "yes" if one["held"] else "no",
        )
        for one in found["figures"]
    ]
    return table(("figure", "measured", "target", "held"), rows)


def seconds_of(sandbox: Sandbox, count: int) -> float:
    inputs = [[["a", "b", "a", str(number)]] for number in range(5)]
    jobs = [Program(SOURCE, inputs, "most_common") for _ in range(count)]
    start = time.perf_counter()
    outcomes = sandbox.run_all(jobs)
    seconds = time.perf_counter() - start
    if any(outcome.failed or any(output.value != "a" for output in outcome.outputs) for outcome in outcomes):
        raise RuntimeError("a program did not give what it has to give")
    return seconds


def growth_of_a_gigabyte(sandbox: Sandbox) -> float:
    """Megabytes by which this process grows at most."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    before = memory("VmRSS")
    (output,) = sandbox.run(Program(PRINTS_A_GIGABYTE, [""], None, Limits(seconds=30))).outputs
    if "wrote more" not in (output.error or ""):
        raise RuntimeError(f"a gigabyte was not cut off: {output.error}")
    return memory("VmHWM") - before


def memory(name: str) -> float:
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) / 1000


def table_of_programs(found: dict[str, Any]) -> list[str]:
    head = (
        "sandbox",
        f"programs a second, {found['workers']} workers",
        "one alone",
        "start and self-test",
        "memory for 1 GB printed",
    )
    rows = [
        (
            name,
            f"{one['per_second']['median']:.0f} ({one['per_second']['range'][0]:.0f} to {one['per_second']['range'][1]:.0f})",
            f"{one['one_alone_milliseconds']:.1f} ms",
            f"{one['start_seconds']:.2f} s",
            f"{one['growth_megabytes_of_a_gigabyte']:.1f} MB",
        )
        for name, one in found["sandboxes"].items()
        if "per_second" in one
    ]
    return table(head, rows)


def measure_answers(given: argparse.Namespace) -> dict[str, Any]:
    """Answers a second, all of them different, the workers being there; round by round in turn."""
    count = 64 if given.quick else 2000
    plain = [f"First {i} of them, so\nthe answer is $\\frac{{{i}}}{{7}}$." for i in range(count)]
    formulas = [rf"\boxed{{(x+{i})(x-1)}}" for i in range(1, count // 10 + 1)]
    towers = [
        text
        for i in range(2, 18)
        for text in (
            rf"\boxed{{{i}^{{9^{{9^9}}}}}}",
            rf"\boxed{{({i}^{{999999}})^{{999999}} + {i}}}",
            rf"\boxed{{{i}0000000!!}}",
            rf"\boxed{{\binom{{10^{{{i}0}}}}{{5 \cdot 10^9}}}}",
        )
    ]
    kinds = {
        "plain": (plain, [f"{i}/7" for i in range(count)], 1.0),
        "formulas": (formulas, [f"x^2+{i - 1}x-{i}" for i in range(1, count // 10 + 1)], 1.0),
        "towers": (towers, ["\\sqrt{2}"] * 64, 0.0),
    }
    rounds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(given.rounds):
        for name, (texts, golds, wanted) in kinds.items():
            rounds[name].append(len(texts) / seconds_of_answers(texts, golds, wanted))
    return {
        "workers": WORKERS,
        "rounds": given.rounds,
        "answers": {name: len(texts) for name, (texts, _, _) in kinds.items()},
        "per_second": {
            name: {"median": statistics.median(rates), "range": [min(rates), max(rates)]}
            for name, rates in rounds.items()
        },
        "figures": [
            at_least("simple answers a second", statistics.median(rounds["plain"]), 2000),
            below("seconds for 64 answers like `9^{9^{9^9}}`", 64 / min(rounds["towers"]), 10),
        ],
    }


def seconds_of_answers(texts: Sequence[str], golds: Sequence[str], wanted: float) -> float:
    """Of a reward that has decided nothing yet."""
    reward = Answer(workers=WORKERS)
    reward([r"\boxed{y+y}"] * 2 + [r"\boxed{y}"], answer=["2y", "3y", "z"])
    start = time.perf_counter()
    scores = reward(texts, answer=golds)
    seconds = time.perf_counter() - start
    reward.close()
    if any(score != wanted for score in scores):
        raise RuntimeError("an answer was not judged as it has to be")
    return seconds


def table_of_answers(found: dict[str, Any]) -> list[str]:
    rows = [
        (name, str(found["answers"][name]), f"{rate['median']:.0f} ({rate['range'][0]:.0f} to {rate['range'][1]:.0f})")
        for name, rate in found["per_second"].items()
    ]
    return table(("answers", "in a batch", f"a second, {found['workers']} workers"), rows)


def measure_pairs(given: argparse.Namespace) -> dict[str, Any]:
    """How often `answer` is wrong on the labelled pairs."""
    pairs = [json.loads(line) for line in (TESTS / "maths" / "answer_pairs.jsonl").read_text("utf-8").splitlines()]
    pairs = pairs[:40] if given.quick else pairs
    reward = Answer(seconds=4.0, workers=WORKERS)
    scores = reward([pair["answer"] for pair in pairs], answer=[pair["gold"] for pair in pairs])
    reward.close()
    wrong = Counter(pair["equal"] for pair, score in zip(pairs, scores, strict=True) if (score == 1.0) != pair["equal"])
    labels = Counter(pair["equal"] for pair in pairs)
    return {
        "equal": labels[True],
        "unequal": labels[False],
        "figures": [
            at_least("labelled pairs", len(pairs), 200),
            exactly(f"accepted of {labels[False]} unequal ones", wrong[False], 0),
            below(f"rejected of {labels[True]} equal ones", wrong[True], 15),
        ],
    }


def hostile(given: argparse.Namespace) -> dict[str, Any]:
    """Hostile programs, each in every sandbox and for both kinds of user."""
    found, figures = {}, []
    for name in SANDBOXES[:1] if given.quick else SANDBOXES:
        for user, as_nobody in {"this user" if os.getuid() else "root": False, "a plain user": True}.items():
            one = found[f"{name}, {user}"] = attacked(name, as_nobody)
            num_programs = one.get("programs", 1)  # none of which is held where it does not run
            num_held = 0 if "refused" in one else num_programs - len(one["through"])
            figures.append(exactly(f"{name}, {user}: hostile programs held", num_held, num_programs))
            if num_held:
                what = f"{name}, {user}: MB that the trainer grows by meanwhile"
                figures.append(below(what, one["growth_megabytes"], 100))
    return {"runs": found, "figures": figures}


def cheating(given: argparse.Namespace) -> dict[str, Any]:
    """Programs that cheat, and honest ones, which get all the points."""
    found = {}
    for name in SANDBOXES[:1] if given.quick else SANDBOXES:
        reward = Code(function="add", seconds=3, wall_seconds=2, sandbox=name, workers=WORKERS)
        scores = [reward(list(some.values()), [ADD] * len(some)) for some in (CHEATS, HONEST)]
        reward.close()
        found[name] = [sum(score != 0.0 for score in scores[0]), sum(score == 1.0 for score in scores[1])]
    figures = []
    for name, (cheats, honest) in found.items():
        figures += [
            exactly(f"{name}: of {len(CHEATS)} programs that cheat, rewarded", cheats, 0),
            exactly(f"{name}: honest programs rewarded", honest, len(HONEST)),
        ]
    return {"figures": figures}


FAILING = """
import os, time
def own(completions):
    (text,) = completions
    if text == "sleep": time.sleep(1000)
    if text == "spin": sum(range(10**12))
    if text == "raise": raise KeyError("lost")
    if text == "die": os._exit(9)
    return {"nan": [float("nan")], "inf": [float("inf")], "text": ["1.0"], "few": [], "many": [1.0, 1.0]}.get(text, [1.0])
"""
WAYS = ("sleep", "spin", "raise", "die", "nan", "inf", "text", "few", "many")


def failing(given: argparse.Namespace) -> dict[str, Any]:
    """One call of a function that breaks on some completions: each is named, and the others have their reward."""
    zeros = torch.zeros(1)
    texts = [WAYS[number // 7] if number % 7 == 3 else "fine" for number in range(64)]
    group = Group(Prompt(0, "p", [1], {}), [Completion([1], zeros, zeros, "stop", text) for text in texts])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "own.py").write_text(FAILING)
        (reward,) = load_rewards([RewardSpec(function=f"{folder}/own.py:own", workers=WORKERS, timeout=1.0)])
        start = time.perf_counter()
        found = score([group], [reward])
        seconds = time.perf_counter() - start
        reward.close()
    named = sum(failure.reason != "" and texts[failure.completion] in WAYS for failure in found.failures)
    return {
        "workers": WORKERS,
        "timeout_seconds": 1.0,
        "seconds": seconds,
        "reasons": {texts[failure.completion]: failure.reason for failure in found.failures},
        "figures": [
            exactly("of 64 completions those that fail, named", named, len(WAYS)),
            exactly("completions beside them, rewarded", int((found.rewards == 1).sum()), 64 - len(WAYS)),
            below("seconds for all, two of which would take for ever, at a limit of 1 s", seconds, 10),
        ],
    }


Part = Callable[[argparse.Namespace], dict[str, Any]]
Lines = Callable[[dict[str, Any]], list[str]]
PARTS: dict[str, tuple[Part, tuple[Lines, ...]]] = {
    "programs": (programs, (table_of_programs,)),
    "answers": (measure_answers, (table_of_answers,)),
    "pairs": (measure_pairs, ()),
    "hostile": (hostile, ()),
    "cheating": (cheating, ()),
    "failing": (failing, ()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS), help="which parts are run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast it is")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the result files")
    given = parser.parse_args()
    path = given.out / "rewards.json"
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    for name in given.only:
        parts[name] = {**stamp(sys.argv), **rounded(PARTS[name][0](given))}
    write_json("rewards", {**stamp(sys.argv), "parts": parts}, given.out)
    lines = []
    for name, part in parts.items():
        for number, make in enumerate((figures_of, *PARTS[name][1])):
            lines += [f"<!-- {name}{', more' * number} -->", *make(part)]
    (given.out / "rewards.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
