"""Whole steps of GRPO against TRL's, on the same work, in one run.

`python benchmarks/versus_trl.py` makes a small model that writes letters, and lets both trainers raise the share of vowels: same
weights, prompts, reward, lengths, learning rate and precision. Each trainer is a process of its own; the two take turns of
four steps, so that a slow minute of the machine meets both, and the first step of a turn, which finds the caches full of the
other's data, is not timed. A step is everything from its prompts to its new weights; ours also writes every completion to
run.db. Before the comparison, TRL's own settings for speed are tried, and the fastest is
what it is compared at. Writes benchmarks/results/versus_trl.json and versus_trl.md. `--real`, with options of its own, is the
same on a pretrained model: versus_trl_real.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPTS, GROUP, LEARNING_RATE = 8, 8, 3e-4
TURN = 4  # steps
SHAPE = {
    "type": "qwen3", "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 8, "head_dim": 16, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
WORKLOADS = {  # tokens of a prompt; fewest and most of a completion, with its end; targets: speed-up, share of the memory
    "short": {"prompt": 12, "lengths": (26, 31), "speed_up": 2.0},
    "long prompt": {"prompt": 212, "lengths": (26, 31), "speed_up": 5.0, "memory": 0.4},
    "ragged": {"prompt": 12, "lengths": (8, 120), "speed_up": 2.5},
}
PEER_SETTINGS: dict[str, dict[str, Any]] = {  # what TRL documents for speed and this machine can run
    "generate": {},
    "static cache": {"cache_implementation": "static"},
    "continuous batching": {"use_transformers_continuous_batching": True},
    "torch_compile": {"torch_compile": True},
}


def vowels(completions: list[str], **columns: Any) -> list[float]:
    """The reward: the share of a completion that is vowels. It says nothing about the length, so lengths stay."""
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


# What both trainers start from


def make_start(folder: Path, workload: dict[str, Any], steps: int = 200) -> None:
    """A model that has learned to write random letters of the workload's lengths, its tokenizer, and the prompts."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["<end>", *LETTERS])}, "<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    settings = {k: v for k, v in SHAPE.items() if k != "type"}
    config = AutoConfig.for_model(SHAPE["type"], **settings, vocab_size=len(LETTERS) + 1, bos_token_id=None,
                                  eos_token_id=0, pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    fewest, most = workload["lengths"]
    prompt, rows, width = workload["prompt"], 16, workload["prompt"] + most
    for _ in range(steps):
        tokens = torch.randint(1, len(LETTERS) + 1, (rows, width))
        ends = torch.randint(prompt + fewest - 1, prompt + most, (rows, 1))
        labels = torch.where(torch.arange(width) < ends, tokens, 0)
        labels = torch.where(torch.arange(width) > ends, -100, labels)
        labels[:, :prompt] = -100
        loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")
    draw = random.Random(0)
    prompts = [{"prompt": "".join(draw.choices(LETTERS, k=prompt))} for _ in range(512)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)) + "\n")


# The two sides: each waits for its turn before every step, and then says how long the step took


class Turns:
    """A worker's end of the conversation. The first turn starts the memory's high-water mark anew."""

    def __init__(self) -> None:
        self.base = _memory("VmRSS")
        self._answer = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever the trainers print is not an answer
        self._started = self._seconds = 0.0

    def wait(self) -> None:
        if not self._started:
            Path("/proc/self/clear_refs").write_text("5")
        if not sys.stdin.readline():
            os._exit(0)
        self._started = time.perf_counter()

    def stop(self) -> None:
        self._seconds = time.perf_counter() - self._started

    def done(self, **found: Any) -> None:
        peak = _memory("VmHWM")
        memory = {"peak_megabytes": (peak - self.base) / 1e6, "process_megabytes": peak / 1e6}
        print(json.dumps({"seconds": self._seconds, **memory, **found}), file=self._answer, flush=True)


