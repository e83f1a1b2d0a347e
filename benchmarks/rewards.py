"""What rewards cost: `python benchmarks/rewards.py [--only answers ...]`.

programs: model-written programs run in each sandbox that holds on this machine, on two workers, each program a function with five
tests. A sandbox's start, with the hostile programs that it is tried with, is measured apart, and so is the memory that
this process takes for a program that prints a gigabyte.

answers: answers a second of the built-in reward `answer` on two workers: plain numbers, which never leave this process; formulas,
which go to the workers; and seconds for a batch of 64 answers that would take for ever to be worked out.

The parts that are not run keep what rewards.json holds of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tables import RESULTS, rounded, stamp, table, write_json

from coterie.errors import UserError
from coterie.rewards.answers import Answer
from coterie.rewards.code.sandbox import Limits, Program, Sandbox, make_sandbox

WORKERS = 2
TARGET = 60  # programs a second
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
    for name in ("landlock", "bubblewrap"):
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
        found[name] |= {"per_second": rate, "one_alone_milliseconds": one, "held": rate["median"] >= TARGET}
        found[name]["growth_megabytes_of_a_gigabyte"] = growth_of_a_gigabyte(sandbox)
        sandbox.close()
    return {
        "workers": WORKERS,
        "programs": count,
        "tests_each": 5,
        "rounds": given.rounds,
        "target": TARGET,
        "sandboxes": found,
    }


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
    towers = [rf"\boxed{{{i}^{{9^{{9^9}}}}}}" for i in range(2, 66)]
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


Part = Callable[[argparse.Namespace], dict[str, Any]]
PARTS: dict[str, tuple[Part, Callable[[dict[str, Any]], list[str]]]] = {
    "programs": (programs, table_of_programs),
    "answers": (measure_answers, table_of_answers),
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
    lines = [line for name, part in parts.items() for line in (f"<!-- {name} -->", *PARTS[name][1](part))]
    (given.out / "rewards.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
