"""docs/settings.md gives each setting's range and default, and docs/from_trl.md names settings that exist."""

import dataclasses
import re
from pathlib import Path

import pytest

from coterie.recipe.kinds import Place
from coterie.recipe.methods import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_gives_range_and_default():
    page = PAGE.read_text(encoding="utf-8")
    assert "| `clip_low` | number; above 0; at most 1 | `0.2` |" in page
    assert "| `steps` | whole number; above 0; " in page
    assert "| `evaluation` | text | none | rows to evaluate on" in page


def rows(config):
    """What stands in the left column of the tables of one of TRL's classes."""
    text = (PAGE.parent / "from_trl.md").read_text(encoding="utf-8")
    tables = [table for table in text.split("\n\n") if table.startswith(f"| `{config}` |")]
    return re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for table in tables for line in table.splitlines()[2:]))


def test_every_argument_of_trl_s_grpo_has_its_line():
    trl = pytest.importorskip("trl")
    fields = [field.name for field in dataclasses.fields(trl.GRPOConfig)]
    assert sorted(rows("GRPOConfig")) == sorted(fields)


@pytest.mark.parametrize("config", ["DPOConfig", "SFTConfig"])
def test_what_trl_s_other_trainers_add_has_its_line(config):
    trl = pytest.importorskip("trl")
    fields = {field.name for field in dataclasses.fields(getattr(trl, config))}
    assert set(rows(config)) <= fields
    assert fields <= {*rows(config), *rows("GRPOConfig")}


def test_the_settings_that_the_page_for_trl_names_exist():
    text = (PAGE.parent / "from_trl.md").read_text(encoding="utf-8")
    for section, name in re.findall(r"`(\w+)\.(\w+)[`:]", text):
        if section in METHODS.fields():
            place = Place.of_field(METHODS.fields()[section], {})
            assert name in (place.choice.fields() if place.choice else place.fields), f"{section}.{name}"
