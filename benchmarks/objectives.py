"""Every preset on the equations, from one cold start and with one budget: `python benchmarks/objectives.py --seeds 0 1 2`.

Each seed's cold start is trained once and all methods go on from it, with the same number of sampled completions (pairs, for
DPO). Learning rates are those of METHODS below, the same for all objectives of the clipped family. It writes a table and a
plot to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from tables import stamp, write_objectives

import coterie
from coterie.algorithms.kl import k3
from coterie.fast.serve import load_policy, make_engine
from coterie.models.logprobs import logprobs_of
from coterie.recipe import load_recipe
from coterie.rewards.maths.linear import check
from coterie.rollouts.collect import collect
from coterie.runs.store import Store
from coterie.tasks.equations import ONE_STEP_EXERCISES
from coterie.tasks.load import make_task
from coterie.training.watch import streams_of
from coterie.types import Prompt, Scored

ROOT = Path(__file__).parent.parent
RATE = {"learning_rate": 1.0e-4, "warmup_steps": 5, "schedule": "linear"}
METHODS: dict[str, dict] = {
    **{
        preset: {"preset": preset}
        for preset in (
            "grpo", "dr_grpo", "dapo", "gspo", "dcpo", "cispo", "sapo", "gmpo", "gdpo", "reinforce++",
            "reinforce++_baseline", "anchored",
        )
    },
    # a sum over the completion's tokens of unscaled advantages: a gradient many times as long, held by its norm's clip
    "rloo": {"preset": "rloo"},
    # The control: the same objective held to the start instead of a moving average
    "anchored, frozen": {"preset": "anchored", "reference": {"kind": "frozen"}},
    # rewards go up to 9: a value model that may move 0.2 a batch never gets there, and its clip is set out of the way
    "ppo": {"preset": "ppo", "value": {"learning_rate": 5.0e-3, "clip": 10, "warmup_steps": 4, "gae_lambda": 1.0}},
    "dpo": {"preset": "dpo"},
    # with one update a batch the ratio is 1 and no bound acts: what tells these apart needs more
    **{
        f"{preset}, 4 updates": {"preset": preset, "optimiser": {"updates_per_batch": 4}}
        for preset in ("grpo", "gspo", "dcpo", "cispo", "sapo", "gmpo")
    },
}  # fmt: skip


def cold_start(folder: Path, seed: int) -> Path:
    """A model after the equations recipe's cold start: a folder in Hugging Face format."""
    if not (folder / "model").is_dir():
        recipe = yaml.safe_load((ROOT / "recipes" / "equations.yaml").read_text())
        start = recipe["cold_start"]
        values = {
            "preset": "sft",
            "seed": seed,
            "task": "equations",
            "model": recipe["model"],
            "steps": start["steps"],
            "prompts_per_step": start["rows_per_step"],
            "sampling": recipe["sampling"],
            "optimiser": {
                "learning_rate": start["learning_rate"],
                "warmup_steps": start["warmup_steps"],
                "schedule": "cosine",
            },
        }
        train(values, folder)
    return folder / "model"


