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


def explained(error: ValidationError, source: str, values: Mapping[str, Any]) -> str:
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
            line = _unknown(key, place, values)
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
        if line and line not in lines:
            lines.append(line)
    if len(problems) > _MAX_EXPLAINED:
        lines.append(f"and {len(problems) - _MAX_EXPLAINED:,} more")
    return f"{source}: " + "\n".join(_without_union_noise(lines))


_MAX_EXPLAINED = 10  # problems, in one error
_UNION_TAGS = {"ModelShape", "DatasetTask", "str"}


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


def _unknown(key: str, place: Sequence[str], values: Mapping[str, Any]) -> str:
    """Of a setting that its section lacks: what shuts it out, or the nearest name. Nothing where it is open what the section is."""
    here = place_of(place, values)
    if here.owner is None:
        return ""
    if here.choice is not None and here.is_shut_out(place[-1]):
        given = here.choice.given(values if len(place) == 1 else values[place[0]])
        why = f"{here.choice.key} is {given}"
        return f"{key}: has no effect while {why}; change that, or leave this out"
    return f"{key}: there is no such setting; {_nearest_setting(place, here, values)}"


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
