"""Recipes that an older version wrote into a run: what has been renamed or removed since is read as what it is now.

A setting that is new since then has its default, which does what the older version did; where a default changes what a run does, the value
that goes on as before belongs into `NEW`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED: dict[str, str] = {}  # by dotted name, the one that it has now
REMOVED: dict[str, Any] = {}  # the value that does what is done without the setting; with another it is refused
NEW: dict[str, Any] = {}  # the value that does what was done before there was the setting
MOVED = {"coterie.rewards.steps": "coterie.tasks.equation_rewards"}  # by module, where its functions are now


def of_older(
    values: Mapping[str, Any],
    *,
    renamed: Mapping[str, str] = RENAMED,
    removed: Mapping[str, Any] = REMOVED,
    new: Mapping[str, Any] = NEW,
) -> dict[str, Any]:
    """A run's recipe as this version writes it. Names are of a setting at the top, or `section.name`."""
    found = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for name, value in removed.items():
        home, key = _place(found, name)
        if home is not None and key in home and home[key] == value:
            del home[key]
    for name, now in renamed.items():
        home, key = _place(found, name)
        if home is not None and key in home:
            section, _, last = now.rpartition(".")
            (found.setdefault(section, {}) if section else found).setdefault(last, home.pop(key))
    for name, value in new.items():
        section, _, last = name.rpartition(".")
        (found.setdefault(section, {}) if section else found).setdefault(last, value)
    return {key: value for key, value in found.items() if value != {} or values.get(key) == {}}


def moved(function: str) -> str:
    """The name that a reward function has now; any recipe may still call it as before."""
    home, colon, name = function.rpartition(":")
    return f"{MOVED.get(home, home)}{colon}{name}"


def _place(values: dict[str, Any], name: str) -> tuple[dict[str, Any] | None, str]:
    section, _, key = name.rpartition(".")
    home = values.get(section) if section else values
    return (home if isinstance(home, dict) else None), key
