"""How much memory training takes, by method: SmolLM2-135M, 8 prompts with 8 completions of exactly 64 tokens, signal in every group.

`python benchmarks/memory.py` runs each method in a process of its own: two updates on random completions with random rewards; before each of them
the KL with the reference is watched on a group as a run does. It reads the kernel's high-water mark of the process after the model was loaded.
With `--timed` the completions are sampled, and the second step is timed: alone on a machine. Writes benchmarks/results/memory.json and memory.md:
what was measured, and what follows from it by arithmetic for other models. `--only METHOD ...` measures some and keeps what the file says of the others.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import PeakMemory, Place, noise_keys, random_prompts
from tables import RESULTS, rounded, stamp, table, write_json

import coterie
from coterie.fast.serve import Policy, make_engine
from coterie.models.load import load_model
from coterie.models.logprobs import logprobs_of
from coterie.recipe.settings import Lora, Optimiser, Reference, Sampling
from coterie.rollouts.pack import Row, make_stream
from coterie.training.reference import make_reference
from coterie.training.step import make_optimiser

PROMPTS, GROUP, PROMPT_TOKENS, TOKENS, STEPS = 8, 8, 40, 64, 2
WHOLE, SMALL = 16384, 1024  # tokens of a micro-batch: all of a step's, and a group or two
METHODS: dict[str, dict[str, Any]] = {
    "all weights, float32": {"mixed": False, "base": None},
    "all weights, mixed": {"mixed": True, "base": None},
    "LoRA, float32": {"mixed": False, "base": "float32"},
    "LoRA, mixed": {"mixed": True, "base": "float32"},
    "LoRA, base int8, mixed": {"mixed": True, "base": "int8"},
    "LoRA, base int4, mixed": {"mixed": True, "base": "int4"},
}
WAYS = {  # activation checkpointing, tokens of a micro-batch
    "as it is": (False, WHOLE),
    "recomputed": (True, WHOLE),
    "recomputed, small micro-batches": (True, SMALL),
}


def measure(
    model: str, mixed: bool, base: str | None, again: bool, micro_batch_tokens: int, timed: bool
) -> dict[str, float]:
    """Peak memory of the process in megabytes, and the seconds of the last step."""
    device = torch.device("cpu")
    before = _resident()
    loading = PeakMemory(Place())
    policy = Policy.of(load_model(model, device, base or "float32"))
    policy = policy.in_mixed_precision() if mixed else policy
    policy = policy.with_adapter(Lora(base=base), seed=0) if base is not None else policy
    found = {"imports_megabytes": before, "loading_megabytes": before + loading.megabytes()}
    reference = make_reference(policy, Reference())
    engine, optimiser = make_engine(policy), make_optimiser(policy, Optimiser(learning_rate=1e-6))
    settings = {"optimiser": {"micro_batch_tokens": micro_batch_tokens, "activation_checkpointing": again}}
    start = _resident()
    training = PeakMemory(Place())
    for step in range(STEPS):
        began = time.perf_counter()
        prompts = random_prompts([PROMPT_TOKENS] * PROMPTS, policy.vocabulary_size, step)
        generator = torch.Generator().manual_seed(step)
        sampler_logprobs = None
        completions = torch.randint(policy.vocabulary_size, (PROMPTS, GROUP, TOKENS), generator=generator).tolist()
        if timed:
            keys = noise_keys(PROMPTS, GROUP, step)
            groups = engine.generate(prompts, keys, Sampling(max_new_tokens=TOKENS), [])
            completions = [[c.tokens for c in group] for group in groups]
            sampler_logprobs = [[c.logprobs for c in group] for group in groups]
        sampled = time.perf_counter()
        watched = make_stream([(prompts[0], [Row.written(tokens) for tokens in completions[0]])])
        logprobs_of(reference, [watched], temperature=1.0)
        coterie.update(
            policy,
            optimiser,
            prompts=prompts,
            completions=completions,
            sampler_logprobs=sampler_logprobs,
            rewards=torch.rand(PROMPTS, GROUP, generator=generator),
            preset="dr_grpo",
            settings=settings,
        )
        if timed:
            found |= {"sample_seconds": sampled - began, "step_seconds": time.perf_counter() - began}
    return {**found, "start_megabytes": start, "peak_megabytes": start + training.megabytes()}


def _resident() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024 / 1e6


def measure_apart(model: str, method: str, way: str, timed: bool) -> dict[str, float]:
    """The same in a process of its own, whose memory is nobody else's."""
    words = [sys.executable, __file__, "--model", model, "--one", method, way, *(["--timed"] if timed else [])]
    found = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured: dict[str, float] = json.loads(found.splitlines()[-1])
    return measured


# What follows by arithmetic


@dataclass(frozen=True)
class Shape:
    """A model of the Llama family."""

    layers: int
    width: int
    mlp: int
    queries: int  # heads times their width
    keys: int
    vocabulary: int
    tied: bool = True

    @property
    def linear(self) -> int:
        """Weights of the linear layers below the head."""
        return self.layers * (self.width * (2 * self.queries + 2 * self.keys) + 3 * self.width * self.mlp)

    @property
    def embedding(self) -> int:
        """Weights of embedding and head."""
        return self.vocabulary * self.width * (1 if self.tied else 2)

    @property
    def head(self) -> int:
        return self.vocabulary * self.width

    @property
    def kept(self) -> int:
        """Numbers that a layer makes of a token."""
        return 3 * self.width + 2 * self.queries + 2 * self.keys + 3 * self.mlp

    @property
    def adapters(self) -> int:
        """LoRA's numbers of rank 16."""
        sides = 2 * (self.width + self.queries) + 2 * (self.width + self.keys) + 3 * (self.width + self.mlp)
        return 16 * self.layers * sides


