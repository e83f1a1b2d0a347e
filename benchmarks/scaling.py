"""How the cost of training and sampling grows, beside the way that gives every completion a copy of its prompt.

`python benchmarks/scaling.py` varies one of five quantities at a time: the size of the group, the prompt's and the
completions' length, the vocabulary, the model. Each point is measured in processes of their own, the two sides in turn:

  training  forward and backward over one batch. "stream": each prompt once, logits in chunks. "copies": the plain model on
            [rows, prompt + completion], all logits held, torch.log_softmax. Both must agree on log-probabilities and gradient.
  sampling  as many tokens for each row, no end token. "stream": the native engine. "copies": transformers.generate with its
            dynamic cache.

All completions are equally long, so the copies hold no padding: the difference is what sharing prompts and chunking give, and no
more. Memory is what is held at once above the model's weights and, in training, their gradients.

Two figures have targets: log-probabilities over 151,936 tokens (memory at most 0.2 of what logits that are all held take, time at most 1.3 times
theirs), and what a group of 8 costs more than one of 4 at a prompt of 512 tokens (at most 1.15 times, beside what its
completions cost by themselves).

Legend: P prompts, G completions per prompt, S prompt tokens, L completion tokens, N = P*G*L, V vocabulary, D width.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import (
    RECIPE,
    WEIGHTS,
    Place,
    apart,
    exponent,
    in_turn,
    line,
    make_model,
    make_parser,
    make_policy,
    measured,
    middle,
    noise_keys,
    parse,
    random_prompts,
    ratios,
    spread,
)
from peers import copied_logprobs, copies, generate, log_softmax_of
from tables import make_pyplot, rounded, save_plot, short_number, spread_cell, stamp, table, write_json
from torch import Tensor

from coterie.algorithms.advantages import group_advantages
from coterie.fast.native import NativeEngine
from coterie.fast.serve import Policy
from coterie.models.logprobs import head_statistics, token_logprobs
from coterie.recipe.settings import Sampling
from coterie.rollouts.pack import Row, make_stream, pack
from coterie.training.policy_update import optimise
from coterie.training.step import make_optimiser
from coterie.types import Group, Prompt, Scored, Stream

SIDES = ("stream", "copies")
QUANTITIES = ("seconds", "megabytes")


@dataclass(frozen=True)
class Point:
    """How big the work is. vocabulary: the model's own where it is None."""

    model: str
    prompts: int = 4
    group: int = 8
    prompt_tokens: int = 256
    new_tokens: int = 32
    vocabulary: int | None = None

    def make_policy(self, place: Place) -> Policy:
        return make_policy(self.model, place, **self.changes)

    @property
    def changes(self) -> dict[str, int]:
        return {"vocab_size": self.vocabulary} if self.vocabulary else {}

    def make_prompts(self, policy: Policy) -> list[list[int]]:
        return random_prompts([self.prompt_tokens] * self.prompts, policy.vocabulary_size)

    @property
    def sampling(self) -> Sampling:
        return Sampling(max_new_tokens=self.new_tokens, max_rows=max(256, self.prompts * self.group))


# what is varied: what it is called, its values, and what else is set, so that the largest model takes seconds
AXES: dict[str, tuple[str, tuple, dict[str, int]]] = {
    "group": ("completions per prompt", (1, 2, 4, 8, 16, 32), {}),
    "prompt_tokens": ("prompt tokens", (16, 32, 64, 128, 256, 512, 1024), {}),
    "new_tokens": ("completion tokens", (16, 32, 64, 128, 256, 512), {}),
    "vocabulary": ("vocabulary", (64, 1024, 8192, 32768, 151936), {}),
    "model": ("parameters", ("0.8m", "5m", "26m", "100m"), {"prompts": 2, "group": 4, "prompt_tokens": 128, "vocabulary": 512}),
}  # fmt: skip
QUICK_AXES: dict[str, tuple] = {
    "group": (1, 4),
    "prompt_tokens": (8, 32),
    "new_tokens": (4, 16),
    "vocabulary": (64, 1024),
    "model": ("tiny", "0.8m"),
}


def logprobs_for(side: str, policy: Policy, stream: Stream) -> Callable[[], Tensor]:
    """What computes the log-probabilities of a stream's tokens, [N]: one side's way."""
    if side == "stream":
        return partial(token_logprobs, policy, stream)
    return partial(copied_logprobs, policy.model, *copies(stream))


