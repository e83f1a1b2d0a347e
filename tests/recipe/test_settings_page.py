"""docs/settings.md gives each setting's range and default, and docs/from_trl.md names settings that exist."""

import dataclasses
import re
from pathlib import Path

import pytest
import transformers

from coterie.recipe.kinds import Place
from coterie.recipe.methods import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_gives_range_and_default():
    page = PAGE.read_text(encoding="utf-8")
    assert "| `clip_low` | number; above 0; at most 1 | `0.2` |" in page
    assert "| `steps` | whole number; above 0; " in page
    assert "| `evaluation` | text | none | rows to evaluate on" in page


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
        if section in METHODS.fields():
            place = Place.of_field(METHODS.fields()[section], {})
            assert name in (place.choice.fields() if place.choice else place.fields), f"{section}.{name}"