SMOLLM2 = Shape(30, 576, 1536, 576, 192, 49152)
SHAPES = {
    "SmolLM2-135M": SMOLLM2,
    "SmolLM2-360M": Shape(32, 960, 2560, 960, 320, 49152),
    "Qwen3-0.6B": Shape(28, 1024, 3072, 2048, 1024, 151936),
    "SmolLM2-1.7B": Shape(24, 2048, 8192, 2048, 2048, 49152),
    "Qwen3-1.7B": Shape(28, 2048, 6144, 2048, 1024, 151936),
    "Qwen3-4B": Shape(36, 2560, 9728, 4096, 1024, 151936),
    "Qwen3-8B": Shape(36, 4096, 12288, 4096, 1024, 151936, tied=False),
    "Qwen3-14B": Shape(40, 5120, 17408, 5120, 1024, 151936, tied=False),
}


def held(shape: Shape, method: str) -> float:
    """Bytes that do not depend on the batch: weights, reference, gradients, averages, copies of 16 bits."""
    mixed, base = METHODS[method]["mixed"], METHODS[method]["base"]
    if base is None:
        return (shape.linear + shape.embedding) * 20 + mixed * (shape.linear + shape.head) * 6
    a_weight = {"float32": 4.0, "int8": 1.0, "int4": 0.625}[base]
    return shape.linear * a_weight + shape.embedding * 4 + shape.adapters * 16 + mixed * shape.head * 4


def held_table() -> list[str]:
    """What is held in float32 whatever the batch, in GB."""
    methods = ["all weights, float32", "LoRA, float32", "LoRA, base int8, mixed", "LoRA, base int4, mixed"]
    rows = []
    for name, shape in SHAPES.items():
        copies = [METHODS[method]["mixed"] * shape.head * 4 for method in methods]
        sizes = [(held(shape, method) - copy) / 1e9 for method, copy in zip(methods, copies, strict=True)]
        rows.append([name, *(f"{size:.1f}" for size in (*sizes, shape.head * 4 / 1e9))])
    return table(["model", "all weights", "LoRA", "`int8`", "`int4`", "mixed, with LoRA: more for the head"], rows)


def activations(shape: Shape, way: str) -> float:
    """Numbers a token: what all layers make, or what goes into each and what one of them makes."""
    again, _ = WAYS[way]
    return shape.layers * shape.width + shape.kept if again else shape.layers * shape.kept


def computed(parts: dict[str, dict], shape: Shape, method: str, way: str) -> float:
    """Megabytes of a step: what is held, and for each number of an activation the bytes that were measured with SmolLM2-135M."""
    of_small = parts[f"{method}; {way}"]["peak_megabytes"] * 1e6 - parts[f"{method}; {way}"]["imports_megabytes"] * 1e6
    rest = of_small - held(SMOLLM2, method)
    program = parts[f"{method}; {way}"]["imports_megabytes"]
    cache = (
        8 * shape.layers * shape.keys * PROMPTS * (PROMPT_TOKENS + GROUP * TOKENS)
    )  # keys and values, while sampling
    return (
        program + (held(shape, method) + max(cache, rest * activations(shape, way) / activations(SMOLLM2, way))) / 1e6
    )


def write_tables(parts: dict[str, dict]) -> None:
    """memory.md: the methods as they were measured, and the largest models by arithmetic."""
    cells = []
    for method in METHODS:
        peaks, seconds = (
            [f"{one[key] / scale:.2f}" if (one := parts.get(f"{method}; {way}{timed}")) else "-" for way in WAYS]
            for key, scale, timed in (("peak_megabytes", 1e3, ""), ("step_seconds", 1, "; timed"))
        )
        cells.append([method, *(x for pair in zip(peaks, seconds, strict=True) for x in pair)])
    lines = table(["SmolLM2-135M, measured", *(f"{way}: {unit}" for way in WAYS for unit in ("GB", "s"))], cells)
    way = "recomputed, small micro-batches"
    methods = [method for method in METHODS if f"{method}; {way}" in parts]
    sizes = [
        [f"{name}, {(shape.linear + shape.embedding) / 1e9:.2f} G", *(f"{computed(parts, shape, method, way) / 1e3:.1f}" for method in methods)]
        for name, shape in SHAPES.items()
    ]  # fmt: skip
    lines += ["", *table([f"GB, computed: {way}", *methods], sizes)]
    (RESULTS / "memory.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--only", nargs="+", help="some methods; what the file says of the others stays", default=METHODS
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--timed", action="store_true", help="sample, and time the second step")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "WAY"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        again, tokens = WAYS[given.one[1]]
        print(
            json.dumps(
                measure(given.model, **METHODS[given.one[0]], again=again, micro_batch_tokens=tokens, timed=given.timed)
            )
        )
        return
    file = RESULTS / "memory.json"
    for method in given.only:
        for way in given.ways:
            found = {**stamp(sys.argv), **rounded(measure_apart(given.model, method, way, given.timed))}
            parts = json.loads(file.read_text())["parts"] if file.is_file() else {}
            name = f"{method}; {way}" + ("; timed" if given.timed else "")
            parts[name] = found
            print(name, {key: value for key, value in found.items() if "_" in key}, flush=True)
            write_json("memory", {"parts": parts})
            write_tables(parts)


if __name__ == "__main__":
    main()
