"""What `coterie init` writes: a small task of one's own that works as it is."""

from __future__ import annotations

import json
from pathlib import Path

from coterie.errors import UserError

_RECIPE = """\
# Your own model, data and reward. It works as it is: coterie train {folder}/recipe.yaml
preset: grpo

# A tiny fresh model that reads bytes, so that this runs anywhere in seconds. For a real one write its folder or hub id,
# and leave the tokenizer out:
#   model: Qwen/Qwen3-0.6B
model: {{type: qwen3, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,
        num_key_value_heads: 2, head_dim: 16, max_position_embeddings: 256, tie_word_embeddings: true}}
tokenizer: bytes

# One JSON object a line. `prompt` is the column with the prompt: text, or a list of chat messages. The other columns are
# handed to the rewards by name.
task: {{data: prompts.jsonl, prompt: prompt, heldout: 0.25}}

# file.py:function, or package.module:function
rewards:
  - {{function: "rewards.py:letters", weight: 1}}
  - {{function: "rewards.py:wanted_letter", weight: 1}}

loss: {{kl_weight: 0}} # nothing worth holding on to in a fresh model; leave this out for a real one
steps: 60
prompts_per_step: 6
group_size: 8
sampling: {{max_new_tokens: 16}}
optimiser: {{learning_rate: 3.0e-3, warmup_steps: 5, schedule: linear}} # a real model wants about 1.0e-6
evaluation: {{every: 20}}
"""

_REWARDS = '''\
"""Rewards: each gets a list with one entry per completion, and returns a number for each, or None to abstain.

`completions` are texts here, and lists of one message where the prompts are chats. The other arguments are columns of the
data; take those that you need by name, and the rest with **columns.
"""

import string


def letters(completions, **columns):
    """The share of a completion that is lower-case letters."""
    return [sum(c in string.ascii_lowercase for c in text) / max(1, len(text)) for text in completions]


def wanted_letter(completions, letter, **columns):
    """How much of a completion is the letter that its row asks for."""
    return [text.count(wanted) / max(1, len(text)) for text, wanted in zip(completions, letter)]
'''


def write_starter(folder: Path) -> None:
    """Write recipe.yaml, prompts.jsonl and rewards.py. Raises UserError where the folder is in use."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"init: {folder} is in use; name a folder that is new or empty")
    rows = [
        {"prompt": f"{verb} the letter {letter}: ", "letter": letter}
        for letter in "ae"
        for verb in ("Write", "Type", "Repeat", "Print", "Say", "Spell")
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(_RECIPE.format(folder=folder), encoding="utf-8")
        (folder / "rewards.py").write_text(_REWARDS, encoding="utf-8")
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise UserError(f"init: {folder} can't be written: {error.strerror}") from None
    print(f"wrote {folder}/recipe.yaml, prompts.jsonl and rewards.py; next: coterie train {folder}/recipe.yaml")
