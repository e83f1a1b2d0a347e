"""The native engine beside transformers' generation, on the same tokens: `python benchmarks/generation.py`.

64 rows, as 8 prompts with 8 completions each and as 64 prompts with one; prompts of 12 tokens, of 212, and of lengths between.

  native      coterie.fast.native. Gives each token's log-probability and the entropy too, which the others do not.
  dynamic     transformers.generate on each prompt repeated for its group, padded on the left where lengths differ.
  static      the same with its static cache (compiled by transformers on a GPU). The faster of these two in a case, by its median, is
              the one that the target is about, and is named.
  continuous  transformers' continuous batching, with prefixes shared.

Two kinds of work, and how it is the same for all. "fixed": sampled at temperature 1, no end token, so every row has as many tokens.
"ragged": end tokens, chosen so that rows have about half of the tokens on average; decoded greedily, so that all sides write the very same
tokens and stop at the very same places. Before either is timed, each side decodes the case greedily, which warms it up, and its
tokens are compared with the native engine's. The model has random weights, the same in every process.

Legend: P prompts, G completions per prompt, B = P*G rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from measure import (
    SIZES,
    PeakMemory,
    Place,
    apart,
    in_turn,
    make_parser,
    make_policy,
    median_seconds,
    middle,
    noise_keys,
    parse,
    random_prompts,
    ratios,
)
from peers import CONTINUOUS_BATCHING, ContinuousBatching, generate
from tables import make_pyplot, rounded, save_plot, spread_cell, stamp, table, write_json

from coterie.fast.native import NativeEngine
from coterie.fast.serve import Policy
from coterie.recipe.settings import Sampling

TARGET = 1.5  # times the faster of transformers.generate's caches, at 64 rows
SIDES = ("native", "dynamic", "static", "continuous")
# untied and larger than usual, so that greedy decoding writes many different tokens and not one of them for ever
WEIGHTS = {"tie_word_embeddings": False, "initializer_range": 0.1}

Tokens = list[list[int]]


@dataclass(frozen=True)
class Case:
    """One piece of work. end_tokens: none for "fixed"."""

    model: str
    prompt_lengths: tuple[int, ...]
    group: int
    new_tokens: int
    end_tokens: tuple[int, ...] = ()

    def make_policy(self, place: Place) -> Policy:
        return make_policy(self.model, place, **WEIGHTS)

    def make_prompts(self, policy: Policy) -> Tokens:
        return random_prompts(self.prompt_lengths, policy.vocabulary_size)

    def sampling(self, greedy: bool) -> Sampling:
        return Sampling(
            max_new_tokens=self.new_tokens, temperature=0.0 if greedy else 1.0, max_rows=max(256, self.num_rows)
        )

    @property
    def num_rows(self) -> int:
        return len(self.prompt_lengths) * self.group


@contextmanager
def native(policy: Policy, case: Case, greedy: bool) -> Iterator[Callable[[], Tokens]]:
    engine, prompts = NativeEngine(policy), case.make_prompts(policy)
    keys = noise_keys(len(prompts), case.group)

    def write() -> Tokens:
        groups = engine.generate(prompts, keys, case.sampling(greedy), case.end_tokens)
        return [completion.tokens for group in groups for completion in group]

    yield write


@contextmanager
def cached(policy: Policy, case: Case, greedy: bool, *, cache: str) -> Iterator[Callable[[], Tokens]]:
    prompts = case.make_prompts(policy)
    yield partial(generate, policy.model, prompts, case.group, case.sampling(greedy), case.end_tokens, cache)


@contextmanager
def continuous(policy: Policy, case: Case, greedy: bool) -> Iterator[Callable[[], Tokens]]:
    prompts = case.make_prompts(policy)
    batching = ContinuousBatching(
        policy.model, case.num_rows, max(case.prompt_lengths), case.sampling(greedy), case.end_tokens
    )
    with batching.running() as manager:
        yield partial(manager.generate, prompts, case.group)


WRITERS = {
    "native": native,
    "dynamic": partial(cached, cache="dynamic"),
    "static": partial(cached, cache="static"),
    "continuous": continuous,
}


def greedy_tokens(side: str, case: Case, place: Place) -> Tokens:
    with WRITERS[side](case.make_policy(place), case, True) as write:
        return write()


def time_side(side: str, case: Case, place: Place) -> dict[str, Any]:
    """One side's tokens, greedy; then its time, and its peak memory above the model's weights.

    {"error": why} where this is somebody else's code and does not run here.
    """
    try:
        tokens = greedy_tokens(side, case, place)
        policy = case.make_policy(place)  # another one, so that no cache of the first is left to be used again
        memory = PeakMemory(place)
        with WRITERS[side](policy, case, bool(case.end_tokens)) as write:
            write()
            place.synchronise()
            megabytes = memory.megabytes()
            return {"seconds": median_seconds(write, place), "megabytes": megabytes, "tokens": tokens}
    except Exception as error:
        if side in ("native", "dynamic"):
            raise
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"}


def ends_for_half(tokens: Tokens, at_most: int = 8) -> tuple[int, ...]:
    """End tokens that leave about half of these completions' tokens, one by one as long as one comes nearer."""
    whole = sum(len(row) for row in tokens)

    def left(ends: Sequence[int]) -> int:
        return sum(next((n + 1 for n, token in enumerate(row) if token in ends), len(row)) for row in tokens)

    def miss(ends: Sequence[int]) -> float:
        return abs(left(ends) - whole / 2)

    chosen: tuple[int, ...] = ()
    candidates = sorted({token for row in tokens for token in row})
    while len(chosen) < at_most:
        better = min(((*chosen, token) for token in candidates), key=miss)
        if miss(better) >= miss(chosen):
            break
        chosen = better
    return chosen


