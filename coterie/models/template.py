"""A chat template: what it writes before, around and after messages, as text.

A template is a program that came with a tokenizer. It may refuse messages, leave some of them out, or never end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from coterie.deadline import cpu_limit
from coterie.errors import UserError, first_line
from coterie.recipe import Recipe
from coterie.types import Messages

_SECONDS = 10.0  # of computing that a template may take for one chat
_MAX_TEXT = 4_000_000  # characters that it may make of one: far more than a row's prompt, answer and tools together
_MARK = "Aardvark"  # stands for a text, to see what is written around it
_QUESTION = {"role": "user", "content": "Zebra?"}
_ANSWER = {"role": "assistant", "content": _MARK}
_DATES = "coterie_dates"  # the variable that holds a day's dates, by format


class TemplateRefusedError(UserError):
    """The template raised on these messages, or rendered nothing."""


class TemplateEndlessError(UserError):
    """The template did not come to an end, or made far too much of a chat."""


@dataclass(frozen=True)
class Chat:
    """A recipe's settings for chats. system: the system message of those that have none. variables: what the template is given beside
    the messages. day: an ISO date, which is today for the template, so that a resumed run reads what it read before."""

    system: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    day: str | None = None

    @classmethod
    def of(cls, recipe: Recipe | None) -> Chat:
        if recipe is None:
            return cls()
        made_with = recipe.made_with or {}
        return cls(recipe.system_prompt, recipe.chat_template_kwargs, made_with.get("day"))


class ChatTemplate:
    """A tokenizer's template with a recipe's settings. Raises UserError for settings that the template does nothing with."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: Chat) -> None:
        self._tokenizer, self._chat = tokenizer, chat
        self._name = f"the chat template of {tokenizer.name_or_path}" if tokenizer.name_or_path else "the chat template"
        self._source = self._read() if tokenizer.chat_template else None
        self._variables = dict(chat.variables)
        self._check_settings()
        if self._source is not None and "strftime_now" in self._source:
            self._source = self._with_day(self._source)

    @property
    def exists(self) -> bool:
        return self._source is not None

    def opened(self, messages: Messages) -> str:
        """The text that is read before an answer is written. A last message of the assistant's is left open, and the answer continues it."""
        if not self._speaks:
            raise UserError(f"{self._name} leaves out what messages say, where they are texts")
        continues = messages[-1]["role"] == "assistant"
        return self._render(
            self._with_system(messages), add_generation_prompt=not continues, continue_final_message=continues
        )

    def closed(self, messages: Messages, answer: str | Mapping[str, Any], end: str | None) -> str:
        """The chat with an answer in its place, up to the end of the answer's turn: `end`, where the template writes it. What stands
        between two turns is left out."""
        message = {"role": "assistant", **(answer if isinstance(answer, Mapping) else {"content": answer})}
        written = message["content"].strip()
        if messages[-1]["role"] == "assistant":  # the answer continues it
            message = {**messages[-1], **message, "content": messages[-1]["content"] + message["content"]}
            messages = messages[:-1]
        text = self._render([*self._with_system(messages), message])
        last, amid = self.tails
        if not text.endswith(last):  # the template writes something else here than it did when it was tried
            after = text.rfind(written) + len(written) if written in text else len(text)
            place = text.find(end, after) if end else -1
            return text[: place + len(end or "")] if place >= 0 else text
        return text[: len(text) - len(last)] + _of_turn(last, amid, end)

    def keeps(self, messages: Messages, answer: str | Mapping[str, Any]) -> bool:
        """Whether all of an answer's text is in the rendered chat, white space aside. Some templates leave thoughts out."""
        text = answer if isinstance(answer, str) else answer["content"]
        return "".join(text.split()) in "".join(self.closed(messages, answer, None).split())

    @cached_property
    def _speaks(self) -> bool:
        """Whether the template writes what messages say. Those for pictures may take a message's parts, and nothing else."""
        try:
            return _QUESTION["content"] in self._render([_QUESTION])
        except TemplateRefusedError:
            return True  # not to be told from this chat

    @cached_property
    def tails(self) -> tuple[str, str]:
        """The texts after an answer that ends a chat, and after one that a question follows."""
        for before in ([], [{"role": "system", "content": "Yak."}]):
            chat: Messages = [*before, _QUESTION, _ANSWER]
            try:
                last = self._render(chat)
                amid = self._render([*chat, _QUESTION])
            except TemplateRefusedError:
                continue
            if _MARK in last and _MARK in amid:
                return last.rpartition(_MARK)[2], amid.rpartition(_MARK)[2]
        return "", ""

    def _check_settings(self) -> None:
        """Raises UserError for a setting of the recipe's that the template does nothing with, and for a template that draws lots."""
        chat, source = self._chat, self._source or ""
        if re.search(r"\|\s*random\b|\blipsum\b", source):
            raise UserError(f"{self._name} asks for something random, so that no prompt would be the same twice")
        given = [
            *(["system_prompt"] if chat.system else []),
            *(f"chat_template_kwargs.{name}" for name in chat.variables),
        ]
        if given and not source:
            raise UserError(
                f"{given[0]}: has no effect: the tokenizer {self._tokenizer.name_or_path!r} has no chat template"
            )
        for name in chat.variables:
            if not re.search(rf"\b{re.escape(name)}\b", source):
                raise UserError(f"chat_template_kwargs.{name}: has no effect: {self._name} does not ask for {name!r}")
        try:
            if chat.system and chat.system.strip() not in self._render([self._system, _QUESTION]):
                raise UserError(f"system_prompt: has no effect: {self._name} leaves a system message out")
        except TemplateRefusedError as error:
            raise UserError(f"system_prompt: {error}") from None

    @property
    def _system(self) -> dict[str, str]:
        return {"role": "system", "content": self._chat.system or ""}

    def _with_system(self, messages: Messages) -> Messages:
        """The messages with the recipe's system message, where the chat begins with none."""
        if self._chat.system is None or messages[0]["role"] in ("system", "developer"):
            return messages
        return [self._system, *messages]

    def _render(self, messages: Messages, **how: bool) -> str:
        try:
            with cpu_limit(_SECONDS):
                text = self._tokenizer.apply_chat_template(
                    messages, chat_template=self._source, tokenize=False, **how, **self._variables
                )
        except TimeoutError:
            raise TemplateEndlessError(f"{self._name} does not come to an end: it was given {_SECONDS:g} s") from None
        except Exception as error:  # a template is a program that came with the tokenizer
            raise TemplateRefusedError(f"{self._name} refuses these messages: {first_line(error):.300}") from None
        if len(text) > _MAX_TEXT:
            raise TemplateEndlessError(
                f"{self._name} makes {len(text):,} characters of a chat, and {_MAX_TEXT:,} are allowed"
            )
        if not text:
            raise TemplateRefusedError(f"{self._name} renders nothing for these messages")
        return str(text)

    def _read(self) -> str:
        """The source, of several templates the one that chats like these use. UserError for a name that can't be a file's, which
        each gets when the tokenizer is saved."""
        every = self._tokenizer.chat_template
        for name in every if isinstance(every, dict) else ():
            if not re.fullmatch(r"\w[\w.-]{0,99}", name):
                raise UserError(
                    f"{self._name}: {name!r:.80} is no name of a template: letters, digits, _, - and . are allowed"
                )
        try:
            return str(self._tokenizer.get_chat_template(tools=self._chat.variables.get("tools")))
        except ValueError as error:
            raise UserError(f"{self._name}: {error}") from None

    def _with_day(self, source: str) -> str:
        """Let the template find the same date whenever it asks, where the formats that it asks for can be read off."""
        formats = re.findall(r"strftime_now\(\s*([\"'])(.*?)\1\s*\)", source)
        if len(formats) < source.count("strftime_now("):
            return source
        day = date.fromisoformat(self._chat.day) if self._chat.day else date.today()
        self._variables[_DATES] = {written: day.strftime(written) for _, written in formats}
        return f"{{% macro strftime_now(format) %}}{{{{ {_DATES}[format] }}}}{{% endmacro +%}}{source}"


def _of_turn(last: str, amid: str, end: str | None) -> str:
    """The part of the text after a chat's last answer that belongs to the answer's turn: up to the end token, or without one what
    stands there in every chat."""
    if end and end in last:
        return last[: last.find(end) + len(end)]
    if amid.startswith(last):
        return last
    space = last[: len(last) - len(last.lstrip())]
    return space if amid.startswith(space) else ""
