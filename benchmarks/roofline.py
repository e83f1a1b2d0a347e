"""How much of the machine the training step and the sampler use: `python benchmarks/roofline.py`.

In one run, in turn: the machine's matrix rate (torch.mm of squares), its memory bandwidth (a matrix-vector product over a matrix much
larger than any cache, which only reads; and a plain copy), a whole training step, and decoding with few and many rows.

A step's useful work is counted on that very computation: what torch's FlopCounterMode finds in matrix products, forward and
backward, with nothing computed twice, plus attention over the pairs of tokens that may see one another (two products forward,
four backward). Softmax, norms, the loss and the optimiser take time and count as no work. The step is `optimise`: log-probabilities,
loss, backward, clipping, AdamW.

Decoding is the time of many new tokens less that of one, so the prefill is not in it. Each step must read the weights of the layers
and the head once, and do their products for every row: the larger of the two times, at the measured rates, is what no decoder could
beat, and "of the bound" is its share of the time taken. Keys and values, which are read too, are not counted.

Legend: S prompt tokens, L completion tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import (
    DTYPES,
    RECIPE,
    SIZES,
    WEIGHTS,
    Place,
    in_turn,
    make_parser,
    make_policy,
    median_seconds,
    noise_keys,
    parse,
    random_prompts,
    spread,
)
from peers import log_softmax_of
from tables import make_pyplot, rounded, save_plot, share_cell, stamp, table, write_json
from torch.utils.flop_counter import FlopCounterMode

from coterie.fast.native import NativeEngine
from coterie.fast.serve import Policy
from coterie.recipe.settings import Sampling
from coterie.rollouts.pack import Row, make_stream, split_by_tokens
from coterie.training.policy_update import optimise
from coterie.training.step import make_optimiser
from coterie.types import BatchTotals, Stream

TARGET = 0.5  # of the matrix rate, for the training step
Measure = Callable[[], dict[str, float]]


def matrix_product(size: int, place: Place) -> Measure:
    one, other, out = (torch.randn(size, size, device=place.device).to(DTYPES[place.dtype]) for _ in range(3))

    def work() -> Any:
        return torch.mm(one, other, out=out)

    work()
    return lambda: {"flop_per_second": 2 * size**3 / median_seconds(work, place)}


def reading(megabytes: int, place: Place) -> Measure:
    """A matrix-vector product: every weight is read once, as in decoding one row."""
    columns = 8192
    matrix = torch.ones(megabytes * 1_000_000 // 4 // columns, columns, device=place.device)
    vector = torch.ones(columns, device=place.device)
    torch.mv(matrix, vector)
    return lambda: {"bytes_per_second": matrix.nbytes / median_seconds(lambda: torch.mv(matrix, vector), place)}


def copying(megabytes: int, place: Place) -> Measure:
    """Bytes read and bytes written, together."""
    source = torch.ones(megabytes * 1_000_000 // 8, device=place.device)
    target = torch.empty_like(source)
    target.copy_(source)
    return lambda: {"bytes_per_second": 2 * source.nbytes / median_seconds(lambda: target.copy_(source), place)}


def linear_flop(work: Callable[[], Any]) -> int:
    """What the linear layers do in `work`, by FlopCounterMode: two for each multiplication and addition."""
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for name, count in counts.items() if str(name) in ("aten.mm", "aten.addmm"))


def attention_flop(policy: Policy, streams: list[Stream]) -> int:
    """Forward and backward over the pairs that may see one another: queries by keys, weights by values, and their gradients."""
    config = policy.model.config
    pairs = sum(
        prompt * (prompt + 1) // 2 + sum(length * prompt + length * (length + 1) // 2 for length in lengths)
        for stream in streams
        for prompt, lengths in stream.segments
    )
    return 3 * 4 * pairs * config.num_attention_heads * config.head_dim * config.num_hidden_layers


def batch(policy: Policy, prompts: int, group: int, prompt_tokens: int, new_tokens: int) -> tuple:
    """Random samples with advantages of both signs: micro-batches as a step cuts them, and their totals."""
    rows = prompts * group
    written = random_prompts([new_tokens] * rows, policy.vocabulary_size, seed=1)
    sampled = [Row(tokens, torch.full((new_tokens,), -1.0), (-1.0) ** number) for number, tokens in enumerate(written)]
    groups = [
        (prompt, sampled[number * group : (number + 1) * group])
        for number, prompt in enumerate(random_prompts([prompt_tokens] * prompts, policy.vocabulary_size))
    ]
    parts = split_by_tokens(groups, RECIPE.optimiser.micro_batch_tokens)
    return [make_stream(part) for part in parts], BatchTotals(rows, rows * new_tokens, new_tokens)


def all_at_once(policy: Policy, streams: list[Stream]) -> None:
    """Forward and backward with nothing computed twice: what a step's work is counted on."""
    for stream in (stream.to(policy.device) for stream in streams):
        log_softmax_of(policy.logits(policy.head_inputs(stream)).float(), stream.targets).mean().backward()