def equal_share(tokens: Tokens, other: Tokens) -> float:
    """The share of places that hold the same token in both, of all places that either has."""
    same = sum(a == b for one, two in zip(tokens, other, strict=True) for a, b in zip(one, two, strict=False))
    return same / sum(max(len(one), len(two)) for one, two in zip(tokens, other, strict=True))


def compare(case: Case, place: Place, rounds: int, sides: Sequence[str]) -> dict[str, Any]:
    """All sides on one case, in turn, and the native engine against the faster of transformers' caches."""
    found = in_turn({side: partial(apart, time_side, side, case, place) for side in sides}, rounds)
    failed = {side: rows[0]["error"] for side, rows in found.items() if "error" in rows[0]}
    tokens = {side: rows[0].pop("tokens") for side, rows in found.items() if side not in failed}
    num_tokens = sum(map(len, tokens["native"])) if case.end_tokens else case.num_rows * case.new_tokens
    result: dict[str, Any] = {"tokens": num_tokens, "end_tokens": len(case.end_tokens)}
    for side, rows in found.items():
        if side in failed:
            result[side] = {"does_not_run": failed[side]}
            continue
        medians = {name: middle(rows, name) for name in ("seconds", "megabytes")}
        same = equal_share(tokens["native"], tokens[side])
        result[side] = {**medians, "tokens_per_second": num_tokens / medians["seconds"], "same_tokens": same}
        if side != "native":
            quotients = {name: ratios(rows, found["native"], name) for name in ("seconds", "megabytes")}
            result[f"{side} / native"] = quotients
    caches = [side for side in ("dynamic", "static") if side in sides and side not in failed]
    fastest = min(caches, key=lambda side: result[side]["seconds"])
    return {
        **result,
        "faster_cache": fastest,
        "held": result[f"{fastest} / native"]["seconds"]["median"] >= TARGET,
    }


def lengths_of(prompts: int, shortest: int, longest: int) -> tuple[int, ...]:
    """As many lengths, evenly from one to the other."""
    return tuple(shortest + round((longest - shortest) * n / max(1, prompts - 1)) for n in range(prompts))


def cases_of(given: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Case]]:
    """What is compared, and how it is called. End tokens are still to be chosen."""
    short, long, new = (5, 9, 8) if given.quick else (12, 212, 64)
    ranges = ((short, long),) if given.quick else ((short, short), (long, long), (short, long))
    for prompts, group in ((2, 2), (4, 1)) if given.quick else ((8, 8), (64, 1)):
        for shortest, longest in ranges:
            for kind in ("fixed", "ragged"):
                name = {"prompts": prompts, "group": group, "prompt_tokens": [shortest, longest], "kind": kind}
                yield name, Case(given.model, lengths_of(prompts, shortest, longest), group, new)


