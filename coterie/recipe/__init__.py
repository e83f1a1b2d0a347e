"""Recipes: what a run is, as a short YAML file, checked strictly before anything costs time.

A recipe names a preset and says only what differs from it. Nothing here imports torch, so a wrong recipe is refused at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from coterie.errors import UserError, nearest
from coterie.reading import MAX_DEPTH, read_yaml, read_yaml_file, short
from coterie.recipe.explain import explained
from coterie.recipe.kinds import Place, idle_settings
from coterie.recipe.methods import DPO, GRPO, METHODS, PPO, SFT, Recipe, RewardModel, Sampled, taken_out
from coterie.recipe.older import with_new_names
from coterie.recipe.paths import absolute_paths, plain_rewards
from coterie.recipe.presets import PRESETS
from coterie.redact import keys_in

__all__ = ["DPO", "GRPO", "PPO", "SFT", "Recipe", "RewardModel", "Sampled", "find_recipe", "load_recipe", "make_recipe"]


def find_recipe(name: str) -> Path:
    """The file behind a path or the name of a bundled recipe. Raises UserError where there is none."""
    path = Path(name)
    if path.is_file():
        return path
    package = Path(__file__).resolve().parents[1]
    bundled = {
        file.stem: file for home in (package / "recipes", package.parent / "recipes") for file in home.glob("*.yaml")
    }
    stem = path.name.removesuffix(".yaml")
    is_bundled_name = path.parent == Path(".") or path.parent == Path("recipes")
    if is_bundled_name and stem in bundled:
        return bundled[stem]
    if path.is_dir():
        raise UserError(f"recipe {name!r} is a folder; give a .yaml file or one of: {', '.join(sorted(bundled))}")
    raise UserError(f"recipe {name!r} was not found as a file or among the bundled ones; {nearest(stem, bundled)}")


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override (`section.key=value`), fill in from the preset, and check. Raises UserError that names the key."""
    path = find_recipe(name)
    values = read_yaml_file(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of settings, not {type(values).__name__}")
    of_a_run = "made_with" in values
    if of_a_run:
        values, _ = with_new_names(values)
    meant: dict[str, Any] = {}
    for override in overrides:
        _override(values, override)
        if not override.startswith("rewards."):
            _override(meant, override)
    folder = path.resolve().parent
    return make_recipe(values, source=str(path), folder=folder, meant=meant if of_a_run else None)


def make_recipe(
    values: Mapping[str, Any],
    *,
    source: str = "recipe",
    folder: Path | None = None,
    meant: Mapping[str, Any] | None = None,
) -> Recipe:
    """A checked recipe from plain values.

    folder: what its relative paths start from. meant: those of the values that somebody asks for here, where not all of them; the others
    give way where they have no effect, as a run's own do, which names every setting.
    """
    folder = folder or Path.cwd()
    try:
        with_key = next(keys_in(values), None)
    except RecursionError:  # YAML can write what holds itself
        raise UserError(f"{source}: is nested too deeply for a recipe") from None
    if with_key is not None:
        raise UserError(
            f"{source}: {with_key}: holds a key or a password, and a recipe is copied into the run and its report; put it into an "
            "environment variable, and let your code read it there"
        )
    try:
        values, renamed = with_new_names(values)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    for old, new in renamed.items():
        warnings.warn(f"{source}: {old} is called {new} now; the old name is still read", stacklevel=2)
    given = {key: value for key, value in values.items() if value is not None}  # an empty section is no section
    preset = given.get("preset", "grpo")
    if isinstance(preset, str) and preset not in PRESETS:
        raise UserError(f"{source}: preset: there is no {short(preset)}; {nearest(preset, PRESETS)}")
    merged = _filled_in(given, PRESETS[preset] if isinstance(preset, str) else {})
    plain_rewards(merged, folder)
    absolute_paths(merged, folder)
    meant = given if meant is None else meant
    lines = [line for name, why in taken_out(merged).items() for line in _without_effect(meant, name, why)]
    try:
        recipe: Recipe = METHODS.read(merged)
    except ValidationError as error:
        lines += explained(error, merged)
    else:
        lines += [line for name, why in idle_settings(recipe).items() for line in _without_effect(meant, name, why)]
    if lines:
        raise UserError(f"{source}: " + "\n".join(lines))
    return recipe


def _filled_in(given: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    """What is given over a preset's values, of which those give way that the chosen method, or kind of section, does not have."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in given.items()}
    merged = {**{key: value for key, value in preset.items() if not isinstance(value, dict)}, **merged}
    method = METHODS.chosen(merged)
    for section, values in preset.items():
        own = given.get(section, {})
        if (
            method is None
            or section not in method.model_fields
            or not isinstance(values, dict)
            or not isinstance(own, dict)
        ):
            continue
        place = Place.of_field(method.model_fields[section], {**values, **own})
        merged[section] = {**{key: value for key, value in values.items() if key in place.fields}, **own}
    return merged


def _without_effect(given: Mapping[str, Any], name: str, why: str) -> list[str]:
    """A line for a setting that does nothing, where it is given; of a section that another setting than the method idles, for each in it."""
    section, _, key = name.rpartition(".")
    home = given.get(section) if section else given
    if not isinstance(home, dict) or key not in home:
        return []
    inside = home[key] if "." in why and not section and isinstance(home[key], dict) else {}
    names = [f"{name}.{inner}" for inner in inside] or [name]
    return [f"{one}: has no effect while {why}; change that, or leave this out" for one in names]


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        raise UserError(f"--set {short(override)}: write section.key=value, as in --set loss.clip_high=0.3")
    try:
        value = read_yaml(text)
    except UserError as error:
        raise UserError(f"--set {short(override)}: {error}; quote the value if it is text") from None
    here = values
    if parts[0] == "rewards" and len(parts) > 2:
        here, parts = _reward_named(values, parts[1], override), parts[2:]
    for part in parts[:-1]:
        inner = here.get(part)
        if inner is None:
            inner = {}
        elif not isinstance(inner, dict):
            raise UserError(
                f"--set {short(override)}: {part[:80]} is {short(inner)} in the recipe, which has no settings inside"
            )
        here[part] = dict(inner)
        here = here[part]
    here[parts[-1]] = value


def _reward_named(values: dict[str, Any], name: str, override: str) -> dict[str, Any]:
    """The settings of the reward of that name, to be changed in place."""
    given = values.get("rewards")
    rewards = given if isinstance(given, list) else [] if given is None else [given]
    specs = [dict(reward) if isinstance(reward, dict) else {"function": reward} for reward in rewards]
    names = [str(spec.get("name") or str(spec.get("function")).rpartition(":")[2]) for spec in specs]
    if name not in names:
        raise UserError(f"--set {short(override)}: there is no reward {short(name)}; {nearest(name, names)}")
    values["rewards"] = specs
    return specs[names.index(name)]
