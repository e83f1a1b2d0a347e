"""What leaving the value model out saves: GRPO and PPO updates on the same samples, at two model sizes.

`python benchmarks/grpo_vs_ppo.py` runs each side in a process of its own, in turn, and writes
benchmarks/results/grpo_vs_ppo.json: bytes of parameters, gradients and optimiser state that are trained, the process's peak
memory above what it is after the imports, and the median time of an update. GRPO's side here has no reference: its objective
needs none; PPO's KL is left out too, so that both do nothing but learn.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from tables import stamp, write_json
from transformers import AutoConfig, AutoModelForCausalLM

from coterie.fast.serve import Policy
from coterie.models.heads import Scorer
from coterie.recipe import make_recipe
from coterie.rollouts.pack import Row, make_stream
from coterie.training.loss_weights import first_loss_weights
from coterie.training.policy_update import optimise
from coterie.training.ppo import advantages_and_returns, fit_values, values_of, whitened
from coterie.training.step import make_optimiser
from coterie.types import BatchTotals

SIZES = {
    "0.8 M": {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 8,
              "num_key_value_heads": 8, "head_dim": 16, "vocab_size": 128},
    "26 M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
             "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 512},
}  # fmt: skip
UPDATES, PROMPTS, GROUP, PROMPT_TOKENS, TOKENS = 5, 8, 8, 12, 28


def batch(vocabulary: int) -> tuple:
    """Samples as a stream: P prompts with G completions each, and rewards that differ."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    groups = [
        (
            tokens(PROMPT_TOKENS),
            [Row(tokens(TOKENS), torch.full((TOKENS,), -4.0), (-1.0) ** g, float(g % 2)) for g in range(GROUP)],
        )
        for _ in range(PROMPTS)
    ]
    rows = PROMPTS * GROUP
    return [make_stream(groups)], BatchTotals(rows, rows * TOKENS, TOKENS)


def measure(method: str, size: str) -> dict:
    """One side at one size: an update is everything after the samples are scored."""
    shape = SIZES[size]
    torch.manual_seed(0)
    streams, totals = batch(shape["vocab_size"])
    recipe = make_recipe(
        {
            "preset": "ppo" if method == "ppo" else "dr_grpo",
            "model": "none",
            "task": "equations",
            "rewards": ["none:none"],
            "loss": {"kl_weight": 0},
            **({"optimiser": {"updates_per_batch": 1}} if method == "ppo" else {}),
        }
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    policy = Policy(
        AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", tie_word_embeddings=True, **shape)), "stream"
    )
    optimiser = make_optimiser(policy.model)
    weights = first_loss_weights(recipe)
    trained = [(policy.model, optimiser)]
    if method == "ppo":
        value = Scorer.from_policy(policy)
        value_optimiser = make_optimiser(value.model)
        trained.append((value.model, value_optimiser))
    seconds = []
    for _ in range(UPDATES):
        started = time.perf_counter()
        if method == "ppo":
            old_values = [values_of(value, stream) for stream in streams]
            advantages, returns = advantages_and_returns(streams, old_values, None, recipe)
            optimise(
                policy,
                optimiser,
                streams,
                totals,
                recipe,
                weights,
                sampled_by_policy=True,
                token_advantages=whitened(advantages),
            )
            fit_values(value, value_optimiser, streams, totals, old_values, returns, recipe)
        else:
            optimise(policy, optimiser, streams, totals, recipe, weights, sampled_by_policy=True)
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    state = {"parameters": 0, "gradients": 0, "optimiser": 0}
    for model, of_model in trained:
        for parameter in model.parameters():
            state["parameters"] += parameter.nbytes
            state["gradients"] += parameter.grad.nbytes if parameter.grad is not None else 0
            state["optimiser"] += sum(value.nbytes for value in of_model.state[parameter].values())
    return {
        "megabytes": {name: value / 1e6 for name, value in state.items()},
        "trained_state_megabytes": sum(state.values()) / 1e6,
        "peak_megabytes": (peak - before) / 1024,
        "update_seconds": statistics.median(seconds[2:]),
    }


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(measure(*sys.argv[1:])))
        return
    results: dict[str, dict] = {}
    for size in SIZES:
        repeats: dict[str, list[dict]] = {"grpo": [], "ppo": []}
        for _ in range(3):
            for method, of_method in repeats.items():  # in turn, so that a slow minute is everyone's
                done = subprocess.run(
                    [sys.executable, __file__, method, size], check=True, capture_output=True, text=True
                )
                of_method.append(json.loads(done.stdout.splitlines()[-1]))
        results[size] = {method: middle(of_method) for method, of_method in repeats.items()}
        results[size]["grpo / ppo"] = {
            name: round(results[size]["grpo"][name] / results[size]["ppo"][name], 3)
            for name in ("trained_state_megabytes", "peak_megabytes", "update_seconds")
        }
        print(size, json.dumps(results[size], indent=1), flush=True)
    write_json("grpo_vs_ppo", {**stamp(sys.argv), "sizes": results})


def middle(runs: list[dict]) -> dict:
    """Medians over the repeats; bytes are the same in each."""
    return {
        **runs[0],
        "peak_megabytes": statistics.median(run["peak_megabytes"] for run in runs),
        "update_seconds": statistics.median(run["update_seconds"] for run in runs),
    }


if __name__ == "__main__":
    main()
