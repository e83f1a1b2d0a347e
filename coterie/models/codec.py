"""Between text and tokens: prompts through the chat template, completions back to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from coterie.errors import UserError
from coterie.types import Messages


@dataclass(frozen=True)
class Codec:
    """A tokenizer, and the tokens that end a completion."""

    tokenizer: PreTrainedTokenizerBase
    end_tokens: tuple[int, ...]
    _pieces: dict[int, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, generation_config: Any = None) -> Codec:
        """The tokenizer's end token and those that the model's generation settings add."""
        extra = getattr(generation_config, "eos_token_id", None)
        listed = extra if isinstance(extra, list | tuple) else [extra]
        ends = {token for token in (tokenizer.eos_token_id, *listed) if isinstance(token, int)}
        if not ends:
            raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has no end token, so no completion could end")
        return cls(tokenizer, tuple(sorted(ends)))

    def encode_prompt(self, content: str | Messages) -> list[int]:
        """Text as it is; chat messages through the tokenizer's template, ready for the answer."""
        if isinstance(content, str):
            return list(self.tokenizer(content)["input_ids"])
        if not self.tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template, which chat messages need; give the prompt as text")
        try:
            return list(self.tokenizer.apply_chat_template(content, add_generation_prompt=True, return_dict=False))
        except Exception as error:  # a template is a program that came with the tokenizer
            raise UserError(f"the chat template refuses these messages: {error}") from None

    def encode_answer(self, text: str) -> list[int]:
        """A demonstration's answer and the end token."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return [*ids, self.end_tokens[0] if end is None else end]

    def encode_user(self, text: str) -> tuple[str | Messages, list[int]]:
        """What a user typed: as a chat message where the tokenizer has a template, else as it is."""
        content: str | Messages = [{"role": "user", "content": text}] if self.tokenizer.chat_template else text
        return content, self.encode_prompt(content)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Each token's own text, special tokens by name, for showing them side by side."""
        for token in set(tokens) - self._pieces.keys():
            self._pieces[token] = str(self.tokenizer.decode([token]))
        return [self._pieces[token] for token in tokens]
