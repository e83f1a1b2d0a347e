"""Recipes of an older version: what has been renamed since is read in any recipe, what was removed or is new in those of runs.

A setting that is new since then has its default, which does what the older version did; where a default changes what a run does, the value
that goes on as before belongs into `NEW`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coterie.errors import UserError

RENAMED = {
    "redraw": "dynamic_sampling",
    "value.trace": "value.gae_lambda",
}  # a section or a setting by its dotted name, and the name that it has now
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
    found, _ = with_new_names(found, renamed)
    for name, value in new.items():
        section, _, last = name.rpartition(".")
        (found.setdefault(section, {}) if section else found).setdefault(last, value)
    return {key: value for key, value in found.items() if value != {} or values.get(key) == {}}


def with_new_names(
    values: Mapping[str, Any], renamed: Mapping[str, str] = RENAMED
) -> tuple[dict[str, Any], dict[str, str]]:
    """A recipe's values under the names that they have now, and those among `renamed` that it calls as before.

    Raises UserError where a setting stands under both of its names.
    """
    found = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    met = {}
    for old, new in renamed.items():
        home, key = _place(found, old)
        if home is None or home.get(key) is None:
            continue
        section, _, last = new.rpartition(".")
        place = found.setdefault(section, {}) if section else found
        if place.get(last) is not None:
            raise UserError(f"{old}: is called {new} now, and both are given; leave {old} out")
        place[last], met[old] = home.pop(key), new
    return found, met


def new_name(name: str) -> str:
    """The dotted name that a setting has now."""
    section, dot, key = name.partition(".")
    return RENAMED.get(name) or f"{RENAMED.get(section, section)}{dot}{key}"


def moved(function: str) -> str:
    """The name that a reward function has now; any recipe may still call it as before."""
    home, colon, name = function.rpartition(":")
    return f"{MOVED.get(home, home)}{colon}{name}"


def _place(values: dict[str, Any], name: str) -> tuple[dict[str, Any] | None, str]:
    section, _, key = name.rpartition(".")
    home = values.get(section) if section else values
    return (home if isinstance(home, dict) else None), key