def train(side: str, point: Point, place: Place) -> dict[str, float]:
    """Forward and backward over one batch, as one micro-batch."""
    policy = point.make_policy(place)
    written = random_prompts([point.new_tokens] * point.prompts * point.group, policy.vocabulary_size, seed=1)
    groups = [
        (prompt, [Row.written(tokens) for tokens in written[number :: point.prompts]])
        for number, prompt in enumerate(point.make_prompts(policy))
    ]
    stream = make_stream(groups).to(policy.device)
    logprobs = logprobs_for(side, policy, stream)
    weights = torch.linspace(-1, 1, len(stream.targets), device=policy.device)
    parameters = list(policy.model.parameters())
    found: list[Tensor] = []

    def work() -> None:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
        found[:] = [logprobs()]
        (weights * found[0]).mean().backward()
        found[0] = found[0].detach()

    work()
    mean, norm = found[0].mean().item(), torch.nn.utils.get_total_norm([p.grad for p in parameters]).item()
    found.clear()
    return {**measured(work, place), "logprob": mean, "gradient": norm}


def sampler_for(side: str, policy: Policy, point: Point) -> Callable[[Sampling], Sequence]:
    """What samples P*G completions without an end token: one side's way."""
    prompts = point.make_prompts(policy)
    if side == "stream":
        engine, keys = NativeEngine(policy), noise_keys(point.prompts, point.group)
        return lambda sampling: engine.generate(prompts, keys, sampling, ())
    return lambda sampling: generate(policy.model, prompts, point.group, sampling)


def sample(side: str, point: Point, place: Place) -> dict[str, float]:
    """As many new tokens for each of P*G rows."""
    policy = point.make_policy(place)
    draw = sampler_for(side, policy, point)
    draw(point.sampling.model_copy(update={"max_new_tokens": 2}))  # loads the code, which is not what is measured
    return measured(lambda: draw(point.sampling), place)


def whole_step(side: str, point: Point, place: Place) -> dict[str, float]:
    """One step of Dr. GRPO: sampling, log-probabilities, loss, backward, clipping the gradient's norm, AdamW."""
    policy = point.make_policy(place)
    prompts = point.make_prompts(policy)
    optimiser = make_optimiser(policy.model, learning_rate=1e-6)
    rewards = (torch.arange(point.group) % 2).float().expand(point.prompts, -1)
    advantages = group_advantages(rewards, scale="none")
    draw = sampler_for(side, policy, point)
    return measured(lambda: STEPS[side](policy, optimiser, prompts, draw(point.sampling), advantages, rewards), place)


def stream_step(
    policy: Policy, optimiser: Any, prompts: list, sampled: Any, advantages: Tensor, rewards: Tensor
) -> None:
    groups = [
        Group(Prompt(number, "", prompt), rows)
        for number, (prompt, rows) in enumerate(zip(prompts, sampled, strict=True))
    ]
    streams, totals = pack(
        Scored(groups, rewards, {}, []),
        advantages,
        max_length=len(sampled[0][0].tokens),
        micro_batch_tokens=RECIPE.optimiser.micro_batch_tokens,
        drop_silent=False,
    )
    optimise(policy, optimiser, streams, totals, RECIPE, WEIGHTS, sampled_by_policy=True)


