"""How `answer` reads worked solutions: `python benchmarks/prose.py SOLUTIONS.jsonl [--shuffles 5]`.

The file has rows with a column `answer`: a solution whose last line is `#### number`, as GSM8K has them. That line is taken away, and
what is left is judged against its own number, and against other rows' numbers in some shuffles. Notes of a calculator, `<<3+15=18>>`,
are kept, and in a second round taken away.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

from coterie.rewards.maths.answers import Answer


def solutions(path: Path, *, notes: bool) -> list[tuple[str, str]]:
    """Each solution without its last line, and its number."""
    found = []
    for line in path.read_text("utf-8").splitlines():
        text, _, number = json.loads(line)["answer"].rpartition("####")
        found.append((text.strip() if notes else re.sub(r"<<.*?>>", "", text).strip(), number.strip()))
    return found


def accepted(reward: Answer, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    return [score == 1.0 for score in reward([text for text, _ in pairs], answer=[gold for _, gold in pairs])]


def value(number: str) -> float:
    return float(number.replace(",", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--shuffles", type=int, default=5)
    parser.add_argument("--show", type=int, default=0, help="how many of the refused are printed")
    given = parser.parse_args()
    reward = Answer()
    for notes in (True, False):
        rows = solutions(given.file, notes=notes)
        refused = [row for row, right in zip(rows, accepted(reward, rows), strict=True) if not right]
        crossed = []
        for seed in range(given.shuffles):
            others = random.Random(seed).sample(rows, len(rows))
            crossed += [
                (text, other)
                for (text, gold), (_, other) in zip(rows, others, strict=True)
                if value(gold) != value(other)
            ]
        wrong = sum(accepted(reward, crossed))
        print(
            f"notes {'kept' if notes else 'removed'}: refused {len(refused)} of {len(rows)}; accepted {wrong} of {len(crossed)} others"
        )
        for text, gold in refused[: given.show]:
            print(f"  {gold}: {text.splitlines()[-1]}")
    reward.close()


if __name__ == "__main__":
    main()
