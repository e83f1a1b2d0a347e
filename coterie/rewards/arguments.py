"""What a reward function is called with: the parameters that it has, filled from prompts and completions.

Legend: B the completions of a call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coterie.rewards.copies import Copies
from coterie.types import Entry, Prompt

GIVEN = ("prompts", "completions", "completion_ids")  # beside the columns of the data
_NAMELESS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Signature:
    """The parameters of a reward function, beside the options that a recipe gives it.

    names: of its parameters. needs: those of them that only a column can fill, having no default. takes_all: it has `**columns`.
    unnamed: those that take no name and have no default.
    """

    names: list[str]
    needs: list[str]
    takes_all: bool
    unnamed: list[str]

    @classmethod
    def of(cls, function: Callable[..., Any], options: Mapping[str, Any]) -> Signature:
        """As the function says; one that does not, as some in C, takes every column."""
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):
            parameters = [inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)]
        named = [p for p in parameters if p.kind not in _NAMELESS]
        return cls(
            names=[p.name for p in named],
            needs=[p.name for p in named if p.default is p.empty and p.name not in options and p.name not in GIVEN],
            takes_all=any(p.kind is p.VAR_KEYWORD for p in parameters),
            unnamed=[p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty],
        )

    def accepted(self, columns: Iterable[str]) -> list[str]:
        """Of what there is, what the function takes."""
        return [name for name in (*GIVEN, *columns) if self.takes_all or name in self.names]

    def lacking(self, prompt: Prompt) -> str:
        """Which columns a prompt lacks that the function needs, in words; empty where it has them all."""
        missing = [name for name in self.needs if name not in prompt.columns]
        words = f"has no column {', '.join(map(repr, missing))}, which the function needs"
        return f"{origin_of(prompt)}: {words}" if missing else ""


def origin_of(prompt: Prompt) -> str:
    """Where a prompt comes from, or what it says."""
    return prompt.origin or f"the prompt {prompt.text!r:.60}"


def columns_of(prompts: Iterable[Prompt]) -> list[str]:
    """The columns that any of them has, without those whose names are taken."""
    return sorted(set().union(*(prompt.columns for prompt in prompts)) - set(GIVEN))


def arguments_of(entries: Sequence[Entry], names: Iterable[str], copies: Copies) -> dict[str, list[Any]]:
    """Each of these names with a list [B], the call's own to change. A column that a row lacks is None there."""
    made: dict[str, list[Any]] = {}
    for name in names:
        if name == "prompts":
            made[name] = [copies.of(prompt.content) for prompt, _ in entries]
        elif name == "completions":
            made[name] = [_as_prompted(prompt, completion.text) for prompt, completion in entries]
        elif name == "completion_ids":
            made[name] = [list(completion.tokens) for _, completion in entries]
        else:
            made[name] = [copies.of(prompt.columns.get(name)) for prompt, _ in entries]
    return made


def _as_prompted(prompt: Prompt, text: str) -> Any:
    """A completion as text, or as a chat message where its prompt is a chat."""
    return text if isinstance(prompt.content, str) else [{"role": "assistant", "content": text}]
