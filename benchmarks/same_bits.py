"""Did a change of the code change what is computed? Short runs of each method, and every bit that came out of them.

`python benchmarks/same_bits.py before.json` trains with the package as it is and writes a digest of each final tensor, each metric
but times, and each completion. After a change `python benchmarks/same_bits.py after.json --against before.json` does the same and
names what differs. Both have to run on one machine, with one version of torch: bits are not the same everywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file
from tables import stamp

ROOT = Path(__file__).parent.parent
SHORT = ["evaluation.prompts=16"]
COLD = ["cold_start.steps=60", "evaluation.every=4", *SHORT]
CASES = {
    "equations": ("equations", ["steps=40", "cold_start.steps=150", "evaluation.every=20", "evaluation.prompts=64"]),
    "anchored": ("equations_anchored", ["steps=8", *COLD]),
    "programs": ("programs", ["steps=3", "prompts_per_step=8", *COLD]),
    "dialogue": ("dialogue", ["steps=6", *COLD]),  # with the reward model that is made first
    "ppo": ("equations_ppo", ["steps=8", *COLD]),
    "dpo": ("equations_dpo", ["steps=8", *COLD]),
    "reward_model": ("equations_reward_model", ["steps=12", *SHORT]),
    "sft": ("equations_sft", ["steps=20", *SHORT]),
    "lora": ("equations", ["steps=8", "lora={rank: 4, alpha: 8}", *COLD]),
    "dr_grpo": ("equations", ["steps=8", "preset=dr_grpo", *COLD]),
    "dapo": ("equations", ["steps=8", "preset=dapo", *COLD]),
    "gspo": ("equations", ["steps=8", "preset=gspo", *COLD]),
    "rloo": ("equations", ["steps=8", "preset=rloo", *COLD]),
    "reinforce_plus_plus": ("equations", ["steps=8", "preset=reinforce++", *COLD]),
    "mini_batches": ("equations", ["steps=6", "optimiser.updates_per_batch=3", "optimiser.micro_batch_tokens=700", *COLD]),
    "mixed": ("equations", ["steps=6", "precision=mixed", *COLD]),
}  # fmt: skip
REWARD_MODEL = ("dialogue_reward_model", ["steps=8", *SHORT])


def trained(recipe: str, overrides: list[str], home: Path, name: str) -> Path:
    """The folder of a run that was trained in a process of its own, with one thread."""
    command = [sys.executable, "-m", "coterie.cli", "train", recipe, "--out", str(home / name)]
    for override in overrides:
        command += ["--set", override]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return home / name


def digest(run: Path) -> dict[str, str]:
    """What a run left behind: a name for each thing, and sha256 of its bits."""
    found = {}
    for path in sorted(run.rglob("*.safetensors")):
        if "checkpoints" not in path.parts:
            for name, tensor in sorted(load_file(path).items()):
                found[f"tensor {path.relative_to(run)} {name}"] = sha256(
                    tensor.view(torch.uint8).numpy().tobytes()
                ).hexdigest()
    with closing(sqlite3.connect(run / "run.db")) as db:
        rows = db.execute("SELECT stage, name, step, value FROM metrics ORDER BY stage, name, step").fetchall()
        of_name: dict[str, list[str]] = {}
        for stage, name, step, value in rows:
            if not name.startswith(("time/", "memory/")) and not name.endswith(("seconds", "per_second")):
                of_name.setdefault(f"metric {stage} {name}", []).append(f"{step} {value!r}")
        found.update({name: of("\n".join(values)) for name, values in of_name.items()})
        for table, order in (("completions", "stage, step, prompt_number, completion_number"), ("evaluations", "stage, step, mode, name"),
                             ("examples", "stage, step, number"), ("events", "stage, step, kind, message")):  # fmt: skip
            columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})") if row[1] != "time"]
            values = db.execute(f"SELECT {', '.join(sorted(columns))} FROM {table} ORDER BY {order}").fetchall()
            # An event may say how long something took.
            found[f"table {table}"] = of(re.sub(r"\d+\.\d+ s\b", "", repr(values)))
    return found


def of(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def compare(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """A line for each thing that is not the same."""
    lines = []
    for case in before.keys() | after.keys():
        old, new = before.get(case, {}), after.get(case, {})
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                how = "is gone" if name not in new else "is new" if name not in old else "differs"
                lines.append(f"{case}: {name} {how}")
    return sorted(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        if "dialogue" in options.only:
            (home / "runs").mkdir()
            trained(*REWARD_MODEL, home / "runs", "dialogue_reward_model")

        def result(case: str) -> dict[str, str]:
            return digest(trained(*CASES[case], home, case))

        with ThreadPoolExecutor(options.jobs) as pool:
            found = dict(zip(options.only, pool.map(result, options.only), strict=True))
    options.out.write_text(json.dumps({**stamp(sys.argv), "cases": found}, indent=1) + "\n")
    if options.against is None:
        return 0
    before = json.loads(options.against.read_text())["cases"]
    lines = compare({case: before.get(case, {}) for case in options.only}, found)
    print("\n".join(lines) or f"the same bits in {len(found)} runs, {sum(map(len, found.values()))} things")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
