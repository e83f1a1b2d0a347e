"""Parts of gpu.py: how fast a Qwen3-shaped model with random weights samples and trains, stage by stage, and whole steps of it.

The work of a step: 16 prompts of 200 tokens, 8 completions each of 256 tokens, mixed precision, whole completions with signal.
A decoding step must read the bfloat16 weights of all layers and the head, and the keys and values so far: that, by its seconds and the
bandwidth measured on this machine, is its share of the bandwidth. Training's useful work is three times the forward products, for T
tokens in the layers and N in the head, and attention over pairs that may see one another: nothing computed twice counts.

Legend: P prompts, G completions per prompt, T tokens of all streams, N completion tokens.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu import NOT_HERE, Setting
from gpu_runs import rates
from measure import RECIPE, WEIGHTS, Place, make_model, make_policy, noise_keys, random_prompts
from peers import generate
from roofline import attention_flop

from coterie.algorithms.advantages import group_advantages
from coterie.fast.native import NativeEngine
from coterie.fast.serve import Policy
from coterie.recipe.settings import Sampling
from coterie.rollouts.pack import Row, make_stream, split_by_tokens
from coterie.sections import Stopwatch, section, timing
from coterie.training.policy_update import optimise
from coterie.training.step import make_optimiser
from coterie.types import BatchTotals, Completion, Stream

STEPS = 20


@dataclass(frozen=True)
class Work:
    """What a step does. chunk: stream tokens of a micro-batch."""

    prompts: int = 16
    group: int = 8
    prompt_tokens: int = 200
    new_tokens: int = 256
    chunk: int = RECIPE.optimiser.micro_batch_tokens

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    @property
    def sampling(self) -> Sampling:
        return Sampling(max_new_tokens=self.new_tokens, max_rows=max(256, self.rows), max_cache_megabytes=40_000)


def work_of(size: str, setting: Setting) -> Work:
    """Micro-batches of larger models are smaller, so that what the backward pass needs fits beside them."""
    return Work(2, 2, 8, 6) if setting.tiny else Work() if size == "0.6b" else Work(chunk=8192)


def model(size: str, setting: Setting) -> None:
    """All stages of one size, ours first."""
    work, place, shape = work_of(size, setting), Place(setting.device), "tiny" if setting.tiny else size
    prompts = ours(size, make_policy(shape, place).in_mixed_precision(), work, setting)
    for cache in ("dynamic", "static") if size == "0.6b" else ():
        setting.measure(f"model.generate, {cache}", lambda cache=cache: generated(shape, prompts, work, place, cache))


def ours(size: str, policy: Policy, work: Work, setting: Setting) -> list[list[int]]:
    """Sampling, training, and whole steps. Returns the prompts."""
    if size == "4b":  # whose weights, gradients and optimiser are 64 GB
        policy = policy.recomputing()
    engine, place, made = NativeEngine(policy), Place(setting.device), list[list[Completion]]()
    prompts = random_prompts([work.prompt_tokens] * work.prompts, policy.vocabulary_size)

    def first() -> None:
        made.extend(sampled(engine, prompts, work, 0))

    setting.figures.put("parameters", policy.model.num_parameters())
    machine = setting.measure("rates", lambda: rates(setting))
    setting.measure("first sampling", lambda: {"seconds": seconds(first, place)})
    setting.measure("decoding", lambda: decoding(engine, prompts, work, machine, place))
    setting.measure("training", lambda: training(policy, *packed(prompts, made, work), machine, place))
    count = 5 if size == "4b" else STEPS
    setting.measure("steps", lambda: whole_steps(policy, engine, prompts, work, setting, count))
    return prompts


def seconds(action: Any, place: Place) -> float:
    place.synchronise()
    started = time.perf_counter()
    action()
    place.synchronise()
    return time.perf_counter() - started


def sampled(engine: NativeEngine, prompts: Sequence[Sequence[int]], work: Work, number: int) -> list[list[Completion]]:
    return engine.generate(prompts, noise_keys(work.prompts, work.group, number), work.sampling, ())


# Decoding


def decoding(
    engine: NativeEngine, prompts: Sequence[Sequence[int]], work: Work, machine: dict[str, float], place: Place
) -> dict[str, Any]:
    """Twice: the whole, and where its time goes, where each section waits for the device."""
    taken = min(seconds(lambda: sampled(engine, prompts, work, 1), place) for _ in range(2))
    shares = sections(lambda: sampled(engine, prompts, work, 1), place)
    step = shares.get("sample/decode", taken) / work.new_tokens
    policy = engine.policy
    weights = 2 * layer_weights(policy) + 2 * policy.model.get_output_embeddings().weight.numel()
    keys = engine.kv_bytes(prompts[0][0]) * (work.prompts * work.prompt_tokens + work.rows * work.new_tokens / 2)
    return {
        "recorded": engine.replays if place.device == "cuda" else NOT_HERE,
        "tokens_per_second": work.rows * work.new_tokens / taken,
        "seconds": taken,
        "sections": shares,
        "kernels": kernels(lambda: sampled(engine, prompts, work, 1), place),
        "bytes_of_a_step": {"weights": weights, "keys and values": keys},
        "of_bandwidth, model": (weights + keys) / step / machine["bytes_per_second"],
        "of_bandwidth, all of sampling": (weights + keys) * work.new_tokens / taken / machine["bytes_per_second"],
    }


def layer_weights(policy: Policy) -> int:
    """The numbers in all linear layers but the head."""
    head = policy.model.get_output_embeddings()
    return sum(m.weight.numel() for m in policy.model.modules() if isinstance(m, torch.nn.Linear) and m is not head)


def sections(action: Any, place: Place) -> dict[str, float]:
    """Seconds by section, each charged for its own work on the device."""
    with timing(Stopwatch(lambda begins: place.synchronise())) as stopwatch:
        action()
        place.synchronise()
    return {name: nanoseconds / 1e9 for name, nanoseconds in stopwatch.nanoseconds.items()}


def kernels(action: Any, place: Place, count: int = 12) -> Any:
    """What a GPU spent its time on: the kernels that took longest, with their seconds and how often they ran."""
    if place.device != "cuda":
        return NOT_HERE
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        action()
        place.synchronise()
    rows = [row for row in trace.key_averages() if row.device_type.name == "CUDA"]
    rows.sort(key=lambda row: -row.self_device_time_total)
    return [{"name": row.key[:120], "seconds": row.self_device_time_total / 1e6, "calls": row.count} for row in rows[:count]]  # fmt: skip


# Training


def packed(
    prompts: Sequence[Sequence[int]], made: Sequence[Sequence[Completion]], work: Work
) -> tuple[list[Stream], BatchTotals]:
    """Micro-batches, with advantages of a reward that says how many tokens have even numbers."""
    rewards = torch.tensor([[sum(t % 2 == 0 for t in c.tokens) / len(c.tokens) for c in group] for group in made])
    advantages = group_advantages(rewards, baseline="group", scale="none").tolist()
    groups = [
        (prompt, [Row(c.tokens, c.logprobs, a) for c, a in zip(group, of_group, strict=True)])
        for prompt, group, of_group in zip(prompts, made, advantages, strict=True)
    ]
    written = sum(len(c.tokens) for group in made for c in group)
    streams = [make_stream(part) for part in split_by_tokens(groups, work.chunk)]
    return streams, BatchTotals(work.rows, written, work.new_tokens)


def training(
    policy: Policy, streams: list[Stream], totals: BatchTotals, machine: dict[str, float], place: Place
) -> dict[str, Any]:
    """The update alone: log-probabilities, loss, backward, clipping, AdamW."""
    optimiser = make_optimiser(policy.model, learning_rate=1e-6)
    update = partial(optimise, policy, optimiser, streams, totals, RECIPE, WEIGHTS, sampled_by_policy=True)
    first = seconds(update, place)
    if place.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = min(seconds(update, place) for _ in range(3))
    tokens, written = sum(len(s.tokens) for s in streams), sum(len(s.targets) for s in streams)
    head = policy.model.get_output_embeddings().weight.numel()
    flop = 6 * (layer_weights(policy) * tokens + head * written) + attention_flop(policy, streams)
    return {
        "micro_batches": len(streams),
        "first_seconds": first,
        "seconds": taken,
        "tokens_per_second": tokens / taken,
        "flop": flop,
        "of_matrix_rate": flop / taken / machine["bfloat16_flop_per_second"],
        "peak_megabytes": torch.cuda.max_memory_allocated() / 1e6 if place.device == "cuda" else NOT_HERE,
        "sections": sections(update, place),
        "kernels": kernels(update, place),
    }


def whole_steps(
    policy: Policy, engine: NativeEngine, prompts: Sequence[Sequence[int]], work: Work, setting: Setting, count: int
) -> dict[str, Any]:
    """Sample, pack, update, as often as there is time for; the last of them with its sections."""
    place, optimiser = Place(setting.device), make_optimiser(policy.model, learning_rate=1e-6)
    gaps, taken = list[float](), list[float]()

    def step(number: int) -> None:
        with section("sample"):
            made = sampled(engine, prompts, work, number)
        with section("pack"):
            streams, totals = packed(prompts, made, work)
        tally, _ = optimise(policy, optimiser, streams, totals, RECIPE, WEIGHTS, sampled_by_policy=True)
        gaps.append(tally.values()["policy/sampler_gap_max"])

    for number in range(2 if setting.tiny else count):
        if setting.seconds_left < 25:
            break
        taken.append(seconds(partial(step, number), place))
    return {
        "steps": len(taken),
        "first_seconds": taken[0],
        "median_seconds": statistics.median(taken[1:] or taken),
        "tokens_per_second": work.rows * work.new_tokens / statistics.median(taken[1:] or taken),
        "largest_sampler_gap": gaps,
        "peak_megabytes": torch.cuda.max_memory_allocated() / 1e6 if setting.on_gpu else NOT_HERE,
        "sections": sections(partial(step, len(taken)), place),
    }


# Beside others


def generated(size: str, prompts: Sequence[Sequence[int]], work: Work, place: Place, cache: str) -> dict[str, float]:
    """transformers' generation of the same tokens, with weights in bfloat16; the second run is timed."""
    if place.device == "cuda":
        torch.cuda.empty_cache()
    theirs = make_model(size, Place(place.device, "bfloat16")).eval()
    run = partial(generate, theirs, prompts, work.group, work.sampling, (), cache)
    first = seconds(run, place)
    taken = seconds(run, place)
    return {"first_seconds": first, "seconds": taken, "tokens_per_second": work.rows * work.new_tokens / taken}


