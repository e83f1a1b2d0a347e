"""Recipes of an older version: what has been renamed since is read in any recipe, and in those that are written into runs.

A setting that is new since then has its default, which does what the older version did.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coterie.errors import UserError

# A section or a setting by its dotted name, and the name that it has now
RENAMED = {"dtype": "precision", "redraw": "dynamic_sampling", "value.trace": "value.gae_lambda"}
MOVED = {"coterie.rewards.steps": "coterie.tasks.equation_rewards"}  # by module, where its functions are now


def with_new_names(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A recipe's values under the names that they have now, and the old names among them with the new ones.

    Raises UserError where a setting stands under both of its names.
    """
    found = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    met = {}
    for old, new in RENAMED.items():
        section, _, key = old.rpartition(".")
        home = found.get(section) if section else found
        if not isinstance(home, dict) or home.get(key) is None:
            continue
        last = new.rpartition(".")[2]
        if home.get(last) is not None:
            raise UserError(f"{old}: is called {new} now, and both are given; leave {old} out")
        home[last], met[old] = home.pop(key), new
    return found, met


def new_name(name: str) -> str:
    """The dotted name that a setting has now."""
    section, dot, key = name.partition(".")
    return RENAMED.get(name) or f"{RENAMED.get(section, section)}{dot}{key}"


def moved(function: str) -> str:
    """The name that a reward function has now; any recipe may still call it as before."""
    home, colon, name = function.rpartition(":")
    return f"{MOVED.get(home, home)}{colon}{name}"
