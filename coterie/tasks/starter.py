"""What `coterie init` writes: a small task of one's own that works as it is."""

from __future__ import annotations

import json
import string
from pathlib import Path

from coterie.errors import UserError

_RECIPE = """\
# Your own model, data and reward. It works as it is: coterie train FOLDER/recipe.yaml
preset: grpo

# A tiny fresh model that reads bytes, so that this runs anywhere in seconds. For a real one write its folder or hub id,
# and leave the tokenizer out:
#   model: Qwen/Qwen3-0.6B
model: {type: qwen3, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,
        num_key_value_heads: 2, head_dim: 16, max_position_embeddings: 256, tie_word_embeddings: true}
tokenizer: bytes

# One JSON object a line. `prompt` is the column with the prompt: text, or a list of chat messages. The other columns are
# handed to the rewards by name. A quarter of the rows is kept for evaluation, where a reward above 0.99 counts as correct.
task: {data: prompts.jsonl, prompt: prompt, answer: answer, heldout: 0.25, correct_above: 0.99}

# A fresh model writes noise, from which rewards teach nothing: it first learns from the rows' answers, of which every other letter
# is wrong. Leave this out, and task.answer, for a model that can write.
cold_start: {steps: 300, rows_per_step: 32, learning_rate: 3.0e-3, warmup_steps: 10}

rewards: ["rewards.py:wanted_letter"] # file.py:function, or package.module:function; several are added up

loss: {kl_weight: 0} # nothing worth holding on to in a fresh model; leave this out for a real one
steps: 100
prompts_per_step: 8
group_size: 8
sampling: {max_new_tokens: 8}
optimiser: {learning_rate: 1.0e-3, warmup_steps: 5, schedule: linear} # a real model wants about 1.0e-6
evaluation: {every: 50}
"""

_REWARDS = '''\
"""Rewards: each gets a list with one entry per completion, and returns a number for each, or None to abstain.

`completions` are texts here, and lists of one message where the prompts are chats. The other arguments are columns of the
data; take those that you need by name, and the rest with **columns.
"""


def wanted_letter(completions, letter, **columns):
    """How much of a completion is the letter that its row asks for."""
    return [text.count(wanted) / max(1, len(text)) for text, wanted in zip(completions, letter)]
'''


def _sloppy(letter: str, place: int) -> str:
    """Six letters of which every other one is wrong."""
    others = string.ascii_lowercase.replace(letter, "")
    wrong = [others[(7 * place + 11 * number + 3 * ord(letter)) % len(others)] for number in range(3)]
    pairs = zip(wrong, letter * 3, strict=True)
    return "".join(a + b if (place + number) % 2 else b + a for number, (a, b) in enumerate(pairs))


def write_starter(folder: Path) -> None:
    """Write recipe.yaml, prompts.jsonl and rewards.py. Raises UserError where the folder is in use."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"init: {folder} is in use; name a folder that is new or empty")
    rows = [
        {"prompt": f"{verb} the letter {letter}: ", "letter": letter, "answer": _sloppy(letter, place)}
        for letter in string.ascii_lowercase
        for place, verb in enumerate(("Write", "Type", "Repeat", "Print", "Say", "Spell"))
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(_RECIPE.replace("FOLDER", str(folder)), encoding="utf-8")
        (folder / "rewards.py").write_text(_REWARDS, encoding="utf-8")
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise UserError(f"init: {folder} can't be written: {error.strerror}") from None
    print(f"wrote {folder}/recipe.yaml, prompts.jsonl and rewards.py; next: coterie train {folder}/recipe.yaml")
