"""What the measurements of time and memory have in common: models of known shapes, clocks, peak memory, ratios, growth.

Two sides that are compared are measured in turn, A B A B, each time in a process of its own, so that a slow minute is everyone's
and no side's memory is the other's. Peak memory on the CPU is read from /proc, so they need Linux.

Legend: P prompts, G completions per prompt, B = P*G rows, V vocabulary.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tables import RESULTS
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from coterie.fast.serve import Policy
from coterie.noise import key, mix
from coterie.recipe import make_recipe
from coterie.training.loss_weights import first_loss_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64},
    "0.8m": {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 8,
             "num_key_value_heads": 8, "head_dim": 16, "vocab_size": 128},
    "5m": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4,
           "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 512},
    "26m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 512},
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14, "num_attention_heads": 12,
             "num_key_value_heads": 12, "head_dim": 64, "vocab_size": 512},
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
}  # fmt: skip
RECIPE = make_recipe({"preset": "dr_grpo", "model": "none", "task": "equations", "rewards": ["none:none"]})
WEIGHTS = first_loss_weights(RECIPE)
MODEL_CODE = "transformers.models.qwen3.modeling_qwen3"
MOMENT, ENOUGH_SECONDS = 0.2, 2.0  # how long one measurement is repeated, at least and at most


@dataclass(frozen=True)
class Place:
    """Where something runs, and in which numbers."""

    device: str = "cpu"
    dtype: str = "float32"

    def synchronise(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def make_parser(description: str | None, name: str, rounds: int = 5) -> argparse.ArgumentParser:
    """The options that all measurements have. Their results are called `name`, and `name`_cuda on a GPU."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument(
        "--rounds", type=int, default=rounds, help=f"how often each side is measured, in turn ({rounds})"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast it is")
    parser.add_argument("--name", help=f"what the result files are called ({name}, on a GPU {name}_cuda)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the result files")
    return parser


def parse(parser: argparse.ArgumentParser, name: str) -> tuple[argparse.Namespace, Place]:
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    given.name = given.name or name + ("_cuda" if given.device == "cuda" else "")
    given.rounds = 1 if given.quick else given.rounds
    given.out.mkdir(parents=True, exist_ok=True)
    return given, Place(given.device, given.dtype)


def make_model(size: str, place: Place, **changes: Any) -> PreTrainedModel:
    """A Qwen3-shaped model with random weights, the same in every process."""
    without_ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    settings = {"tie_word_embeddings": True, "max_position_embeddings": 4096, **without_ids, **SIZES[size], **changes}
    torch.manual_seed(0)
    with torch.device(place.device):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model("qwen3", **settings), dtype=DTYPES[place.dtype], attn_implementation="sdpa"
        )


def make_policy(size: str, place: Place, **changes: Any) -> Policy:
    policy = Policy.of(make_model(size, place, **changes))
    assert policy.served == "stream"
    return policy


def random_prompts(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]


def noise_keys(num_prompts: int, group: int, seed: int = 0) -> Tensor:
    """[P, G]"""
    of_prompt = mix(torch.tensor(key("benchmark", seed)), torch.arange(num_prompts))
    return mix(of_prompt[:, None], torch.arange(group))


class PeakMemory:
    """The most memory that was held at once since this was made, above what was held then.

    On a GPU what torch's tensors took; else the process's resident memory, whose high-water mark the kernel lets one reset.
    """

    def __init__(self, place: Place) -> None:
        self._on_gpu = place.device == "cuda"
        gc.collect()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(
                0
            )  # memory that is free but kept would hide as much of what is asked for next
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _kilobytes("VmRSS") * 1024

    def megabytes(self) -> float:
        peak = torch.cuda.max_memory_allocated() if self._on_gpu else _kilobytes("VmHWM") * 1024
        return (peak - self._before) / 1e6


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def seconds_of(work: Callable[[], Any], place: Place) -> float:
    place.synchronise()
    started = time.perf_counter()
    work()
    place.synchronise()
    return time.perf_counter() - started


def median_seconds(work: Callable[[], Any], place: Place) -> float:
    """The median time of three runs: of more where they are short, of fewer where they are long."""
    seconds: list[float] = []
    while (len(seconds) < 3 or sum(seconds) < MOMENT) and sum(seconds) < ENOUGH_SECONDS:
        seconds.append(seconds_of(work, place))
    return statistics.median(seconds)


def measured(work: Callable[[], Any], place: Place) -> dict[str, float]:
    """The median time of `work`, and the peak memory of its first run, which is not timed."""
    memory = PeakMemory(place)
    work()
    place.synchronise()
    megabytes = memory.megabytes()
    return {"seconds": median_seconds(work, place), "megabytes": megabytes}


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) in a fresh process, which is forked from one that has done nothing but the slow imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["coterie.training.policy_update", "coterie.fast.native", MODEL_CODE])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def in_turn(sides: Mapping[str, Callable[[], dict]], rounds: int) -> dict[str, list[dict]]:
    """What each side measures in each round: A B A B ..."""
    found: dict[str, list[dict]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, measure in sides.items():
            found[name].append(measure())
    return found


def middle(rounds: Sequence[Mapping[str, float]], name: str) -> float:
    """The median of one quantity over the rounds."""
    return statistics.median(one[name] for one in rounds)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """The median of what the rounds gave, and the lowest and highest of them."""
    return {"median": statistics.median(values), "range": [min(values), max(values)]}


def ratios(upper: Sequence[Mapping[str, float]], lower: Sequence[Mapping[str, float]], name: str) -> dict[str, Any]:
    """One side's quantity divided by the other's, round by round."""
    return spread([one[name] / max(other[name], 1e-9) for one, other in zip(upper, lower, strict=True)])


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """b of the least-squares fit y = a * x ** b, in logarithms."""
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(max(y, 1e-9)) for y in ys]).slope


def line(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float]:
    """The least-squares fit y = start + slope * x, and the share of y's variance that it explains."""
    slope, start = statistics.linear_regression(xs, ys)
    explained = statistics.correlation(xs, ys) ** 2 if len(set(ys)) > 1 else 1.0
    return {"start": start, "slope": slope, "explained": explained}
