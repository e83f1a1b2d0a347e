"""Tokenizers of whole words, for bundled tasks with fresh models."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = "<end>"


def make_word_tokenizer(characters: Iterable[str], words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Tokens are these words, the longest first, then single characters; decoded, they stand together as they are.

    The chat template gives a message a line. It is what makes `coterie sample` and `apply_chat_template` write the prompt as
    training did.
    """
    vocabulary = list(dict.fromkeys(("<pad>", "<unknown>", END, "\n", *characters, *words)))
    pattern = "|".join(sorted((_escaped(word) for word in vocabulary[3:] if len(word) > 1), key=len, reverse=True))
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(f"{pattern}|[\\s\\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unknown>",
        eos_token=END,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    )
    return tokenizer


def _escaped(word: str) -> str:
    return re.sub(r"([^\w\s<>\"',:;=])", r"\\\1", word)
