"""What is wrong with a recipe's settings, in words: the key, what was given, and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from coterie.errors import nearest
from coterie.reading import short
from coterie.recipe.kinds import Place
from coterie.recipe.methods import place_of

_KINDS = {"int_type": "a whole number", "int_parsing": "a whole number", "int_from_float": "a whole number",
          "float_type": "a number", "float_parsing": "a number", "string_type": "text", "finite_number": "a finite number",
          "bool_parsing": "true or false", "bool_type": "true or false", "tuple_type": "a list", "model_type": "a group of settings",
          "model_attributes_type": "a group of settings", "dict_type": "a group of settings"}  # fmt: skip


def explained(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """One sentence for each wrong setting among a recipe's values: its key, what was given, and what is allowed."""
    lines: list[str] = []
    problems = error.errors()
    for problem in problems[:_MAX_EXPLAINED]:
        place = [
            part[:80]
            for part in map(str, problem["loc"])
            if part not in _UNION_TAGS and not part.startswith("literal[")
        ]
        key, kind, given = ".".join(place), problem["type"], problem.get("input")
        if kind == "extra_forbidden":
            here = place_of(place, values)
            if here.owner is None:  # what it is meant to be is told as wrong
                continue
            line = f"{key}: there is no such setting; {_nearest_setting(place, here, values)}"
        elif kind == "value_error":
            line = f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
        elif kind == "missing":
            line = f"{key}: is missing, and has no default"
        elif kind == "literal_error":
            line = f"{key}: {short(given)} is not allowed; {_nearest_choice(key, place, values, given, problem['ctx']['expected'])}"
        elif kind in _KINDS:
            line = f"{key}: {short(given)} is not {_KINDS[kind]}"
        else:
            line = f"{key}: {short(given)} is not allowed; {problem['msg'][0].lower() + problem['msg'][1:]}"
        if line not in lines:
            lines.append(line)
    if len(problems) > _MAX_EXPLAINED:
        lines.append(f"and {len(problems) - _MAX_EXPLAINED:,} more")
    return _without_union_noise(lines)


_MAX_EXPLAINED = 10  # problems, in one error
_UNION_TAGS = {"ModelShape", "DatasetTask", "ReasoningTask", "str"}


def _without_union_noise(lines: list[str]) -> list[str]:
    """A setting of several kinds reports one error a kind; the most specific key tells the reader enough."""
    keys = [line.partition(":")[0] for line in lines]
    return [
        line for line, key in zip(lines, keys, strict=True) if not any(other.startswith(key + ".") for other in keys)
    ]


def _nearest_choice(key: str, place: Sequence[str], values: Mapping[str, Any], given: Any, expected: str) -> str:
    """The nearest of what is allowed; of what chooses between kinds, all of these."""
    choice, choices, own = place_of(place, values).choice, re.findall(r"'([^']*)'", expected), ""
    if choice is not None and choice.key == key:
        choices, own = list(choice.kinds), "; your own is file.py:function" if choice.own is not None else ""
    return nearest(given if isinstance(given, str) else short(given), choices) + own


def _nearest_setting(place: Sequence[str], here: Place, values: Mapping[str, Any]) -> str:
    """The nearest name at the same place, or the same name where it stands in another section."""
    name, recipe = place[-1], place_of(place[:1], values).fields
    elsewhere = [
        f"{section}.{name}"
        for section, field in recipe.items()
        if isinstance(field.annotation, type) and (other := place_of((section, name), values)).owner is not here.owner
        and name in other.fields
    ]  # fmt: skip
    if name in recipe and len(place) > 1:
        elsewhere.append(name)
    allowed = {name for name in here.fields if name != "made_with"}
    return f"did you mean {elsewhere[0]!r}?" if elsewhere else nearest(name, allowed)
