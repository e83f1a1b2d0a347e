"""What a recipe names as files: absolute from here on, so that a run can be resumed from anywhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coterie.recipe.older import moved


def plain_rewards(values: dict[str, Any], folder: Path) -> None:
    """Let a reward be written as a bare string, resolve its files, and name it after its function.

    A reward model stands on the recipe's device, unless its own options name another.
    """
    rewards = values.get("rewards")
    if isinstance(rewards, str | dict):
        rewards = [rewards]
    if not isinstance(rewards, list | tuple):
        return
    specs = []
    for reward in rewards:
        spec = {"function": reward} if isinstance(reward, str) else reward
        if isinstance(spec, dict) and isinstance(spec.get("function"), str):
            home, colon, function = moved(spec["function"]).rpartition(":")
            if home.endswith(".py"):
                home = _resolved_code(home, folder)
            spec = {**spec, "function": f"{home}{colon}{function}", "name": spec.get("name") or function}
            options = spec.get("options") or {}
            if isinstance(options, dict):
                of_recipe = {"device": values.get("device", "auto")} if function == "reward_model" else {}
                resolved = _resolved_options(options, _PATH_OPTIONS.get(function), folder)
                spec = {**spec, "options": {**of_recipe, **resolved}}
        specs.append(spec)
    values["rewards"] = specs


_PATH_OPTIONS = {"reward_model": ("model",), "judge": ("cache",)}  # of the built-in rewards that have some


def _resolved_options(options: dict[str, Any], names: Iterable[str] | None, folder: Path) -> dict[str, Any]:
    """A reward's options with their files and folders resolved: those of these names, or all that are written as paths.

    A bare word is no path there: a folder that happens to be called like it changes nothing.
    """
    resolved = dict(options)
    for name, value in options.items():
        if isinstance(value, str) and value and (name in names if names is not None else "/" in value):
            with contextlib.suppress(OSError, RuntimeError):  # a text that no file could be called
                resolved[name] = _resolved(value, folder)
    return resolved


def absolute_paths(values: dict[str, Any], folder: Path) -> None:
    """Make local files absolute, so that a run can be resumed from anywhere. Hub ids stay as they are."""
    for section, name in (("loss", "objective"), ("advantage", "function")):
        given = values.get(section)
        if isinstance(given, dict) and isinstance(given.get(name), str) and ":" in given[name]:
            home, _, function = given[name].rpartition(":")
            values[section] = {**given, name: f"{_resolved_code(home, folder)}:{function}"}
    task = values.get("task")
    if isinstance(task, dict):
        named = {name: task[name] for name in ("data", "evaluation") if isinstance(task.get(name), str)}
        values["task"] = {**task, **{name: _resolved(value, folder) for name, value in named.items()}}
    for key in ("model", "tokenizer"):
        if isinstance(values.get(key), str):
            values[key] = _resolved(values[key], folder)


def _resolved(name: str, folder: Path) -> str:
    """The absolute path if there is such a file beside the recipe or here, else the name unchanged."""
    for candidate in (folder / Path(name).expanduser(), Path(name).expanduser()):
        if candidate.exists():
            return str(candidate.resolve())
    return name


def _resolved_code(home: str, folder: Path) -> str:
    """The file or module before a function's name. A file that is nowhere is looked for beside the recipe, and named as there."""
    found = _resolved(home, folder)
    return str(folder / Path(found).expanduser()) if found.endswith(".py") and not Path(found).is_file() else found


def is_local_path(name: str) -> bool:
    """Whether a name is meant as a file or folder here, and not as a hub id such as `Qwen/Qwen3-0.6B`."""
    looks_local = name.startswith((".", "/", "~", "runs/")) or name.endswith(
        (".jsonl", ".json", ".parquet", ".py", ".yaml", ".gguf")
    )
    return looks_local or name.count("/") > 1 or Path(name).exists()
