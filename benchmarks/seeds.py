"""Train a recipe with several seeds, and write what came out of each: `python benchmarks/seeds.py equations 0 1 2 3 4`.

Runs that are there already (runs/seeds/RECIPE-SEED with a summary) are read and not repeated. The result says with what and
on what it was measured.
"""

import json
import subprocess
import sys
from pathlib import Path

from tables import stamp, write_json


def main(recipe: str, seeds: list[str]) -> None:
    rows = []
    for seed in seeds:
        folder = Path("runs") / "seeds" / f"{recipe}-{seed}"
        if not (folder / "summary.json").is_file():
            command = [
                sys.executable,
                "-m",
                "coterie.cli",
                "train",
                recipe,
                "--set",
                f"seed={seed}",
                "--out",
                str(folder),
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((folder / "summary.json").read_text())
        row = {"seed": int(seed), "seconds": round(summary["seconds"])}
        for when in ("before", "after"):
            for name in ("accuracy", "all_steps", "greedy_accuracy"):
                row[f"{when}.{name}"] = round(summary[when][name], 4)
        rows.append(row)
        print(row, flush=True)
    write_json(f"{recipe}_seeds", {**stamp(sys.argv), "seeds": rows})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