def train(values: dict, folder: Path) -> dict:
    """Train a recipe in a process of its own, so that its peak memory is its own."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    recipe = folder.parent / f"{folder.name}.yaml"
    recipe.write_text(yaml.safe_dump(values))
    command = [sys.executable, __file__, "--one", str(recipe), "--out", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "measured.json").read_text())


def train_here(recipe: str, out: str) -> None:
    started = time.perf_counter()
    run = coterie.train(recipe, out=out)
    measured = {
        "seconds": time.perf_counter() - started,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    (run.folder / "measured.json").write_text(json.dumps(measured))


def after_training(folder: Path, start: Path) -> dict:
    """How far the trained model is from its start, and whether it still can do what it learned before.

    kl_from_start: nats per token, on its own held-out samples. one_step_accuracy: greedy answers to equations of one step,
    which the cold start showed and reinforcement learning did not.
    """
    done = folder / "after.json"
    if not done.is_file():
        recipe = load_recipe(str(folder / "recipe.yaml"))
        (policy, codec), (first, _) = (
            load_policy(str(model), torch.device("cpu")) for model in (folder / "model", start)
        )
        task = make_task("equations", codec)
        engine = make_engine(policy)
        samples = collect(engine, task.heldout, codec, recipe.sampling, num_completions=2, noise=("after",))
        scored = Scored(samples, torch.zeros(len(samples), 2), {}, [])
        streams = streams_of(scored, 1 << 14)
        nats = torch.cat([k3(before - s.sampler_logprobs) for s, before in zip(streams, logprobs_of(first, streams, temperature=recipe.sampling.temperature), strict=True)])  # fmt: skip
        exercises = ONE_STEP_EXERCISES[::5]
        prompts = [
            Prompt(
                number, content := [{"role": "user", "content": exercise.prompt("en")}], codec.encode_prompt(content)
            )
            for number, exercise in enumerate(exercises)
        ]
        greedy = recipe.sampling.model_copy(update={"temperature": 0.0})
        answers = collect(engine, prompts, codec, greedy, num_completions=1, noise=("one step",))
        right = [check(p.equation, g.completions[0].text).right for p, g in zip(exercises, answers, strict=True)]
        done.write_text(json.dumps({"kl_from_start": nats.mean().item(), "one_step_accuracy": sum(right) / len(right)}))
    return json.loads(done.read_text())


def result_of(folder: Path, recipe: str, start: Path) -> dict:
    """What a finished run came to."""
    summary = json.loads((folder / "summary.json").read_text())
    store = Store(folder / "run.db")
    steps = load_recipe(recipe).steps

    def last(name: str) -> float | None:
        """The mean over the last ten steps."""
        rows = store.read("SELECT value FROM metrics WHERE stage = 'train' AND name = ? AND step > ?", name, steps - 10)
        return sum(row["value"] for row in rows) / len(rows) if rows else None

    curve = store.read("SELECT step, value FROM metrics WHERE stage = 'train' AND name = 'reward/mean' ORDER BY step")
    trained = [
        file for file in sorted(folder.glob(f"checkpoints/step_{steps:06d}/*.safetensors")) if "optim" not in file.name
    ]
    found = {
        "before": summary["before"]["accuracy"],
        "accuracy": summary["after"]["accuracy"],
        "accuracy_interval": summary["after"]["accuracy_interval"],
        "all_steps": summary["after"]["all_steps"],
        "entropy": last("policy/entropy"),
        "kl": last("policy/kl"),
        "step_seconds": last("time/step_seconds"),
        "trained_megabytes": sum(f.stat().st_size for f in trained if f.name != "reference.safetensors") / 1e6,
        **json.loads((folder / "measured.json").read_text()),
        **after_training(folder, start),
        "rewards": [round(row["value"], 4) for row in curve],
    }
    store.close()
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--methods", nargs="+", default=[method for method in METHODS if "updates" not in method])
    arguments.add_argument("--steps", type=int, default=50)
    arguments.add_argument("--name", default="objectives", help="what the result files are called")
    arguments.add_argument("--one", help=argparse.SUPPRESS)
    arguments.add_argument("--out", default="runs/objectives")
    given = arguments.parse_args()
    if given.one:
        train_here(given.one, given.out)
        return
    home = ROOT / given.out
    common = yaml.safe_load((ROOT / "recipes" / "equations.yaml").read_text())
    results: dict[str, list[dict]] = {}
    for seed in given.seeds:
        model = cold_start(home / f"start-{seed}", seed)
        for method in given.methods:
            values = {
                "seed": seed,
                "task": "equations",
                "model": str(model),
                "rewards": common["rewards"],
                "steps": given.steps,
                "prompts_per_step": 128 if method == "dpo" else 16,
                "sampling": common["sampling"],
                "evaluation": {"samples": 4},
                "optimiser": RATE,
                **({} if method == "dpo" else {"group_size": 8}),
                **METHODS[method],
            }
            values["optimiser"] = {**RATE, **values["optimiser"]}
            folder = home / f"{method.replace(', ', '-').replace(' ', '-')}-{seed}"
            if not (folder / "measured.json").is_file():
                train(values, folder)
            result = result_of(folder, str(folder / "recipe.yaml"), model)
            results.setdefault(method, []).append({"seed": seed, **result})
            print(method, seed, {k: v for k, v in result.items() if k != "rewards"}, flush=True)
    write_objectives(given.name, stamp(sys.argv), results, given.steps)


if __name__ == "__main__":
    main()
