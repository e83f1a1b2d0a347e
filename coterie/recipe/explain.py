"""What is wrong with a recipe's settings, in words: the key, what was given, and what is allowed."""

from __future__ import annotations

import re

from pydantic import ValidationError

from coterie.errors import nearest
from coterie.reading import short
from coterie.recipe.settings import (
    KL,
    Advantage,
    Checkpoint,
    ColdStart,
    Correction,
    DatasetTask,
    DynamicSampling,
    Entropy,
    Evaluation,
    Limits,
    Lora,
    Loss,
    Optimiser,
    Overlong,
    Preference,
    Record,
    Reference,
    RewardSpec,
    Sampling,
    Settings,
    Value,
)

_KINDS = {"int_type": "a whole number", "int_parsing": "a whole number", "int_from_float": "a whole number",
          "float_type": "a number", "float_parsing": "a number", "string_type": "text", "finite_number": "a finite number",
          "bool_parsing": "true or false", "bool_type": "true or false", "tuple_type": "a list", "model_type": "a group of settings",
          "model_attributes_type": "a group of settings", "dict_type": "a group of settings"}  # fmt: skip


def explained(error: ValidationError, source: str, whole: type[Settings]) -> str:
    """One sentence for each wrong setting of `whole`: its key, what was given, and what is allowed."""
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
            owner = _settings_at(place[:-1], whole)
            allowed = {name for name in owner.model_fields if name != "made_with"}
            line = f"{key}: there is no such setting; {_nearest_setting(place[-1], owner, allowed, whole)}"
        elif kind == "value_error":
            line = f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
        elif kind == "missing":
            line = f"{key}: is missing, and has no default"
        elif kind == "literal_error":
            choices = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
            line = f"{key}: {short(given)} is not allowed; {nearest(given if isinstance(given, str) else short(given), choices)}"
        elif kind in _KINDS:
            line = f"{key}: {short(given)} is not {_KINDS[kind]}"
        else:
            line = f"{key}: {short(given)} is not allowed; {problem['msg'][0].lower() + problem['msg'][1:]}"
        if line not in lines:
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


def _settings_at(place: list[str], whole: type[Settings]) -> type[Settings]:
    """The class of settings that stands at a key."""
    homes: dict[str, type[Settings]] = {
        "task": DatasetTask, "rewards": RewardSpec, "cold_start": ColdStart, "sampling": Sampling, "advantage": Advantage,
        "loss": Loss, "kl": KL, "entropy": Entropy, "reference": Reference, "correction": Correction, "dynamic_sampling": DynamicSampling,
        "overlong": Overlong, "value": Value, "preference": Preference, "lora": Lora, "optimiser": Optimiser, "evaluation": Evaluation,
        "checkpoint": Checkpoint, "record": Record, "limits": Limits,
    }  # fmt: skip
    return homes.get(place[0], whole) if place else whole


def _nearest_setting(name: str, owner: type[Settings], allowed: set[str], whole: type[Settings]) -> str:
    """The nearest name at the same place, or the same name where it stands in another section."""
    elsewhere = [
        f"{section}.{name}"
        for section, field in whole.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings)
        and field.annotation is not owner and name in field.annotation.model_fields
    ]  # fmt: skip
    if name in whole.model_fields and owner is not whole:
        elsewhere.append(name)
    return f"did you mean {elsewhere[0]!r}?" if elsewhere else nearest(name, allowed)
