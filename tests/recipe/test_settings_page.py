"""docs/settings.md lists every setting as it is. `python tests/recipe/test_settings_page.py` writes it anew."""

import dataclasses
import re
import sys
import types
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

import pytest
import transformers
from pydantic_core import PydanticUndefined

from coterie.recipe import Recipe, settings

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
HEAD = """# Settings

Every setting of a recipe, with what is allowed, its default, and its unit where it has one. A preset sets some of them
([which](objectives/README.md)); `coterie check` shows what a recipe comes to. This page is written from the settings themselves, by
`python tests/recipe/test_settings_page.py`, and a test keeps it so.
"""
BOUNDS = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}", "min_length": "at least {} long"}


def kind_of(annotation):
    """A type in words."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return kind_of(get_args(annotation)[0])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(kind_of(part) for part in get_args(annotation) if part is not type(None))
    if origin is tuple:
        return f"a list of {kind_of(get_args(annotation)[0])}"
    if isinstance(annotation, type) and issubclass(annotation, settings.Settings):
        return f"[settings](#{annotation.__name__.lower()})"
    return {int: "whole number", float: "number", str: "text", bool: "true or false"}.get(
        annotation, "settings by name"
    )


def bounds_of(annotation, metadata):
    """What a number may be, wherever that is said."""
    found = [*metadata]
    for part in (annotation, *get_args(annotation)):
        found += getattr(part, "__metadata__", ())
    flat = [inner for item in found for inner in (item, *getattr(item, "metadata", ()))]
    return [
        text.format(value)
        for name, text in BOUNDS.items()
        for item in flat
        if (value := getattr(item, name, None)) is not None
    ]


def cell(value):
    return str(value).replace("|", "\\|").replace("\n", " ")


def default_of(field):
    if field.default is PydanticUndefined:
        return "needed"
    if isinstance(field.default, settings.Settings):
        return "as there"
    if isinstance(field.default, tuple) and field.default:
        return f"`[{', '.join(field.default)}]`"
    if field.default in (None, (), {}, ""):
        return "none"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def about(annotation):
    """Of a section what it says of itself, in its first sentence."""
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    said = next((kind.__doc__ for kind in kinds if issubclass(kind, settings.Settings)), None) or ""
    return " ".join(said.split("\n\n")[0].split()).partition(". ")[0].rstrip(".")


def table(owner):
    rows = ["| setting | allowed | default | what it is |", "|---|---|---|---|"]
    for name, field in owner.model_fields.items():
        if name == "made_with":
            continue
        allowed = "; ".join([kind_of(field.annotation), *dict.fromkeys(bounds_of(field.annotation, field.metadata))])
        rows.append(
            f"| `{name}` | {cell(allowed)} | {cell(default_of(field))} | {cell(field.description or about(field.annotation))} |"
        )
    return "\n".join(rows)


def page():
    sections = [owner for owner in vars(settings).values()
                if isinstance(owner, type) and issubclass(owner, settings.Settings) and owner is not settings.Settings]  # fmt: skip
    parts = [HEAD, "## Recipe\nThe first level.\n", table(Recipe)]
    for owner in sections:
        parts += [f"\n## {owner.__name__}\n{' '.join((owner.__doc__ or '').split())}\n", table(owner)]
    return "\n".join(parts) + "\n"


def test_the_page_of_settings_is_what_the_settings_are():
    assert PAGE.read_text(encoding="utf-8") == page(), "write it anew: python tests/recipe/test_settings_page.py"


def test_the_page_gives_range_and_default():
    assert "| `clip_low` | number; above 0; at most 1 | `0.2` |" in page()
    assert "| `steps` | whole number; above 0; " in page()
    assert "| `evaluation` | text | none | rows to evaluate on" in page()


def test_every_argument_of_trl_s_grpo_has_its_line():
    trl = pytest.importorskip("trl")
    own = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    own -= {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    lines = (PAGE.parent / "from_trl.md").read_text(encoding="utf-8").splitlines()
    named = set(re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in lines if line.startswith("| `"))))
    assert own <= named, sorted(own - named)


def test_the_settings_that_the_page_for_trl_names_exist():
    text = (PAGE.parent / "from_trl.md").read_text(encoding="utf-8")
    for section, name in re.findall(r"`(\w+)\.(\w+)[`:]", text):
        owners = [field.annotation for key, field in Recipe.model_fields.items() if key == section]
        owners = [part for owner in owners for part in (owner, *get_args(owner)) if hasattr(part, "model_fields")]
        assert not owners or any(name in owner.model_fields for owner in owners), f"{section}.{name}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.exit(0)