def training_step(policy: Policy, streams: list[Stream], totals: BatchTotals, place: Place) -> Measure:
    optimiser = make_optimiser(policy.model, learning_rate=1e-6)
    step = partial(optimise, policy, optimiser, streams, totals, RECIPE, WEIGHTS, sampled_by_policy=True)
    step()
    return lambda: {"seconds": median_seconds(step, place)}


def decoding(policy: Policy, prompts: int, group: int, prompt_tokens: int, new_tokens: int, place: Place) -> tuple:
    """What measures the seconds of one decode step, and what such a step computes."""
    engine, keys = NativeEngine(policy), noise_keys(prompts, group)
    questions = random_prompts([prompt_tokens] * prompts, policy.vocabulary_size)

    def sample(count: int) -> None:
        engine.generate(questions, keys, Sampling(max_new_tokens=count, max_rows=max(256, prompts * group)), ())

    sample(2)
    products = [module.weight for module in policy.model.modules() if isinstance(module, torch.nn.Linear)]
    flop = 2 * prompts * group * sum(weight.numel() for weight in products)

    def measure() -> dict[str, float]:
        many, one = (median_seconds(lambda count=count: sample(count), place) for count in (new_tokens, 1))
        return {"seconds": (many - one) / (new_tokens - 1)}

    return measure, flop


def weights_read(policy: Policy) -> int:
    """Bytes of what every decode step reads: all weights, but of an embedding that is not the head only a few rows."""
    total = sum(parameter.nbytes for parameter in policy.model.parameters())
    embedding = policy.model.get_input_embeddings().weight
    return total if embedding is policy.model.get_output_embeddings().weight else total - embedding.nbytes


def measure(given: argparse.Namespace, place: Place) -> dict[str, Any]:
    on_gpu = place.device == "cuda"
    squares = (64, 128) if given.quick else (2048, 4096, 8192) if on_gpu else (512, 1024, 2048)
    megabytes = 32 if given.quick else 4096 if on_gpu else 1024
    shape = (2, 2, 8, 8) if given.quick else (8, 8, 64, 64)  # prompts, group, prompt tokens, completion tokens
    policy = make_policy(given.model, place, **({"vocab_size": given.vocabulary} if given.vocabulary else {}))
    streams, totals = batch(policy, *shape)
    flop = {"linear": linear_flop(lambda: all_at_once(policy, streams)), "attention": attention_flop(policy, streams)}
    policy.model.zero_grad()
    decoders = {rows: decoding(policy, *rows, *shape[2:], place) for rows in ((1, 1), (1, shape[1]), shape[:2])}
    rounds = in_turn(
        {
            **{f"mm {size}": matrix_product(size, place) for size in squares},
            "read": reading(megabytes, place),
            "copy": copying(megabytes, place),
            "step": training_step(policy, streams, totals, place),
            **{f"decode {prompts}x{group}": decoders[prompts, group][0] for prompts, group in decoders},
        },
        given.rounds,
    )
    machine = [
        {
            "flop": max(rounds[f"mm {size}"][number]["flop_per_second"] for size in squares),
            "bytes": max(rounds[name][number]["bytes_per_second"] for name in ("read", "copy")),
        }
        for number in range(given.rounds)
    ]
    sizes = {"parameters": policy.model.num_parameters(), "vocabulary": policy.vocabulary_size}
    return {
        "model": {"size": given.model, **sizes},
        "machine": {
            "matrix_flop_per_second": {
                str(s): spread([one["flop_per_second"] for one in rounds[f"mm {s}"]]) for s in squares
            },
            "bytes_per_second": {n: spread([one["bytes_per_second"] for one in rounds[n]]) for n in ("read", "copy")},
        },
        "step": of_step(rounds["step"], flop, shape, len(streams), weights_read(policy), machine),
        "decode": [
            of_decoding(rounds[f"decode {p}x{g}"], decoders[p, g][1], p * g, weights_read(policy), machine)
            for p, g in decoders
        ],
    }


def of_step(rounds: list, flop: dict, shape: tuple, num_passes: int, weights: int, machine: list) -> dict[str, Any]:
    """The training step against the matrix rate of the same round."""
    total = sum(flop.values())
    of_rate = spread([total / one["seconds"] / limits["flop"] for one, limits in zip(rounds, machine, strict=True)])
    return {
        "batch": dict(zip(("prompts", "group", "prompt_tokens", "new_tokens"), shape, strict=True)),
        "flop": flop,
        "flop_per_byte": total / (3 * weights * num_passes),  # forward and both gradients each pass over the weights
        "seconds": spread([one["seconds"] for one in rounds]),
        "flop_per_second": spread([total / one["seconds"] for one in rounds]),
        "of_matrix_rate": of_rate,
        "target_at_least": TARGET,
        "held": of_rate["median"] >= TARGET,
    }


