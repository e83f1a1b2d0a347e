"""Train a recipe with several seeds, and write what came out of each: `python benchmarks/seeds.py equations 0 1 2 3 4`.

Runs that are there already (runs/seeds/RECIPE-SEED with a summary) are read and not repeated. The result says with what and
on what it was measured.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


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
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    result = {
        "command": f"python benchmarks/seeds.py {recipe} {' '.join(seeds)}",
        "commit": commit.stdout.strip(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "hardware": {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "seeds": rows,
    }  # fmt: skip
    path = ROOT / "benchmarks" / "results" / f"{recipe}_seeds.json"
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
