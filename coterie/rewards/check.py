"""Whether a reward's function, its options and the data go together."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from coterie.errors import UserError, closest, nearest
from coterie.rewards.arguments import GIVEN, columns_of, origin_of
from coterie.rewards.base import Reward
from coterie.types import Prompt


def check_fits(rewards: Sequence[Reward], prompts: Sequence[Prompt]) -> None:
    """Whether the data have what the rewards need, before anything else is loaded. Warns of what only looks like a mistake.

    Raises UserError for a parameter that is no column, a row that lacks a column which a reward needs, and a `where` that no row meets.
    """
    for reward in rewards:
        check_options(reward)
        signature = reward.signature
        for words in _misspelt_options(reward):
            warnings.warn(words, stacklevel=2)
        concerned = [prompt for prompt in prompts if reward.applies_to(prompt.columns)]
        if prompts and not concerned:
            raise UserError(
                f"reward {reward.name}: where: {dict(reward.where)} is met by none of the {len(prompts)} rows, so it would never "
                f"speak; their columns are: {', '.join(columns_of(prompts))}"
            )
        check_arguments(reward, columns_of(concerned))
        lacking = [words for prompt in concerned if (words := signature.lacking(prompt))]
        if lacking:
            raise UserError(
                f"{lacking[0]}: reward {reward.name}; so it is with {len(lacking)} of {len(concerned)} rows. Give each the "
                "column, or the parameter a default, or name with `where` the rows that the reward is for"
            )
        for name in _looked_up(reward, columns_of(concerned)):
            without = [prompt for prompt in concerned if name not in prompt.columns]
            if without:
                warnings.warn(
                    f"reward {reward.name}: {len(without)} of {len(concerned)} rows have no column {name!r}, the first "
                    f"{origin_of(without[0])}; the function, which names it, gets None there",
                    stacklevel=2,
                )
        for name in signature.needs:
            empty = [prompt for prompt in concerned if prompt.columns[name] is None]
            if empty:
                warnings.warn(
                    f"reward {reward.name}: the column {name!r} is empty in {len(empty)} of {len(concerned)} rows, the first "
                    f"{origin_of(empty[0])}; the function gets None there",
                    stacklevel=2,
                )


def check_options(reward: Reward) -> None:
    """UserError where the function can't be called by names, or takes no option of this name."""
    signature = reward.signature
    if signature.unnamed:
        raise UserError(
            f"reward {reward.name}: the parameter {signature.unnamed[0]} takes no name, and arguments come by name"
        )
    unknown = [option for option in reward.options if option not in signature.names and not signature.takes_all]
    if unknown:
        raise UserError(
            f"reward {reward.name}: the function takes no {unknown[0]}, which is among its options; "
            f"{nearest(unknown[0], signature.names)}"
        )


def check_arguments(reward: Reward, columns: Iterable[str]) -> None:
    """As `check_options`, and UserError where an option is called like a column, or a parameter is no column that any row has."""
    check_options(reward)
    columns = set(columns) - set(GIVEN)
    clash = sorted({*columns, *GIVEN} & set(reward.options))
    if clash:
        raise UserError(f"reward {reward.name}: the option {clash[0]} is a column of the data too; rename one of them")
    missing = [name for name in reward.signature.needs if name not in columns]
    if missing:
        there = [*GIVEN, *sorted(columns)]
        close = closest(missing[0], there)
        raise UserError(
            f"reward {reward.name}: the function needs {', '.join(missing)}, which is no column of the data; "
            f"{f'did you mean {close!r}? ' if close else ''}there are: {', '.join(there)}"
        )


def _misspelt_options(reward: Reward) -> Iterator[str]:
    """What looks like a mistake: an option that only `**columns` takes, called nearly like a parameter without a value."""
    names = reward.signature.names
    free = [name for name in names if name not in reward.options and name not in GIVEN]
    for option in reward.options:
        close = closest(option, free, cutoff=0.75) if option not in names else None
        if close is not None:
            yield f"reward {reward.name}: no parameter takes the option {option!r}; did you mean {close!r}?"


def _looked_up(reward: Reward, columns: Iterable[str]) -> list[str]:
    """The columns that the function seems to take out of `**columns`: texts in its code, as the `"letter"` of `columns["letter"]`."""
    if not reward.signature.takes_all:
        return []
    texts = _texts_in(getattr(inspect.unwrap(reward.function), "__code__", None))
    return [column for column in columns if column not in reward.signature.names and column in texts]


def _texts_in(code: Any) -> set[str]:
    """The texts among a function's constants, and those of the functions inside it; none where it is not written in Python."""
    found: set[str] = set()
    for constant in getattr(code, "co_consts", ()):
        found |= {constant} if isinstance(constant, str) else _texts_in(constant)
    return found