def _memory(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def run_ours(folder: Path, workload: dict[str, Any], steps: int, seed: int) -> None:
    train_ours(
        folder,
        {
            "preset": "grpo",
            "task": {"data": str(folder / "prompts.jsonl"), "heldout": 0.01},
            "rewards": [{"function": f"{Path(__file__).resolve()}:vowels"}],
            "model": str(folder / "model"),
            "loss": {"kl_weight": 0.0},
            "steps": steps,
            "prompts_per_step": PROMPTS,
            "group_size": GROUP,
            "sampling": {"max_new_tokens": workload["lengths"][1] + 8},
            "optimiser": {"learning_rate": LEARNING_RATE, "warmup_steps": 0},
            "checkpoint": {"every": steps},
            "seed": seed,
        },
    )


def train_ours(folder: Path, recipe: dict[str, Any]) -> None:
    """Train by a recipe, a step each turn."""
    import coterie
    from coterie.recipe import make_recipe
    from coterie.runs.recorder import Recorder
    from coterie.training.session import Session

    turns = Turns()
    remaining, record = Session.remaining, Recorder.record
    recorded: list[dict[str, float]] = []

    def with_turns(run: Session, stage: str, num_steps: int) -> Any:
        for step in remaining(run, stage, num_steps):
            turns.wait()
            yield step
            turns.stop()
            kept = run.store.read("SELECT prompt, reward FROM completions WHERE step = ?", step)
            turns.done(
                reward=recorded[-1]["reward/mean"],
                tokens=recorded[-1]["completion/num_tokens"],
                kept=len(kept),
                rewards=[row["reward"] for row in kept],
                silent_share=recorded[-1]["group/no_signal_share"],
                sample_seconds=recorded[-1]["time/sample_seconds"],
            )

    def remember(recorder: Recorder, stage: str, step: int, metrics: Any, *others: Any) -> None:
        record(recorder, stage, step, metrics, *others)
        recorded.append(metrics)

    Session.remaining, Recorder.record = with_turns, remember  # type: ignore[method-assign]
    coterie.train(make_recipe(recipe), out=str(folder / f"run-{os.getpid()}"))


def run_theirs(folder: Path, workload: dict[str, Any], steps: int, seed: int, settings: dict[str, Any]) -> None:
    given = {
        "bf16": False, "seed": seed, "max_steps": steps, "per_device_train_batch_size": PROMPTS * GROUP,
        "num_generations": GROUP, "max_completion_length": workload["lengths"][1] + 8, "learning_rate": LEARNING_RATE,
        "adam_beta2": 0.95,
    }  # fmt: skip
    train_theirs(folder, given | settings, vowels)


def train_theirs(folder: Path, settings: dict[str, Any], reward: Callable[..., list[float]], **others: Any) -> None:
    """Train with TRL, a step each turn. others: further arguments of its trainer."""
    warnings.filterwarnings("ignore")
    import datasets
    import torch
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    turns = Turns()
    sampling: list[float] = []  # seconds, of the step under way

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            sampling.clear()
            turns.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.stop()
            found = {name: values[-1] for name, values in trainer._metrics["train"].items() if values}
            turns.done(
                reward=found["reward"],
                tokens=found["completions/mean_length"] * num_rows,
                rewards=list(trainer._logs["rewards"][reward.__name__])[-num_rows:],
                silent_share=found["frac_reward_zero_std"],
                sample_seconds=sum(sampling),
            )

    class Trainer(trl.GRPOTrainer):
        def _generate(self, *arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return super()._generate(*arguments)
            finally:
                sampling.append(time.perf_counter() - started)

    config = trl.GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch_fused",
        beta=0.0, loss_type="grpo", epsilon=0.2, temperature=1.0, gradient_checkpointing=False, **settings,
    )  # fmt: skip
    num_rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        reward_funcs=reward,
        args=config,
        train_dataset=datasets.Dataset.from_json(str(folder / "prompts.jsonl")),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[TakeTurns()],
        **others,
    )
    trainer.train()


# The comparison