def trl_steps(setting: Setting) -> None:
    setting.measure("step", lambda: trl_step(setting))


def trl_step(setting: Setting) -> Any:
    """TRL's own steps on the work of 0.6b, in bfloat16 autocast, in micro-batches of 16."""
    try:
        import datasets
        import trl
    except ImportError as error:
        return f"trl can't be imported here: {error}"
    from transformers import TrainerCallback

    work, place, taken = work_of("0.6b", setting), Place(setting.device), list[float]()
    theirs = make_model("tiny" if setting.tiny else "0.6b", place)
    tokenizer = numbered_tokenizer(theirs.config.vocab_size)
    each = min(16, work.rows)

    class Timed(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            place.synchronise()
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            place.synchronise()
            taken.append(time.perf_counter() - self.started)

    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder, use_cpu=not setting.on_gpu, bf16=setting.on_gpu, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, max_steps=2 if setting.tiny else 5, per_device_train_batch_size=each,
            gradient_accumulation_steps=work.rows // each, num_generations=work.group, max_completion_length=work.new_tokens,
            learning_rate=1e-6, beta=0.0, temperature=1.0, optim="adamw_torch_fused", gradient_checkpointing=False,
        )  # fmt: skip
        prompts = random_prompts([work.prompt_tokens] * work.prompts * 8, theirs.config.vocab_size)
        rows = [{"prompt": tokenizer.decode(prompt)} for prompt in prompts]
        trainer = trl.GRPOTrainer(
            model=theirs, reward_funcs=even_share, args=config, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer, callbacks=[Timed()],
        )  # fmt: skip
        trainer.train()
    median = statistics.median(taken[1:])
    peak = torch.cuda.max_memory_allocated() / 1e6 if setting.on_gpu else NOT_HERE
    return {"trl": trl.__version__, "seconds": taken, "median_seconds": median,
            "tokens_per_second": work.rows * work.new_tokens / median, "peak_megabytes": peak}  # fmt: skip


def even_share(completions: Sequence[str], **columns: Any) -> list[float]:
    """The share of a completion's words that are even numbers."""
    words = [text.split() for text in completions]
    return [sum(int(word) % 2 == 0 for word in of) / max(1, len(of)) for of in words]


def numbered_tokenizer(vocabulary: int) -> Any:
    """Every token is its number, as a word; the last one ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {str(number): number for number in range(vocabulary)}
    core = Tokenizer(models.WordLevel(words, "0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = str(vocabulary - 1)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token=end)
