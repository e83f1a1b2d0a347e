"""Train a recipe with several seeds, and write what came out of each: `python benchmarks/seeds.py equations 0 1 2 3 4`.

Runs that are there already (runs/seeds/NAME-SEED with a summary) are read and not repeated. The result says with what and on what
it was measured. Another setting has a name of its own: `--name arithmetic_float32 --set precision=float32`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tables import stamp, write_json

FIGURES = ("accuracy", "all_steps", "greedy_accuracy", "tokens")  # those that the recipe's task has


def row_of(seed: int, summary: dict) -> dict:
    """What is kept of a run: its time, and figures before and after, of which the accuracy has its 95 % interval."""
    row: dict = {"seed": seed, "seconds": round(summary["seconds"])}
    for when in ("before", "after"):
        found = summary[when]
        row |= {f"{when}.{name}": round(found[name], 4) for name in FIGURES if name in found}
        row[f"{when}.accuracy_interval"] = [round(bound, 4) for bound in found["accuracy_interval"]]
    return row


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("recipe")
    arguments.add_argument("seeds", type=int, nargs="+")
    arguments.add_argument("--set", action="append", default=[], help="a setting of the recipe: KEY=VALUE")
    arguments.add_argument("--name", help="of the result; default: the recipe's")
    given = arguments.parse_args()
    name = given.name or given.recipe
    rows = []
    for seed in given.seeds:
        folder = Path("runs") / "seeds" / f"{name}-{seed}"
        if not (folder / "summary.json").is_file():
            settings = [word for setting in [*given.set, f"seed={seed}"] for word in ("--set", setting)]
            command = [sys.executable, "-m", "coterie.cli", "train", given.recipe, *settings, "--out", str(folder)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows.append(row_of(seed, json.loads((folder / "summary.json").read_text())))
        print(rows[-1], flush=True)
    write_json(f"{name}_seeds", {**stamp(sys.argv), "seeds": rows})


if __name__ == "__main__":
    main()