def measure(given: argparse.Namespace, place: Place) -> dict[str, Any]:
    found = []
    for name, case in cases_of(given):
        if name["kind"] == "ragged":
            case = replace(case, end_tokens=ends_for_half(apart(greedy_tokens, "native", case, place)))
        found.append({**name, **compare(case, place, given.rounds, given.sides)})
        print(case_name(found[-1]), rounded({k: v for k, v in found[-1].items() if "/" in k}), flush=True)
    return {
        "model": {"size": given.model, **WEIGHTS},
        "new_tokens": case.new_tokens,
        "continuous_batching": CONTINUOUS_BATCHING if place.device == "cpu" else "its own sizes",
        "target_at_least": TARGET,
        "held": all(one["held"] for one in found),
        "cases": found,
    }


def case_name(found: dict) -> str:
    shortest, longest = found["prompt_tokens"]
    lengths = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
    return f"{found['prompts']} x {found['group']}, prompts of {lengths}"


def lines_of(result: dict) -> list[str]:
    """The table: tokens per second, and what transformers' faster cache takes in times of the native engine."""
    rows = []
    for one in result["cases"]:
        speeds = [f"{one[side]['tokens_per_second']:,.0f}" if "seconds" in one.get(side, {}) else "-" for side in SIDES]
        quotients = one[f"{one['faster_cache']} / native"]
        same = min(one[side]["same_tokens"] for side in SIDES if "seconds" in one.get(side, {}))
        rows.append(
            (
                case_name(one),
                f"{one['kind']}, {one['tokens']:,} tokens",
                *speeds,
                f"{spread_cell(quotients['seconds'])} ({one['faster_cache']})",
                "yes" if one["held"] else "no",
                f"{quotients['megabytes']['median']:.2f}",
                f"{same:.4g}",
            )
        )
    head = ("prompts x completions", "work", *(f"{side}, tokens/s" for side in SIDES), "faster cache / native: time", f"at least {result['target_at_least']}", "memory", "same tokens")  # fmt: skip
    return table(head, rows)


def plot(result: dict, path: Path) -> None:
    """Bars of tokens per second, a panel for each kind of work."""
    kinds = list(dict.fromkeys(one["kind"] for one in result["cases"]))
    figure, panels = make_pyplot().subplots(len(kinds), 1, figsize=(9, 3.6 * len(kinds)), squeeze=False)
    colours = dict(zip(SIDES, ("tab:blue", "tab:orange", "tab:red", "0.6"), strict=True))
    for kind, panel in zip(kinds, panels[:, 0], strict=True):
        cases = [one for one in result["cases"] if one["kind"] == kind]
        for number, side in enumerate(SIDES):
            heights = [one.get(side, {}).get("tokens_per_second", 0) for one in cases]
            places = [at + (number - 1.5) * 0.2 for at in range(len(cases))]
            panel.bar(places, heights, 0.18, color=colours[side], label=side)
        names = [case_name(one).replace(", ", "\n") for one in cases]
        panel.set_xticks(range(len(cases)), names, fontsize=8)
        panel.set(ylabel="tokens per second")
        panel.set_title(kind, loc="left", fontsize=10)
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
    panels[0, 0].legend(fontsize=8, frameon=False, ncols=len(SIDES), loc="lower right", bbox_to_anchor=(1, 1))
    save_plot(figure, path)


def main() -> None:
    parser = make_parser(__doc__, "generation", rounds=3)
    parser.add_argument("--model", choices=tuple(SIZES), help="0.8m; on a GPU 0.6b")
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=SIDES, help="all, unless given; native and dynamic are needed"
    )
    given, place = parse(parser, "generation")
    given.model = given.model or ("tiny" if given.quick else "0.6b" if place.device == "cuda" else "0.8m")
    if not {"native", "dynamic"} <= set(given.sides):
        parser.error("--sides: native and dynamic are needed")
    head = {**stamp(sys.argv, place.device), "dtype": place.dtype, "rounds": given.rounds}
    result = rounded({**head, **measure(given, place)})
    write_json(given.name, result, given.out)
    text = "\n".join(lines_of(result)) + "\n"
    (given.out / f"{given.name}.md").write_text(text)
    plot(result, given.out / f"{given.name}.svg")
    print(text)


if __name__ == "__main__":
    main()