def copies_step(
    policy: Policy, optimiser: Any, prompts: list, sampled: Any, advantages: Tensor, rewards: Tensor
) -> None:
    group = advantages.shape[1]
    tokens = torch.tensor([prompts[number // group] + row for number, row in enumerate(sampled)], device=policy.device)
    logprobs = copied_logprobs(policy.model, tokens, len(sampled[0]))  # [N]
    ratio = (logprobs - logprobs.detach()).exp()
    per_token = advantages.flatten().repeat_interleave(len(sampled[0])).to(policy.device)
    optimiser.zero_grad()
    (-torch.minimum(ratio * per_token, ratio.clamp(0.8, 1.2) * per_token)).mean().backward()
    torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
    optimiser.step()


STEPS = {"stream": stream_step, "copies": copies_step}
WORKS = {"training": train, "sampling": sample}


def both(work: Callable, point: Point, place: Place, rounds: int) -> dict[str, list[dict]]:
    """Stream and copies in turn, in processes of their own."""
    return in_turn({side: partial(apart, work, side, point, place) for side in SIDES}, rounds)


def grow(axis: str, values: Sequence, base: Point, place: Place, rounds: int) -> dict[str, Any]:
    """One quantity varied: the points of both works, and how both sides grow."""
    base = replace(base, **AXES[axis][2])
    points = [replace(base, **{axis: value}) for value in values]
    xs = [parameters_of(point) for point in points] if axis == "model" else list(values)
    found: dict[str, Any] = {"others": {n: v for n, v in vars(base).items() if n != axis and v is not None}, "x": xs}
    for work, function in WORKS.items():
        rows = []
        for x, point in zip(xs, points, strict=True):
            sides = both(function, point, place, rounds)
            if work == "training":
                _must_agree(sides, place)
            quotients = {name: ratios(sides["copies"], sides["stream"], name) for name in QUANTITIES}
            medians = {side: {name: middle(sides[side], name) for name in QUANTITIES} for side in SIDES}
            rows.append({"x": x, **medians, "copies / stream": quotients})
            print(f"{work}, {AXES[axis][0]} {x}: {rounded(rows[-1])}", flush=True)
        found[work] = {"points": rows, "growth": {side: growth_of(xs, [row[side] for row in rows]) for side in SIDES}}
    return found


def growth_of(xs: Sequence[float], measured: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The exponents of time and memory over the whole range, and time as a line."""
    exponents = {f"{name}_exponent": exponent(xs, [one[name] for one in measured]) for name in QUANTITIES}
    return {**exponents, "seconds_line": line(xs, [one["seconds"] for one in measured])}


def parameters_of(point: Point) -> int:
    return make_model(point.model, Place("meta"), **point.changes).num_parameters()


def _must_agree(sides: dict[str, list[dict]], place: Place) -> None:
    """Two sides that compute different things can't be compared."""
    for name in ("logprob", "gradient"):
        one, other = (sides[side][0][name] for side in SIDES)
        error = abs(one - other) / abs(other)
        if place.dtype == "float32" and error > 1e-4:
            raise RuntimeError(f"stream and copies disagree: {name} {one} and {other}")


def head_logprobs(side: str, shape: tuple[int, int, int], place: Place) -> tuple[Callable[[], Tensor], Tensor, Tensor]:
    """Random hidden states under a head: what gives their log-probabilities; hidden [N, D] and head [V, D], with gradients."""
    vocabulary, width, num_tokens = shape
    policy = make_policy("tiny", place, vocab_size=vocabulary, hidden_size=width, num_hidden_layers=1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=generator).to(policy.device, policy.model.dtype).requires_grad_()
    targets = torch.randint(vocabulary, (num_tokens,), generator=generator).to(policy.device)
    head = policy.model.get_output_embeddings()
    hidden.grad, head.weight.grad = torch.zeros_like(hidden), torch.zeros_like(head.weight)
    if side == "chunks":
        return lambda: head_statistics(policy, hidden, targets).logprobs, hidden, head.weight
    return lambda: log_softmax_of(head(hidden).float(), targets), hidden, head.weight


def over_the_vocabulary(side: str, shape: tuple[int, int, int], place: Place) -> dict[str, float]:
    """Log-probabilities with the gradients of hidden states and head."""
    logprobs, hidden, _ = head_logprobs(side, shape, place)
    weights = torch.linspace(-1, 1, len(hidden), device=hidden.device)

    def work() -> None:
        (weights * logprobs()).mean().backward()

    work()  # loads the code, which is not what is measured
    return measured(work, place)


def largest_errors(shape: tuple[int, int, int], place: Place) -> dict[str, float]:
    """How far chunks are from all logits at once, as a share of the largest value: outputs and both gradients, in float32."""
    found = []
    for side in ("chunks", "all"):
        logprobs, hidden, weight = head_logprobs(side, shape, Place(place.device))
        values = logprobs()
        (torch.linspace(-1, 1, len(values), device=values.device) * values).mean().backward()
        found.append((values.detach(), hidden.grad, weight.grad))
    names = ("logprobs", "hidden_gradient", "head_gradient")
    return {
        name: ((one - other).abs().max() / other.abs().max()).item()
        for name, one, other in zip(names, *found, strict=True)
    }


def large_vocabulary(
    vocabulary: int, widths: Sequence[int], num_tokens: int, place: Place, rounds: int
) -> dict[str, Any]:
    """What not holding [N, V] saves, and what computing the logits a second time costs."""
    targets = {"megabytes": 0.2, "seconds": 1.3, "error": 1e-5}
    of_width = {}
    for width in widths:
        shape = (vocabulary, width, num_tokens)
        sides = in_turn({s: partial(apart, over_the_vocabulary, s, shape, place) for s in ("chunks", "all")}, rounds)
        quotients = {name: ratios(sides["chunks"], sides["all"], name) for name in ("megabytes", "seconds")}
        errors = apart(largest_errors, shape, place)
        of_width[str(width)] = {
            **{side: {name: middle(rows, name) for name in QUANTITIES} for side, rows in sides.items()},
            "chunks / all": quotients,
            "relative_error": errors,
            "held": {
                **{name: quotient["median"] <= targets[name] for name, quotient in quotients.items()},
                "error": max(errors.values()) <= targets["error"],
            },
        }
        print("vocabulary", vocabulary, "width", width, rounded(quotients), flush=True)
    return {"vocabulary": vocabulary, "tokens": num_tokens, "target_at_most": targets, "widths": of_width}


def doubled_group(base: Point, place: Place, rounds: int, short: int = 1) -> dict[str, Any]:
    """What a step costs with 8 completions in place of 4, at the prompt of `base` and at one of a single token."""
    lengths = {"t": base.prompt_tokens, "s": short}
    found: dict[str, Any] = {"others": {n: v for n, v in vars(base).items() if v is not None and n != "group"}}
    for side in SIDES:
        points = {
            f"{letter}{group}": partial(
                apart, whole_step, side, replace(base, prompt_tokens=length, group=group), place
            )
            for letter, length in lengths.items()
            for group in (4, 8)
        }
        rows = in_turn(points, rounds)
        found[side] = of_doubling([{name: rows[name][number]["seconds"] for name in rows} for number in range(rounds)])
        print("doubling the group", side, rounded(found[side]), flush=True)
    target = 1.15
    return {**found, "target_at_most": {"net": target}, "held": {"net": found["stream"]["net"]["median"] <= target}}


def of_doubling(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """From the seconds of each round, with t for the long prompt, s for the short one, 4 and 8 for the group:

    plain: t8 / t4, what the additional completions cost by themselves included.
    net: the same less what doubling the group adds at the short prompt, (t8 - (s8 - s4)) / t4. Were the prompt computed once
    for each completion, doubling the group would double its cost; computed once for the group, 1 is what is left.
    increase: what doubling adds at the long prompt by what it adds at the short one, (t8 - t4) / (s8 - s4).
    """
    return {
        "seconds": {name: middle(rounds, name) for name in rounds[0]},
        "plain": spread([one["t8"] / one["t4"] for one in rounds]),
        "net": spread([(one["t8"] - (one["s8"] - one["s4"])) / one["t4"] for one in rounds]),
        "increase": spread([(one["t8"] - one["t4"]) / (one["s8"] - one["s4"]) for one in rounds]),
    }


def growth_table(axes: dict[str, dict]) -> list[str]:
    """Exponents of time and memory, time as a line, and how the sides compare at both ends of each axis."""
    rows = []
    for axis, found in axes.items():
        for work in WORKS:
            growth, points = found[work]["growth"], found[work]["points"]
            exponents = {name: [f"{growth[side][f'{name}_exponent']:.2f}" for side in SIDES] for name in QUANTITIES}
            lines = [growth[side]["seconds_line"] for side in SIDES]
            ends = {name: [points[end]["copies / stream"][name]["median"] for end in (0, -1)] for name in QUANTITIES}
            rows.append(
                (
                    f"{AXES[axis][0]}, {found['x'][0]:,} to {found['x'][-1]:,}",
                    work,
                    *exponents["seconds"],
                    *(f"{of_side['start'] * 1e3:.3g} + {of_side['slope'] * 1e3:.3g} x" for of_side in lines),
                    *exponents["megabytes"],
                    *(f"{first:.2f} to {last:.2f}" for first, last in ends.values()),
                )
            )
    head = ("varied (x)", "work", "exponent of time, stream", "copies", "time in ms, stream", "copies", "exponent of memory, stream", "copies", "time, copies / stream", "memory, copies / stream")  # fmt: skip
    return table(head, rows)


def targets_table(large: dict, doubled: dict) -> list[str]:
    """The figures that have a target, and whether they held it."""
    rows = []
    for width, found in large["widths"].items():
        name, limits, held = (
            f"vocabulary {large['vocabulary']:,}, width {width}",
            large["target_at_most"],
            found["held"],
        )
        for quantity, what in (("megabytes", "memory"), ("seconds", "time")):
            figure = spread_cell(found["chunks / all"][quantity])
            rows.append((f"{name}: {what}, chunks / all logits", figure, limits[quantity], held[quantity]))
        error = max(found["relative_error"].values())
        rows.append(
            (f"{name}: largest relative error, gradients included", f"{error:.1e}", limits["error"], held["error"])
        )
    others, stream, copies = doubled["others"], doubled["stream"], doubled["copies"]
    name = f"a step with 8 completions / with 4, prompt {others['prompt_tokens']}, completions {others['new_tokens']}"
    limit, held = doubled["target_at_most"]["net"], doubled["held"]["net"]
    rows.append((f"{name}: less what the completions add by themselves", spread_cell(stream["net"]), limit, held))
    rows.append((f"{name}: as it is", spread_cell(stream["plain"]), None, None))
    rows.append((f"{name}: as it is, copies", spread_cell(copies["plain"]), None, None))
    words = {True: "yes", False: "no", None: "-"}
    cells = [(name, figure, f"at most {limit}" if limit else "-", words[held]) for name, figure, limit, held in rows]
    return table(("figure", "median (range)", "target", "held"), cells)


def plot(axes: dict[str, dict], path: Path) -> None:
    """A row for time and memory of each work, a column for each axis."""
    rows = [(work, name) for work in WORKS for name in QUANTITIES]
    size = (3.1 * len(axes) + 0.5, 10)
    figure, grid = make_pyplot().subplots(len(rows), len(axes), figsize=size, squeeze=False, sharex="col", sharey="row")
    for column, (axis, found) in enumerate(axes.items()):
        for row, (work, name) in enumerate(rows):
            panel = grid[row][column]
            for side, colour, marker in (("stream", "tab:blue", "o"), ("copies", "tab:orange", "s")):
                ys = [max(point[side][name], 1e-3) for point in found[work]["points"]]
                slope = found[work]["growth"][side][f"{name}_exponent"]
                panel.plot(
                    found["x"], ys, color=colour, marker=marker, markersize=4, label=f"{side}, exponent {slope:.2f}"
                )
            panel.set(xscale="log", yscale="log")
            panel.set_xticks(found["x"], [short_number(x) for x in found["x"]], fontsize=8)
            panel.minorticks_off()
            panel.legend(fontsize=7, frameon=False)
            panel.grid(alpha=0.3)
        grid[0][column].set_title(AXES[axis][0], fontsize=10)
    for row, (work, name) in enumerate(rows):
        grid[row][0].set_ylabel(f"{work}: {name}")
    save_plot(figure, path)


def main() -> None:
    parser = make_parser(__doc__, "scaling")
    parser.add_argument("--model", help="the size where it is not varied (0.8m; on a GPU 100m)")
    parser.add_argument(
        "--only", nargs="+", choices=(*AXES, "large_vocabulary", "doubled_group"), help="all, unless given"
    )
    given, place = parse(parser, "scaling")
    result = rounded(
        {**stamp(sys.argv, place.device), "dtype": place.dtype, "rounds": given.rounds, **measure(given, place)}
    )
    write_json(given.name, result, given.out)
    tables = []
    if result["axes"]:
        tables.append(growth_table(result["axes"]))
        plot(result["axes"], given.out / f"{given.name}.svg")
    if "large_vocabulary" in result and "doubled_group" in result:
        tables.append(targets_table(result["large_vocabulary"], result["doubled_group"]))
    text = "\n\n".join("\n".join(lines) for lines in tables) + "\n"
    (given.out / f"{given.name}.md").write_text(text)
    print(text)


def measure(given: argparse.Namespace, place: Place) -> dict[str, Any]:
    """All that was asked for."""
    wanted = given.only or (*AXES, "large_vocabulary", "doubled_group")
    on_gpu = place.device == "cuda"
    base = Point(given.model or ("tiny" if given.quick else "100m" if on_gpu else "0.8m"))
    if given.quick:
        base = replace(base, prompts=2, group=2, prompt_tokens=8, new_tokens=4)
    found: dict[str, Any] = {"axes": {}}
    for axis, (_, values, _) in AXES.items():
        if axis in wanted:
            values = (
                QUICK_AXES[axis] if given.quick else values + (("0.6b", "1.7b") if axis == "model" and on_gpu else ())
            )
            found["axes"][axis] = grow(axis, values, base, place, given.rounds)
    if "large_vocabulary" in wanted:
        widths, tokens = ((16,), 512) if given.quick else ((64, 128, 256), 1536)
        found["large_vocabulary"] = large_vocabulary(151936, widths, tokens, place, given.rounds)
    if "doubled_group" in wanted:
        point = base if given.quick else replace(base, prompt_tokens=512, new_tokens=16)
        found["doubled_group"] = doubled_group(point, place, given.rounds)
    return found


if __name__ == "__main__":
    main()
