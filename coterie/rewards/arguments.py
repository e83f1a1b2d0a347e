"""What a reward function is called with: which columns it takes, whether the data has them, and copies that are its own.

Legend: B the completions of a call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from coterie.errors import UserError, closest, nearest
from coterie.types import Entry, Prompt

GIVEN = ("prompts", "completions", "completion_ids")  # beside the columns of the data
_FIXED = (str, int, float, bool, bytes, complex, type(None))
_NAMELESS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Signature:
    """The parameters of a reward function, beside the options that a recipe gives it.

    names: of its parameters. needs: those of them that only a column can fill, having no default. takes_all: it has `**columns`.
    texts: that stand in its code, as the `"letter"` of `columns["letter"]`.
    """

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any], name: str) -> None:
        """Raises UserError where it can't be called by names, or takes no such option."""
        self.reward, self.options = name, options
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # of a function written in C that does not say
            parameters = [inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)]
        unnamed = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
        if unnamed:
            raise UserError(f"reward {name}: the parameter {unnamed[0]} takes no name, and arguments come by name")
        self.texts = _texts_in(getattr(inspect.unwrap(function), "__code__", None))
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind not in _NAMELESS]
        self.names = [p.name for p in named]
        self.needs = [p.name for p in named if p.default is p.empty and p.name not in options and p.name not in GIVEN]
        unknown = [option for option in options if option not in self.names and not self.takes_all]
        if unknown:
            raise UserError(
                f"reward {name}: the function takes no {unknown[0]}, which is among its options; "
                f"{nearest(unknown[0], self.names)}"
            )

    def misspelt_options(self) -> Iterator[str]:
        """What looks like a mistake: an option that only `**columns` takes, called nearly like a parameter without a value."""
        free = [name for name in self.names if name not in self.options and name not in GIVEN]
        for option in self.options:
            close = closest(option, free, cutoff=0.75) if option not in self.names else None
            if close is not None:
                yield f"reward {self.reward}: no parameter takes the option {option!r}; did you mean {close!r}?"

    def check_columns(self, columns: Iterable[str]) -> None:
        """UserError where an option is called like a column, or a parameter is no column that any row has."""
        columns = set(columns) - set(GIVEN)
        clash = sorted({*columns, *GIVEN} & set(self.options))
        if clash:
            raise UserError(
                f"reward {self.reward}: the option {clash[0]} is a column of the data too; rename one of them"
            )
        missing = [name for name in self.needs if name not in columns]
        if missing:
            there = [*GIVEN, *sorted(columns)]
            close = closest(missing[0], there)
            raise UserError(
                f"reward {self.reward}: the function needs {', '.join(missing)}, which is no column of the data; "
                f"{f'did you mean {close!r}? ' if close else ''}there are: {', '.join(there)}"
            )

    def lacking(self, prompt: Prompt) -> str:
        """Which columns a row lacks that the function needs, in words; empty where it has them all."""
        missing = [name for name in self.needs if name not in prompt.columns]
        return f"has no column {', '.join(map(repr, missing))}, which the function needs" if missing else ""

    def reads(self, column: str) -> bool:
        """Whether it seems to take a column out of `**columns`."""
        return self.takes_all and column not in self.names and column in self.texts

    def accepted(self, columns: Iterable[str]) -> list[str]:
        """Of what there is, what the function takes."""
        return [name for name in (*GIVEN, *columns) if self.takes_all or name in self.names]


def _texts_in(code: Any) -> set[str]:
    """The texts among a function's constants, and those of the functions inside it; none where it is not written in Python."""
    found: set[str] = set()
    for constant in getattr(code, "co_consts", ()):
        found |= {constant} if isinstance(constant, str) else _texts_in(constant)
    return found


class Copies:
    """Makes the arguments of a call from prompts and completions, of which nothing that can be changed is shared.

    So a function may do what it likes with what it is given: other completions, calls and rewards get the data's own again. What can't be
    changed, texts and numbers, is not copied. How a value is copied is found out once for all the completions that have it.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, Callable[[], Any] | None]] = {}  # by the object, which is kept alive

    def of(self, value: Any) -> Any:
        if type(value) in _FIXED:
            return value
        if id(value) not in self._known:
            try:
                self._known[id(value)] = (value, _copier(value))
            except RecursionError:
                raise UserError("rewards: a column holds what is nested too deeply to be copied for them") from None
        copy = self._known[id(value)][1]
        return value if copy is None else copy()

    def arguments(self, entries: Sequence[Entry], names: Iterable[str]) -> dict[str, list[Any]]:
        """Each of these names with a list [B]. A column that a row lacks is None there."""
        made: dict[str, list[Any]] = {}
        for name in names:
            if name == "prompts":
                made[name] = [self.of(prompt.content) for prompt, _ in entries]
            elif name == "completions":
                made[name] = [_as_prompted(prompt, completion.text) for prompt, completion in entries]
            elif name == "completion_ids":
                made[name] = [list(completion.tokens) for _, completion in entries]
            else:
                made[name] = [self.of(prompt.columns.get(name)) for prompt, _ in entries]
        return made


def columns_of(prompts: Iterable[Prompt]) -> list[str]:
    """The columns that any of them has, without those whose names are taken."""
    return sorted(set().union(*(prompt.columns for prompt in prompts)) - set(GIVEN))


def _as_prompted(prompt: Prompt, text: str) -> Any:
    """A completion as text, or as a chat message where its prompt is a chat."""
    return text if isinstance(prompt.content, str) else [{"role": "assistant", "content": text}]


def _copier(value: Any, *, others: Callable[[Any], Any] | None = deepcopy) -> Callable[[], Any] | None:
    """What makes a copy that shares nothing that can be changed; None where the value itself can't be.

    others: what copies an object that is neither a plain container nor a plain value; None leaves those as they are.
    """
    kind = type(value)
    if kind in _FIXED:
        return None
    if kind is list or kind is dict:
        places = enumerate(value) if kind is list else value.items()
        inner = {place: copy for place, one in places if (copy := _copier(one, others=others)) is not None}
        return lambda: _filled(value.copy(), inner)
    if kind is tuple and all(_copier(one, others=others) is None for one in value):
        return None
    if others is None:
        return None
    return lambda: others(value)


def _filled(copy: Any, inner: Mapping[Any, Callable[[], Any]]) -> Any:
    for place, make in inner.items():
        copy[place] = make()
    return copy


def own_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A call's own copy of its options: lists and mappings, and no other objects, which may be models."""
    copy = _copier(dict(options), others=None)
    assert copy is not None
    made: dict[str, Any] = copy()
    return made
