"""How settings exclude one another: a choice between kinds of a section, and settings that do nothing while others are as they are.

What a chosen kind lacks can't be written into it. Both are said where a section or a setting is defined, and the refusal follows from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import core_schema


class Settings(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class OneOf:
    """On a section: which kind of settings it is, by one of them. The first kind is meant where nothing is said.

    key: the dotted name of the setting that chooses; in each kind it is a `Literal`. own: the kind for a function of the user's.
    """

    def __init__(self, key: str, *kinds: type[Settings], own: type[Settings] | None = None) -> None:
        self.key, self.own, self._name = key, own, key.rpartition(".")[2]
        self.kinds = {get_args(kind.model_fields[self._name].annotation)[0]: kind for kind in kinds}

    def given(self, values: Any) -> Any:
        """What the values say that they are; the first kind's name where they say nothing."""
        said = values.get(self._name) if isinstance(values, Mapping) else None
        return next(iter(self.kinds)) if said is None else said

    def said(self, values: Any) -> str:
        """In words, what they are."""
        return f"{self.key} is {self.given(values)}"

    def chosen(self, values: Any) -> type[Settings] | None:
        """The kind that the values are meant to be; None where there is none of that name."""
        given = self.given(values)
        if self.own is not None and isinstance(given, str) and ":" in given:
            return self.own
        return self.kinds.get(given) if isinstance(given, str) else None

    def fields(self) -> dict[str, FieldInfo]:
        """The settings of any kind."""
        kinds = [*self.kinds.values(), *([self.own] if self.own is not None else [])]
        return {name: field for kind in kinds for name, field in kind.model_fields.items()}

    def read(self, values: Any) -> Any:
        """The settings, checked as what they are meant to be."""
        kind = self.chosen(values) or next(iter(self.kinds.values()))
        return values if isinstance(values, Settings) else kind.model_validate(values)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.read)


SET = object()  # any value but none


class Idle:
    """On a section or a setting: it does nothing while all of these settings, by dotted names, have these values, or one of a tuple."""

    def __init__(self, *conditions: tuple[str, Any]) -> None:
        self.conditions = [(name, of if isinstance(of, tuple) and of else (of,)) for name, of in conditions]

    def why(self, recipe: Settings) -> str:
        """In words, by the first condition; empty where it acts."""
        for name, wanted in self.conditions:
            now = reduce(getattr, name.split("."), recipe)
            if now is None if SET in wanted else now not in wanted:
                return ""
        name, wanted = self.conditions[0]
        now = reduce(getattr, name.split("."), recipe)
        if now == ():
            return f"there are no {name}"
        words = "set" if SET in wanted else "not set" if now is None else f"{now:g}" if isinstance(now, float) else now
        return f"{name} is {words}"


def idle_settings(recipe: Settings) -> dict[str, str]:
    """Sections, and settings by their dotted names, that do nothing in a recipe, and why."""
    found = {}
    for section, field in type(recipe).model_fields.items():
        inner = getattr(recipe, section)
        if why := _why_idle(field, recipe):
            found[section] = why
        for name, its in type(inner).model_fields.items() if isinstance(inner, Settings) and not why else ():
            if why_inside := _why_idle(its, recipe):
                found[f"{section}.{name}"] = why_inside
    return found


def _why_idle(field: FieldInfo, recipe: Settings) -> str:
    return next((why for mark in field.metadata if isinstance(mark, Idle) and (why := mark.why(recipe))), "")


@dataclass(frozen=True)
class Place:
    """Where a setting stands. owner: the class of settings; None where there is none. choice: what the owner is one kind of."""

    owner: type[Settings] | None
    choice: OneOf | None = None

    @classmethod
    def of_field(cls, field: FieldInfo | None, values: Any) -> Place:
        """The settings inside of a section that has these values."""
        if field is None:
            return cls(None)
        choice = next((mark for mark in field.metadata if isinstance(mark, OneOf)), None)
        if choice is not None:
            return cls(choice.chosen(values), choice)
        kinds = [kind for kind in _parts(field.annotation) if issubclass(kind, Settings)]
        given = values.keys() if isinstance(values, Mapping) else set()
        meant = (kind for kind in kinds if given & {name for name, of in kind.model_fields.items() if of.is_required()})
        return cls(next(meant, kinds[0] if kinds else None))

    @property
    def fields(self) -> Mapping[str, FieldInfo]:
        return self.owner.model_fields if self.owner is not None else {}

    def is_shut_out(self, name: str) -> bool:
        """Whether other kinds have a setting of that name, and the chosen one has not."""
        return (
            self.choice is not None
            and self.owner is not None
            and name not in self.fields
            and name in self.choice.fields()
        )


def _parts(annotation: Any) -> Iterator[type]:
    """The classes that a type is made of."""
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for part in get_args(annotation):
        yield from _parts(part)