class Side:
    """A trainer in a process of its own."""

    def __init__(self, name: str, folder: Path, *work: object, program: str = __file__) -> None:
        command = [sys.executable, program, "--worker", name, str(folder), *map(str, work)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._errors = (folder / f"{name}.log").open("w")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment
        )

    def step(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._errors.flush()
            raise RuntimeError(Path(self._errors.name).read_text()[-2000:])
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()


def fastest_settings(folder: Path, workload: str, steps: int) -> tuple[str, dict[str, Any]]:
    """Each of TRL's settings for a few steps: the median seconds, and which is fastest."""
    found: dict[str, Any] = {}
    for name in PEER_SETTINGS:
        side = Side("trl", folder, workload, steps, 0, name)
        try:
            found[name] = statistics.median([side.step()["seconds"] for _ in range(steps)][2:])
        except RuntimeError as error:
            found[name] = f"does not run here: {str(error).strip().splitlines()[-1][:200]}"
        finally:
            side.close()
        print(f"  TRL with {name}: {found[name]}", flush=True)
    measured = {name: seconds for name, seconds in found.items() if isinstance(seconds, float)}
    return min(measured, key=measured.__getitem__), found


def compare(folder: Path, workload: str, steps: int, seed: int, settings: str) -> dict[str, Any]:
    """Turns of both: medians without the first turn and the first step of each, and the curve of the rewards."""
    sides = {name: Side(name, folder, workload, steps, seed, settings) for name in ("trl", "coterie")}
    try:
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for done in range(0, steps, TURN):
            for name, side in sides.items():
                rows[name] += [side.step() for _ in range(min(TURN, steps - done))]
    finally:
        for side in sides.values():
            side.close()
    found: dict[str, Any] = {}
    for name, of_side in rows.items():
        timed = [row for step, row in enumerate(of_side) if step % TURN and (step > TURN or steps <= TURN)]
        seconds = [row["seconds"] for row in timed]
        found[name] = {
            "step_seconds": statistics.median(seconds),
            "step_seconds_quartiles": statistics.quantiles(seconds, n=4)[::2],
            "tokens_per_second": sum(row["tokens"] for row in timed) / sum(seconds),
            "tokens_per_completion": statistics.mean(row["tokens"] for row in of_side) / PROMPTS / GROUP,
            "peak_megabytes": of_side[-1]["peak_megabytes"],
            "rewards": [round(row["reward"], 4) for row in of_side],
        }
    assert all(row["kept"] == PROMPTS * GROUP for row in rows["coterie"]), "a step of ours left completions out"
    return found


def judged(of_seeds: list[dict[str, Any]], workload: dict[str, Any]) -> dict[str, Any]:
    """Ratios of the medians over all seeds, and whether the targets hold."""

    def over_seeds(name: str, quantity: str) -> float:
        return statistics.median(found[name][quantity] for found in of_seeds)

    speed_up = over_seeds("trl", "step_seconds") / over_seeds("coterie", "step_seconds")
    memory = over_seeds("coterie", "peak_megabytes") / over_seeds("trl", "peak_megabytes")
    last = {name: [statistics.mean(f[name]["rewards"][-10:]) for f in of_seeds] for name in ("trl", "coterie")}
    verdict = {
        "speed_up": speed_up,
        "memory_share": memory,
        "first_reward": {name: statistics.mean(f[name]["rewards"][0] for f in of_seeds) for name in last},
        "last_reward": {name: statistics.mean(values) for name, values in last.items()},
        "last_reward_by_seed": last,
        "speed_up_held": speed_up >= workload["speed_up"],
    }
    return verdict | ({"memory_held": memory <= workload["memory"]} if "memory" in workload else {})


def table(results: dict[str, Any]) -> list[str]:
    lines = [
        "| work | TRL: s a step | coterie: s a step | speed-up | target | tokens a second | peak MB | memory | reward at the end |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        medians = {
            side: {q: statistics.median(f[side][q] for f in result["seeds"]) for q in ("step_seconds", "tokens_per_second", "peak_megabytes")}
            for side in ("trl", "coterie")
        }  # fmt: skip
        theirs, ours = medians["trl"], medians["coterie"]
        last = result["last_reward"]
        lines.append(
            f"| {name} | {theirs['step_seconds']:.3f} | {ours['step_seconds']:.3f} | **{result['speed_up']:.1f}** "
            f"| {WORKLOADS[name]['speed_up']} | {theirs['tokens_per_second']:,.0f} / {ours['tokens_per_second']:,.0f} "
            f"| {theirs['peak_megabytes']:.0f} / {ours['peak_megabytes']:.0f} | {result['memory_share']:.2f} "
            f"| {last['trl']:.2f} / {last['coterie']:.2f} |"
        )
    return lines


def main() -> None:
    if "--real" in sys.argv:
        from versus_trl_real import main as compare_on_a_real_model

        compare_on_a_real_model()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--work", nargs="*", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--peer", choices=list(PEER_SETTINGS), help="TRL's settings, instead of trying them all")
    parser.add_argument("--quick", action="store_true", help="three steps of the short work: whether it runs")
    parser.add_argument("--dry", action="store_true", help="print, and write no results")
    parser.add_argument("--real", action="store_true", help="on a pretrained model; --real --help says more")
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, folder, work, steps, seed, settings = options.worker
        if name == "coterie":
            run_ours(Path(folder), WORKLOADS[work], int(steps), int(seed))
        else:
            run_theirs(Path(folder), WORKLOADS[work], int(steps), int(seed), PEER_SETTINGS[settings])
        return
    from tables import RESULTS, stamp, write_json

    if options.quick:
        options.steps, options.seeds, options.work, options.peer, options.dry = 3, 1, ["short"], "generate", True
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as home:
        for work in options.work:
            folder = Path(home) / work.replace(" ", "_")
            folder.mkdir()
            make_start(folder, WORKLOADS[work], 20 if options.quick else 200)
            settings, tried = (options.peer, {}) if options.peer else fastest_settings(folder, work, 10)
            print(f"{work}: TRL with {settings}", flush=True)
            of_seeds = [compare(folder, work, options.steps, seed, settings) for seed in range(options.seeds)]
            results[work] = {
                "peer_settings": settings,
                "peer_settings_tried": tried,
                **judged(of_seeds, WORKLOADS[work]),
                "seeds": of_seeds,
            }
            print("\n".join(table({work: results[work]})), flush=True)
    if not options.dry:
        import trl

        about = stamp(sys.argv)
        about["versions"]["trl"] = trl.__version__
        write_json("versus_trl", {**about, "work": results})
        (RESULTS / "versus_trl.md").write_text("\n".join(table(results)) + "\n")


if __name__ == "__main__":
    main()
