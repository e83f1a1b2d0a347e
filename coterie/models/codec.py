"""Between text and tokens: what a turn is, from its prompt to the token that ends it, and completions back to text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from coterie.errors import UserError
from coterie.models.template import Chat, ChatTemplate
from coterie.types import Messages

Answer = str | Mapping[str, Any]  # a text, or a chat message


@dataclass(frozen=True)
class Codec:
    """A tokenizer with its chat template, and the tokens that end a completion.

    turn_end: the one of them that an answer ends with where nothing else has ended it. vocabulary_size: how many tokens the model
    knows, where that is known.
    """

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    end_tokens: tuple[int, ...]
    turn_end: int
    vocabulary_size: int | None = None

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *stated: int | Sequence[int] | None,
        chat: Chat | None = None,
        vocabulary_size: int | None = None,
    ) -> Codec:
        """A turn ends with any of the tokens that the tokenizer and its chat template end one with, and with those that a
        model's files state. Raises UserError where there is none, or none that the model knows."""
        template = ChatTemplate(tokenizer, chat or Chat())
        listed = [
            token
            for ids in (tokenizer.eos_token_id, *stated)
            for token in (ids if isinstance(ids, list | tuple) else [ids])
        ]
        known = list(dict.fromkeys(token for token in listed if isinstance(token, int) and token >= 0))
        of_turn = _end_of_turn(tokenizer, template, known) if template.exists else None
        ends = {*known, *([of_turn] if of_turn is not None else [])}
        if not ends:
            raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has no end token, so no completion could end")
        if vocabulary_size is not None and min(ends) >= vocabulary_size:
            raise UserError(
                f"the end tokens of {tokenizer.name_or_path!r}, {sorted(ends)}, lie outside of the model's {vocabulary_size} tokens"
            )
        turn_end = of_turn if of_turn is not None else known[0]
        return cls(tokenizer, template, tuple(sorted(ends)), turn_end, vocabulary_size)

    def encode_prompt(self, content: str | Messages) -> list[int]:
        """Text as it is, after the tokenizer's beginning; chat messages through its template, ready for the answer.

        A chat that ends in the assistant's message is continued. Raises UserError for what has no tokens, or some that the model
        does not know.
        """
        ids = self._encode_text(content) if isinstance(content, str) else self._encode([self._opened(content)])[0]
        if not ids:
            raise UserError(f"the prompt {content!r:.60} has no tokens")
        return ids

    def encode_rows(self, content: str | Messages, *answers: Answer) -> tuple[list[int], ...]:
        """A prompt, and each of its answers to the end of the turn, as they are learned from: prompt and answer together are what the
        template renders, to the token. The prompt is shorter than one that is sampled from where the template opens an answer
        otherwise than it renders one."""
        if isinstance(content, str):
            prompt = self.encode_prompt(content)
            wholes = [self._continued(content, prompt, _text_of(answer)) for answer in answers]
        else:
            opened, end = self._opened(content), self.tokenizer.convert_ids_to_tokens(self.turn_end)
            closed = [self.template.closed(content, answer, end) for answer in answers]
            prompt, *wholes = self._encode([opened, *closed])
        shared = min(_num_shared(prompt, whole) for whole in wholes)
        if not shared:
            raise UserError(f"{content!r:.60} is rendered in another way with an answer than without")
        return prompt[:shared], *(self._ended(whole[shared:], isinstance(content, str)) for whole in wholes)

    def encode_answer(self, text: str) -> list[int]:
        """A text as a completion that ended: its tokens, and the end token."""
        return self._ended(self._encode([text])[0], plain=False)

    def encode_user(self, text: str) -> tuple[str | Messages, list[int]]:
        """A user's text as a prompt: a chat message where the tokenizer has a template, else as it is. With its tokens."""
        content: str | Messages = [{"role": "user", "content": text}] if self.template.exists else text
        return content, self.encode_prompt(content)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text as it was written, special tokens by name, without what ends a turn."""
        return self.as_read([token for token in tokens if token not in self.end_tokens])

    def as_read(self, tokens: Sequence[int]) -> str:
        """All of the text that these tokens stand for, every special token by name."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Each token's own text, special tokens by name, for showing them side by side."""
        for token in set(tokens) - self._pieces.keys():
            self._pieces[token] = str(self.tokenizer.decode([token]))
        return [self._pieces[token] for token in tokens]

    @cached_property
    def _pieces(self) -> dict[int, str]:
        """The texts of tokens that were asked for."""
        return {}

    def save(self, folder: Path, model: PreTrainedModel) -> None:
        """The model in Hugging Face format with its tokenizer and chat template. What it generates ends where completions ended."""
        settings = getattr(model, "generation_config", None)
        if settings is not None:
            ends = {"eos_token_id": list(self.end_tokens), "pad_token_id": self.tokenizer.pad_token_id}
            ends = {name: value for name, value in ends.items() if value is not None}
            settings.update(**ends)
            try:
                settings.validate(strict=True)
            except ValueError:  # some models come with settings that transformers itself refuses to save
                model.generation_config = GenerationConfig(bos_token_id=settings.bos_token_id, **ends)
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def check_chats(self, what: str) -> None:
        """Raises UserError where the tokenizer has no chat template, which `what` needs: a base model has none."""
        if not self.template.exists:
            raise UserError(
                f"{what}: the tokenizer {self.tokenizer.name_or_path!r} has no chat template, as of a base model; give the prompts as "
                "text, or name the tokenizer of a chat model with the same vocabulary: tokenizer: ..."
            )

    def _opened(self, messages: Messages) -> str:
        self.check_chats("a list of chat messages")
        return self.template.opened(messages)

    def _continued(self, content: str, prompt: list[int], answer: str) -> list[int]:
        """A text and its answer: as one text where that begins with the prompt's own tokens, else one after the other."""
        together = self._encode_text(content + answer)
        return together if together[: len(prompt)] == prompt else [*prompt, *self._encode([answer])[0]]

    def _ended(self, answer: list[int], plain: bool) -> list[int]:
        """The answer with an end token, unless it has one: after plain text the tokenizer's own, where there is one."""
        if answer and answer[-1] in self.end_tokens:
            return answer
        own = self.tokenizer.eos_token_id
        return [*answer, own if plain and isinstance(own, int) else self.turn_end]

    def _encode_text(self, text: str) -> list[int]:
        """The text's tokens behind the tokenizer's beginning, once, and without what it may put at the end."""
        ids = self._encode([text])[0]
        return ids if ids[: len(self._beginning)] == self._beginning else [*self._beginning, *ids]

    @cached_property
    def _beginning(self) -> list[int]:
        """The tokens that the tokenizer puts before a text: one, several, or none."""
        found = self._before("a")
        if found is None:  # a small vocabulary may have no a
            words = (
                word for word in sorted(self.tokenizer.get_vocab()) if word not in self.tokenizer.all_special_tokens
            )
            found = next((start for start in map(self._before, islice(words, 100)) if start is not None), [])
        return found

    def _before(self, text: str) -> list[int] | None:
        """The tokens that the tokenizer puts before this text; None where it can't encode it."""
        try:
            bare, whole = (list(self.tokenizer(text, add_special_tokens=added)["input_ids"]) for added in (False, True))
        except Exception:  # broad: what a tokenizer can't encode it says with a bare Exception
            return None
        places = (place for place in range(len(whole)) if bare and whole[place : place + len(bare)] == bare)
        return next((whole[:place] for place in places), None)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text, and nothing around them."""
        try:
            rows = [list(row) for row in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        except BaseException as error:  # a regular expression that explodes is a panic, which is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"the tokenizer {self.tokenizer.name_or_path!r} fails on this text: {error}") from None
        for unknown in (max(row, default=0) for row in rows):
            if self.vocabulary_size is not None and unknown >= self.vocabulary_size:
                raise UserError(
                    f"token {unknown}, {self.pieces([unknown])[0]!r}, is none of the model's {self.vocabulary_size} tokens: the "
                    f"tokenizer {self.tokenizer.name_or_path!r} is another model's"
                )
        return rows


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, known: Sequence[int]) -> int | None:
    """The token that the template ends an answer's turn with; None where it writes none there.

    It is looked for first in what stands after an answer whatever follows; then in what stands after the last one; then in
    what begins the turn that follows, where a template writes nothing else between two turns.
    """
    last, amid = (_marks(tokenizer, tail, known) for tail in template.tails)
    for tail, which in ((last[: _num_shared(last, amid)], -1), (last, 0), (amid, 0)):
        if tail:
            return next((token for token in tail if token in known), tail[which])
    return None


def _marks(tokenizer: PreTrainedTokenizerBase, text: str, known: Sequence[int]) -> list[int]:
    """The tokens in a text that were added to the vocabulary, or are in it and written like a mark: <...> or [...]."""
    others = {None, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id} - {*known}
    names = {entry.content for entry in tokenizer.added_tokens_decoder.values() if entry.content.strip()}
    names |= {name for name in map(tokenizer.convert_ids_to_tokens, known) if isinstance(name, str)}
    patterns = [*map(re.escape, sorted(names, key=len, reverse=True)), r"<[^<>\s]+>", r"\[[^\[\]\s]+\]"]
    found = map(tokenizer.convert_tokens_to_ids, re.findall("|".join(patterns), text))
    return [token for token in found if token not in others]


def _num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens that two sequences begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _text_of(answer: Answer) -> str:
    return answer if isinstance(answer, str) else str(answer["content"])
