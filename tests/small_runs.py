"""Runs that take a second, and what they left in their folders."""

import functools
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from benchmark_code import load

import coterie
from coterie.recipe.presets import PRESETS

plan = load("planned_fault").plan  # a fault on purpose in the runs of this process
digests = load("broken_runs").digests
recorded = load("broken_runs").recorded

TINY = (  # the equations recipe, made so small that it runs in seconds: overrides for `load_recipe` and `train`
    "model={type: qwen3, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 1, head_dim: 16, max_position_embeddings: 128, tie_word_embeddings: true}",
    "cold_start={steps: 6, rows_per_step: 16, learning_rate: 3.0e-3, warmup_steps: 2}",
    "steps=6",
    "prompts_per_step=3",
    "group_size=4",
    "sampling.max_new_tokens=12",
    "evaluation={prompts: 8, samples: 1, every: 3}",
    "checkpoint={every: 2, keep_last: 3}",
    "optimiser={learning_rate: 1.0e-4, warmup_steps: 10, schedule: linear}",  # not every method has a `final_share`
)


def trained(folder, *more, **options):
    """The tiny recipe, trained with further overrides: its folder."""
    return coterie.train("equations", overrides=[*TINY, *more], out=str(folder), **options).folder


@functools.cache
def _home():
    return tempfile.TemporaryDirectory(prefix="coterie_tests_")  # is removed when the process ends


def _new_folder():
    return Path(tempfile.mkdtemp(dir=_home().name)) / "run"


@functools.cache
def finished():
    """One finished run of the tiny recipe for all tests of a process: to be read, or copied."""
    return trained(_new_folder())


LETTERS = """
def letters(completions, **columns):
    return [sum(c.isalpha() for c in completion[0]["content"]) for completion in completions]

def short(completions, **columns):
    return [-len(completion[0]["content"]) / 10 for completion in completions]
"""


def trained_on_letters(folder, *more, **options):
    """Four steps of the tiny recipe with two rewards that an untrained model earns: its folder."""
    file = Path(_home().name) / "letters.py"
    file.write_text(LETTERS)
    rewards = f"rewards=['{file}:letters', '{file}:short']"
    return trained(folder, rewards, "loss=", "steps=4", "optimiser={learning_rate: 1.0e-3}", *more, **options)


@functools.cache
def finished_on_letters(*more):
    """Such a run, trained once in a process with the same overrides: to be read."""
    return trained_on_letters(_new_folder(), *more)


def select(folder, query, *values):
    """The rows of a query to a run's database."""
    with closing(sqlite3.connect(folder / "run.db")) as db:
        return db.execute(query, values).fetchall()


def metrics(folder, step):
    """The metrics of one step of the method's own stage, by name."""
    return dict(select(folder, "SELECT name, value FROM metrics WHERE stage = 'train' AND step = ?", step))


METHODS = {  # what makes the tiny recipe one of each preset, method and option that changes the loop
    **{preset: [f"preset={preset}"] for preset, values in PRESETS.items() if "method" not in values},
    "ppo": ["preset=ppo", "value.learning_rate=1.0e-3"],
    "dpo": ["preset=dpo", "group_size=", "rewards="],
    "reward_model": ["preset=reward_model", "group_size=", "sampling=", "rewards=", "evaluation={prompts: 50, every: 2}"],
    "sft": ["preset=sft", "cold_start=", "group_size=", "rewards=", "evaluation={prompts: 8, samples: 1}"],
    "mixed": ["preset=grpo", "precision=mixed", "loss={kl_weight: 0.01}"],
    "mixed_ppo": ["preset=ppo", "precision=mixed", "value.learning_rate=1.0e-3"],
    "replaced": ["preset=grpo", "reference={kind: replaced, every: 2}"],
    "adaptive": [
        "preset=grpo", "kl={target: 0.001}", "entropy={weight: 0.01, target: 5.0}", "loss={kl_weight: 0.1}",
    ],
    "exact": ["preset=grpo", "kl={estimator: exact}", "loss={kl_weight: 0.1}"],
    "corrected": ["preset=grpo", "correction={kind: truncate, level: sequence}"],
    "left_out": ["preset=grpo", "overlong={treatment: leave_out}", "sampling.max_new_tokens=30"],
    "reinforce": ["preset=reinforce++", "group_size=1"],
    "ppo_in_loss": ["preset=ppo", "kl={place: loss, estimator: k3}"],
}  # fmt: skip
