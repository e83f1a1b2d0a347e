"""Parts of gpu.py: every path for a GPU beside the plain one, as errors; and what is compiled and recorded for many lengths.

Errors are shares of the largest number of what is plain, which is computed in float32 with the same inputs unless said otherwise.

Legend: T tokens of a stream, H heads, K key-value heads, E width of a head, N completion tokens, V vocabulary, D width.
"""

from __future__ import annotations

import copy
import random
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from gpu import NOT_HERE, Setting
from measure import Place, make_policy, noise_keys, random_prompts
from torch import Tensor

from coterie.fast import replay
from coterie.fast.flex import FlexLayout, flex_serves
from coterie.fast.half import Halves
from coterie.fast.native import NativeEngine
from coterie.fast.serve import Policy, make_engine
from coterie.fast.tiles import TiledLogprobs
from coterie.models.attention import AttentionSettings
from coterie.models.layout import DenseLayout
from coterie.models.logprobs import head_statistics, token_logprobs
from coterie.recipe.settings import Lora, Optimiser, Sampling
from coterie.rollouts.pack import Row, make_stream
from coterie.training.step import make_optimiser, take_step

Segments = list[tuple[int, tuple[int, ...]]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def equal(setting: Setting) -> None:
    for dtype, width in (("float32", 64), ("bfloat16", 64), ("bfloat16", 128)):
        name = f"attention, {dtype}, heads of {width}"
        setting.measure(name, lambda dtype=dtype, width=width: attention(setting, DTYPES[dtype], width))
    for window, softcap in ((7, None), (300, None), (None, 30.0)):
        name = f"attention, bfloat16, window {window}, soft cap {softcap}"
        chosen = AttentionSettings(0.1, window, softcap)
        setting.measure(name, lambda chosen=chosen: attention(setting, torch.bfloat16, 64, chosen))
    for precision in ("float32", "mixed"):
        setting.measure(f"tiles, {precision}", lambda precision=precision: tiles(setting, precision))
        policy = policy_in(setting, precision)
        for name, work in PATHS.items():
            setting.measure(f"{name}, {precision}", lambda work=work, policy=policy: work(setting, policy))


def error(found: Tensor, plain: Tensor) -> float:
    return ((found.double() - plain.double()).abs().max() / plain.double().abs().max()).item()


# Attention


def attention(
    setting: Setting, dtype: torch.dtype, width: int, chosen: AttentionSettings | None = None
) -> dict[str, Any]:
    """FlexAttention and dense blocks in some type, each against dense blocks in float32: of the output, and of three gradients."""
    chosen = chosen or AttentionSettings(width**-0.5, None, None)
    segments: Segments = [(150, (60, 130, 8, 2)), (5, (4, 17, 1)), (300, (300, 20)), (23, ()), (1, (140, 5))]
    inputs = tensors(setting, sum(prompt + sum(rows) for prompt, rows in segments), width)
    inputs = [x.to(dtype) for x in inputs]
    serves = flex_serves(*inputs, chosen.softcap, DenseLayout) if setting.on_gpu else NOT_HERE
    plain = attended(DenseLayout, segments, [x.float() for x in inputs], chosen)
    found: dict[str, Any] = {"flex serves": serves}
    for kind in (FlexLayout, DenseLayout):
        if kind is FlexLayout and not setting.on_gpu:  # which has no gradient there
            with torch.no_grad():
                outputs = [kind(segments, setting.device).attend(0, *inputs, chosen)]
        else:
            outputs = attended(kind, segments, inputs, chosen)
        names = ("output", "queries", "keys", "values")
        errors = {name: error(x, y) for name, x, y in zip(names, outputs, plain, strict=False)}
        found[kind.__name__] = errors
    return found


def tensors(setting: Setting, length: int, width: int, seed: int = 0) -> list[Tensor]:
    """Queries, keys and values: [1, H or K, T, E]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, length, width, generator=generator).to(setting.device) for heads in (4, 2, 2)]


def attended(kind: Any, segments: Segments, inputs: Sequence[Tensor], chosen: AttentionSettings) -> list[Tensor]:
    """The output [1, T, H, E], and the gradients of the inputs in one direction."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = kind(segments, inputs[0].device).attend(0, *leaves, chosen)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return [out.detach(), *torch.autograd.grad((out * direction).sum(), leaves)]


# The head


def tiles(setting: Setting, precision: str) -> dict[str, float]:
    """Log-probabilities in tiles, with their gradients, against all logits at once in float64, of the same rounded numbers."""
    rows, width, vocabulary = (40, 32, 500) if setting.tiny else (3000, 1024, 50_000)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(setting.device)
    weight = (torch.randn(vocabulary, width, generator=generator) * width**-0.5).to(setting.device)
    targets = torch.randint(vocabulary, (rows,), generator=generator).to(setting.device)
    halves = Halves() if precision == "mixed" else None
    if halves is not None:
        hidden, weight = (x.bfloat16().float() for x in (hidden, weight))
    direction = torch.randn(rows, generator=generator).to(setting.device)

    def of(compute: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        out = compute(*leaves)
        return [out.detach(), *torch.autograd.grad((out * direction).sum(), leaves)]

    found = of(lambda x, w: TiledLogprobs.apply(x, w, None, targets, 0.8, halves), torch.float32)
    whole = of(lambda x, w: (x @ w.t() / 0.8).log_softmax(1).gather(1, targets[:, None])[:, 0], torch.float64)
    return {name: error(x, y) for name, x, y in zip(("logprobs", "hidden", "weight"), found, whole, strict=True)}


# A model


def policy_in(setting: Setting, precision: str) -> Policy:
    """A small one, on the device, with weights that let mistakes show."""
    sizes = {} if setting.tiny else {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
                                     "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 5000}  # fmt: skip
    policy = make_policy("tiny", Place(setting.device), initializer_range=0.06, **sizes)
    return policy.in_mixed_precision() if precision == "mixed" else policy


def groups_of(policy: Policy, setting: Setting) -> list[tuple[list[int], list[list[int]]]]:
    shapes = [(5, (4, 7, 1)), (9, (6,))] if setting.tiny else [(150, (60, 130, 8, 2)), (40, (30, 99)), (7, (5,))]
    lengths = [length for prompt, rows in shapes for length in (prompt, *rows)]
    made = iter(random_prompts(lengths, policy.vocabulary_size, seed=3))
    return [(next(made), [next(made) for _ in rows]) for _, rows in shapes]


def stream_of(policy: Policy, setting: Setting) -> Any:
    groups = groups_of(policy, setting)
    return make_stream([(p, [Row.written(one) for one in rows]) for p, rows in groups]).to(policy.device)


def gradients(policy: Policy, stream: Any) -> list[Tensor]:
    """Log-probabilities [N], and the gradient of all parameters that are trained, as one."""
    parameters = [parameter for _, parameter in policy.named_parameters()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    found = token_logprobs(policy, stream)
    (found * torch.linspace(-1, 1, len(found), device=found.device)).sum().backward()
    return [found.detach(), torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])]


def beside(found: Sequence[Tensor], plain: Sequence[Tensor]) -> dict[str, float]:
    """Nats between log-probabilities, and the share of the gradient's norm by which it differs."""
    nats = (found[0].double() - plain[0].double()).abs()
    share = (found[1].double() - plain[1].double()).norm() / plain[1].double().norm()
    return {"largest_nats": nats.max().item(), "mean_nats": nats.mean().item(), "gradient": share.item()}


def stream_beside_rows(setting: Setting, policy: Policy) -> dict[str, float]:
    """The packed stream, against each row with a prompt of its own, in float32."""
    stream = stream_of(policy, setting)
    plain = replace(policy, served="padded", body=None, mixed=False, head_halves=None)
    return beside(gradients(policy, stream), gradients(plain, stream))


def recomputed(setting: Setting, policy: Policy) -> dict[str, float]:
    stream = stream_of(policy, setting)
    return beside(gradients(policy.recomputing(), stream), gradients(policy, stream))


def in_chunks(setting: Setting, policy: Policy) -> dict[str, float]:
    """Log-probabilities with the entropy, which need all logits of a chunk, against those in tiles."""
    stream = stream_of(policy, setting)
    with torch.no_grad():
        inputs = policy.head_inputs(stream)
        chunks = head_statistics(policy, inputs, stream.targets, entropy=True)
        whole = head_statistics(policy, inputs, stream.targets)
    return {"largest_nats": (chunks.logprobs - whole.logprobs).abs().max().item()}


def adapted(setting: Setting, policy: Policy) -> dict[str, float]:
    """LoRA's matrices on the stream, against rows of their own."""
    own = replace(policy, model=copy.deepcopy(policy.model), body=None)
    own = own.with_adapter(Lora(rank=4), seed=0)
    for number, (_, parameter) in enumerate(own.named_parameters()):
        made = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.05
        parameter.data.copy_(made)
    return stream_beside_rows(setting, own)


def same_step(setting: Setting, policy: Policy) -> dict[str, Any]:
    """Whether a step taken twice from the same weights gives the same bits, and one in micro-batches nearly the same."""
    groups = [(prompt, [Row.written(one) for one in rows]) for prompt, rows in groups_of(policy, setting)]
    once, made = [make_stream(groups)], list[Tensor]()
    for streams in (once, once, [make_stream([group]) for group in groups]):
        mine = copy.deepcopy(policy)
        loss_of = partial(negative_sum, mine)
        take_step(make_optimiser(mine, Optimiser()), streams, loss_of, mine.device, 1e9)
        made.append(torch.cat([parameter.grad.flatten() for parameter in mine.model.parameters()]))
    share = (made[2] - made[0]).norm() / made[0].norm()
    return {"same_bits_twice": bool(torch.equal(made[0], made[1])), "in_micro_batches": share.item()}


def negative_sum(policy: Policy, number: int, stream: Any) -> Tensor:
    return -token_logprobs(policy, stream).sum()


def decoded(setting: Setting, policy: Policy) -> dict[str, Any]:
    """Steps of decoding that are recorded, against plain ones; and both against what the trainer makes of the tokens."""
    prompts = random_prompts((3, 9, 5) if setting.tiny else (40, 200, 133, 64), policy.vocabulary_size)
    keys, sampling = noise_keys(len(prompts), 4), Sampling(max_new_tokens=8 if setting.tiny else 150)
    made = {}
    for replays in (True, False):
        engine = NativeEngine(policy)
        engine.replays = replays
        made[replays] = [c for group in engine.generate(prompts, keys, sampling, ()) for c in group]
        still = engine.replays
    pairs = list(zip(made[True], made[False], strict=True))
    rows = [Row(c.tokens, c.logprobs) for c in made[True]]
    groups = [(prompt, rows[4 * number : 4 * number + 4]) for number, prompt in enumerate(prompts)]
    stream = make_stream(groups).to(policy.device)
    with torch.no_grad():
        gap = (token_logprobs(policy, stream) - stream.sampler_logprobs).abs()
    return {
        "recorded": still if setting.on_gpu else NOT_HERE,
        "same_completions": sum(a.tokens == b.tokens for a, b in pairs) / len(pairs),
        "first_logprobs": max((a.logprobs[0] - b.logprobs[0]).abs().item() for a, b in pairs),
        "largest_gap_to_trainer": gap.max().item(),
        "mean_gap_to_trainer": gap.mean().item(),
        "engine": type(make_engine(policy)).__name__,
    }


PATHS: dict[str, Callable[[Setting, Policy], dict[str, Any]]] = {
    "stream beside rows": stream_beside_rows,
    "decoding": decoded,
    "activation checkpointing": recomputed,
    "entropy in chunks": in_chunks,
    "lora": adapted,
    "a step twice": same_step,
}


# Many lengths


def recompilation(setting: Setting) -> None:
    setting.measure("flex attention", lambda: lengths(setting), needs_gpu=True)
    setting.measure("masks", lambda: masks(setting))
    setting.measure("recordings", lambda: recordings(setting))


def some_segments(number: int, setting: Setting) -> Segments:
    """Another stream for each number, of a few hundred tokens to some ten thousand."""
    draw = random.Random(number)
    groups, longest = (2, 20) if setting.tiny else (draw.randint(1, 12), draw.choice((30, 300, 600)))
    return [(draw.randint(1, longest), tuple(draw.randint(1, longest) for _ in range(8))) for _ in range(groups)]


def lengths(setting: Setting) -> dict[str, Any]:
    """50 streams, forward and backward: how often a kernel was compiled, seconds of the calls, the largest error beside dense blocks."""
    from torch._dynamo.utils import counters

    chosen, seconds, compiled, errors = AttentionSettings(64**-0.5, None, None), [], [], []
    torch.cuda.reset_peak_memory_stats()
    for number in range(50):
        segments = some_segments(number, setting)
        inputs = [x.bfloat16() for x in tensors(setting, sum(p + sum(rows) for p, rows in segments), 64, number)]
        before, started = counters["stats"]["unique_graphs"], time.perf_counter()
        found = attended(FlexLayout, segments, inputs, chosen)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        compiled.append(counters["stats"]["unique_graphs"] - before)
        plain = attended(DenseLayout, segments, [x.float() for x in inputs], chosen)
        errors.append(max(error(x, y) for x, y in zip(found, plain, strict=True)))
    again = [s for s, times in zip(seconds, compiled, strict=True) if not times]
    return {
        "graphs": sum(compiled),
        "at_streams": [number for number, times in enumerate(compiled) if times],
        "seconds_with_compiling": sum(seconds) - sum(again),
        "median_seconds_without": sorted(again)[len(again) // 2] if again else None,
        "largest_error": max(errors),
        "peak_megabytes": torch.cuda.max_memory_allocated() / 1e6,
    }


def masks(setting: Setting) -> dict[str, float]:
    """Seconds to find out which tiles of a stream hold something."""
    segments: Segments = [(20, (6,) * 4)] * 2 if setting.tiny else [(200, (256,) * 8)] * 7
    started = time.perf_counter()
    for _ in range(3):
        FlexLayout(segments, setting.device)._mask(None)
        if setting.on_gpu:
            torch.cuda.synchronize()
    return {"tokens": sum(p + sum(rows) for p, rows in segments), "seconds": (time.perf_counter() - started) / 3}


def recordings(setting: Setting) -> dict[str, Any]:
    """Jobs of different sizes with one engine: recordings, seconds of each, and memory after each job, which may not grow."""
    policy, taken, held = policy_in(setting, "mixed"), [], []
    engine, capture = NativeEngine(policy), replay.Pool.capture
    engine.replays = True  # on a CPU the same steps, not recorded

    def timed(pool: Any, compute: Callable[[], Tensor]) -> Any:
        started = time.perf_counter()
        made = capture(pool, compute)
        taken.append(time.perf_counter() - started)
        return made

    replay.Pool.capture = timed  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(3 if setting.tiny else 10):
            sizes = [3 + number] * 2 if setting.tiny else [40 + 20 * number] * (4 + number)
            sampling = Sampling(max_new_tokens=6 if setting.tiny else 100 + 30 * number)
            prompts = random_prompts(sizes, policy.vocabulary_size)
            engine.generate(prompts, noise_keys(len(sizes), 8), sampling, ())
            held.append(torch.cuda.memory_reserved() / 1e6 if setting.on_gpu else 0.0)
    return {
        "recordings": len(taken) if setting.on_gpu else NOT_HERE,
        "seconds_of_each": taken,
        "still_recorded": engine.replays if setting.on_gpu else NOT_HERE,
        "reserved_megabytes": held,
        "warnings": [str(one.message) for one in caught],
    }