def of_decoding(rounds: list, flop: int, rows: int, weights: int, machine: list) -> dict[str, Any]:
    """A decode step against both limits of the same round."""
    pairs = list(zip(rounds, machine, strict=True))
    return {
        "rows": rows,
        "flop_per_step": flop,
        "bytes_per_step": weights,
        "flop_per_byte": flop / weights,
        "tokens_per_second": spread([rows / one["seconds"] for one in rounds]),
        "flop_per_second": spread([flop / one["seconds"] for one in rounds]),
        "of_matrix_rate": spread([flop / one["seconds"] / limits["flop"] for one, limits in pairs]),
        "of_bandwidth": spread([weights / one["seconds"] / limits["bytes"] for one, limits in pairs]),
        "of_bound": spread(
            [max(flop / limits["flop"], weights / limits["bytes"]) / one["seconds"] for one, limits in pairs]
        ),
    }


def best(found: dict[str, dict]) -> tuple[str, float]:
    """Which has the highest median, and that median."""
    name = max(found, key=lambda name: found[name]["median"])
    return name, found[name]["median"]


def lines_of(result: dict) -> list[str]:
    """The table."""
    size, rate = best(result["machine"]["matrix_flop_per_second"])
    kernel, bandwidth = best(result["machine"]["bytes_per_second"])
    step = result["step"]
    held = "held" if step["held"] else "missed"
    rows = [
        (
            f"machine: torch.mm of {size} square",
            f"{rate / 1e9:,.0f}",
            "1",
            f"machine: {kernel}, {bandwidth / 1e9:,.1f} GB/s",
            "",
        ),
        (
            "training step",
            f"{step['flop_per_second']['median'] / 1e9:,.0f}",
            f"{share_cell(step['of_matrix_rate'])}; target {step['target_at_least']}: {held}",
            "",
            "",
        ),
    ]
    for found in result["decode"]:
        rows.append(
            (
                f"decoding {found['rows']} row{'s' if found['rows'] > 1 else ''}, {found['tokens_per_second']['median']:,.0f} tokens/s",
                f"{found['flop_per_second']['median'] / 1e9:,.1f}",
                *(share_cell(found[name]) for name in ("of_matrix_rate", "of_bandwidth", "of_bound")),
            )
        )
    return table(("work", "GFLOP/s", "of the matrix rate", "of the bandwidth", "of the bound"), rows)


def plot(result: dict, path: Path) -> None:
    """The roof, and how far below it each work lies."""
    _, rate = best(result["machine"]["matrix_flop_per_second"])
    _, bandwidth = best(result["machine"]["bytes_per_second"])
    works = [("training step", result["step"])] + [(f"decode, {one['rows']} rows", one) for one in result["decode"]]
    points = [(name, one["flop_per_byte"], one["flop_per_second"]["median"]) for name, one in works]
    ends = (min(x for _, x, _ in points) / 2, max(*(x for _, x, _ in points), rate / bandwidth) * 2)
    roof = [ends[0], rate / bandwidth, ends[1]]
    figure, axes = make_pyplot().subplots(figsize=(8, 4.5))
    axes.plot(
        roof,
        [min(rate, bandwidth * x) / 1e9 for x in roof],
        color="0.3",
        label=f"roof: {bandwidth / 1e9:.3g} GB/s, torch.mm",
    )
    for (name, x, y), colour in zip(points, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True):
        axes.plot(x, y / 1e9, "o", color=colour, label=name)
        axes.plot([x, x], [y / 1e9, min(rate, bandwidth * x) / 1e9], color=colour, linestyle=":", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="useful FLOP per byte of weights", ylabel="GFLOP/s")
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.3)
    save_plot(figure, path)


def main() -> None:
    parser = make_parser(__doc__, "roofline")
    parser.add_argument("--model", choices=tuple(SIZES), help="26m; on a GPU 0.6b")
    parser.add_argument("--vocabulary", type=int, help="in place of the model's own; 4096 for 26m")
    given, place = parse(parser, "roofline")
    given.model = given.model or ("tiny" if given.quick else "0.6b" if place.device == "cuda" else "26m")
    given.vocabulary = given.vocabulary or (4096 if given.model == "26m" else None)
    head = {**stamp(sys.argv, place.device), "dtype": place.dtype, "rounds": given.rounds}
    result = rounded({**head, **measure(given, place)})
    write_json(given.name, result, given.out)
    text = "\n".join(lines_of(result)) + "\n"
    (given.out / f"{given.name}.md").write_text(text)
    plot(result, given.out / f"{given.name}.svg")
    print(text)


if __name__ == "__main__":
    main()
