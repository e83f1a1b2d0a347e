"""What coterie promises when things break: experiments that break real runs, each with what must hold.

`make faults`, or `python benchmarks/faults.py`, prints `held` or `failed` with the figure for each and writes
benchmarks/results/faults.json and faults.md. `--quick` repeats less; the tests run that. `--only kills` runs one.
Linux only. Some need root: a file system of their own, permissions that hold for root too. The experiments stand in
faults_ends.py, faults_inputs.py and faults_shell.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from broken_runs import Command, Lab, differences, events, finished, train, write_recipe
from faults_ends import (
    Outcome,
    all_damaged,
    changed_inputs,
    damaged_checkpoints,
    disk_full,
    folder_lost,
    kills,
    kills_inside_saves,
    signals,
    trainers,
    undeletable,
)
from faults_inputs import (
    bad_recipes,
    bad_rewards,
    bad_rows,
    equal_rewards,
    lengths,
    make_model,
    no_memory,
    no_network,
    not_finite,
    one_folder,
    readers,
    workers,
)
from faults_shell import (
    blocked_output,
    damaged_kernels,
    forking_reward,
    held_database,
    lost_terminal,
    moved_project,
    older_run,
    suspended_process,
)
from tables import RESULTS, stamp, write_json

__all__ = ["EXPERIMENTS", "Command", "Lab", "differences", "events", "finished", "make_model", "train", "write_recipe"]

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
    "blocked output": blocked_output,
    "lost terminal": lost_terminal,
    "forking reward": forking_reward,
    "damaged kernels": damaged_kernels,
    "held database": held_database,
    "moved project": moved_project,
    "suspended process": suspended_process,
    "older run": older_run,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="repeat less")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=[], help="run some, and write nothing")
    parser.add_argument(
        "--add", action="store_true", help="with --only: put these into the result files, each with its commit"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the result files")
    given = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        lab = Lab(Path(scratch), quick=given.quick)
        for name in given.only or EXPERIMENTS:
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
    if given.add:
        whole = json.loads((given.out / "faults.json").read_text())
        commit = stamp(sys.argv)["commit"]
        added = whole["experiments"] | {name: {**found, "commit": commit} for name, found in results.items()}
        whole["experiments"] = results = {name: added[name] for name in EXPERIMENTS if name in added}
        write_json("faults", whole, given.out)
        write_table(given.out, results)
    elif not given.only:
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
