"""What a run depends on beside the code: its recipe, and the files that it names. A resume compares them with the start's."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from coterie.errors import UserError
from coterie.recipe import Recipe, make_recipe
from coterie.recipe.methods import METHODS, place_of
from coterie.recipe.older import moved, new_name
from coterie.recipe.settings import DatasetTask
from coterie.runs.modules import modules_of

_FREE = ("made_with", "steps")  # what may change without a word
_PART = " > "  # stands between a setting and what the file that it names uses
_WHOLE = 1 << 28  # bytes up to which a model's weights are hashed whole; of larger ones their size, start and end
_CONTENT = " (content)"  # after the name of a setting: the hash of what it names
_NEAR = 3  # folders above a run's in which its project is looked for
_MODEL_FILES = (".safetensors", ".gguf", ".json", ".model", ".txt")


def inputs_of(recipe: Recipe) -> dict[str, str]:
    """Every setting by its dotted name, and for every local file or model folder among them its hash."""
    found = dict(_flat(recipe.model_dump(mode="json")))
    for name, path in _files(recipe):
        if path.exists():
            found[f"{name}{_CONTENT}"] = _hash(path)
        if path.is_dir():
            for part in _templates(path):
                content = _hash(path / part) if (path / part).is_file() else "none"
                found[f"{name}{_PART}{part}{_CONTENT}"] = content
    for name, home in _homes(recipe):
        for module, path in modules_of(home).items():
            found[f"{name}{_PART}{module}{_CONTENT}"] = _hash(path)
    return {name: value for name, value in found.items() if name.partition(".")[0] not in _FREE}


def check_inputs(before: Mapping[str, str], now: Mapping[str, str], allowed: Collection[str]) -> list[str]:
    """What has changed and is allowed to, in words. UserError with every change that is not allowed by its name.

    A file that lies elsewhere is no change while its content is the same; nor is a setting that is new since the start, at its default.
    """
    before = {new_name(name): _moved(value) if name.endswith(".function") else value for name, value in before.items()}
    meant = _meant(now)
    changed: list[tuple[str, str]] = []
    refused: list[tuple[str, str]] = []
    lost = []
    for name in sorted({*before, *now}):
        if before.get(name) == now.get(name) or _only_moved(name.removesuffix(_CONTENT), before, now):
            continue
        if name not in before and now[name] == _default_of(name, meant):
            continue
        if name not in now and _is_of_another_kind(name, meant):
            continue
        plain, _, part = name.removesuffix(_CONTENT).partition(_PART)
        if part and name not in before:  # begun before such parts were noted; what uses a module is compared itself
            continue
        if not name.endswith(_CONTENT):
            text = f"{name}: was {before.get(name, 'not there')}, is {now.get(name, 'not there')}"
        elif not part and name not in now and plain in now and plain not in allowed:
            place, colon, function = _parted(json.loads(now[plain]))
            lost.append(
                f"{plain}: {place} is not there. If it was moved or renamed, say where it is: --set {plain}=PATH{colon}{function}"
            )
            continue
        else:
            text = f"{plain}: {f'{part}, which it uses,' if part else 'the file'} is not what it was when the run began"
        (changed if plain in allowed else refused).append((plain, text))
    if lost:
        raise UserError("\n".join(["a run goes on with the files that it began with:", *lost]))
    if refused:
        names = " ".join(f"--allow {name}" for name in dict.fromkeys(name for name, _ in refused))
        raise UserError(
            "\n".join(["a run goes on with what it began with, and there are changes:", *(text for _, text in refused)])
            + f"\nTo go on with them all the same: {names}"
        )
    unknown = sorted(set(allowed) - {name for name, _ in changed})
    if unknown:
        raise UserError(f"--allow {unknown[0]}: that has not changed, or there is no such setting")
    return [text for _, text in changed]


def _moved(value: str) -> str:
    """A function's name, as JSON, as it is called now."""
    function = json.loads(value)
    return json.dumps(moved(function), ensure_ascii=False) if isinstance(function, str) else value


def _only_moved(name: str, before: Mapping[str, str], now: Mapping[str, str]) -> bool:
    """Whether the setting names a file that lies elsewhere, or is called otherwise, with the same content, and the same function in it."""
    content = f"{name}{_CONTENT}"
    if not all(key in of for key in (name, content) for of in (before, now)):
        return False
    (old, _, function), (place, _, same_function) = (_parted(json.loads(of[name])) for of in (before, now))
    if before[content] != now[content]:
        path = Path(place)
        if not path.is_file() or _hash(path, Path(old).name) != before[content]:
            return False
    return function == same_function


def _parted(value: object) -> tuple[str, str, str]:
    """What a setting names: a file or module, and behind a colon the function in it where it is a file with one."""
    place, colon, function = str(value).rpartition(":")
    return (place, colon, function) if place.endswith(".py") else (str(value), "", "")


def _meant(now: Mapping[str, str]) -> dict[str, Any]:
    """The recipe's values as far as they choose between kinds of settings: the first level and the one below it."""
    found: dict[str, Any] = {}
    for name, value in now.items():
        section, dot, key = name.partition(".")
        if name.endswith(_CONTENT) or name == "run.db":  # which are files
            continue
        if not dot:
            found[name] = json.loads(value)
        elif "." not in key:
            found.setdefault(section, {})[key] = json.loads(value)
    return found


def _default_of(name: str, values: Mapping[str, Any]) -> str | None:
    """The default of a setting by its dotted name in a recipe with these values, as JSON."""
    parts = name.split(".")
    if len(parts) > (3 if parts[0] == "rewards" else 2):
        return None
    field = place_of(parts, values).fields.get(parts[-1])
    if field is None or field.is_required():
        return None
    value = field.get_default(call_default_factory=True, validated_data={})
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False, default=str)


def _is_of_another_kind(name: str, values: Mapping[str, Any]) -> bool:
    """Whether an older version noted a setting that can't be set beside what was chosen, and did nothing."""
    section, dot, key = name.partition(".")
    return place_of((section,), values).is_shut_out(section) or (
        bool(dot) and place_of((section, key), values).is_shut_out(key)
    )


def portable(recipe: Recipe, folder: Path) -> str:
    """The recipe as a run keeps it: files of the project that it was begun in by their place from the run's folder.

    So a project that is moved or copied as a whole goes on with its own files. The project is the folder that the run is begun in,
    if it lies there, and what is up to two folders above the run.
    """
    text = recipe.to_yaml()
    folder, cwd = folder.resolve(), Path.cwd().resolve()
    homes = [*([cwd] if folder.is_relative_to(cwd) else []), *list(folder.parents)[: _NEAR - 1]]
    homes = [home for home in homes if home != home.parent]

    def shorter(value: str) -> str:
        path, colon, function = _parted(value)
        if not path.startswith("/") or not any(map(Path(path).is_relative_to, homes)) or not Path(path).exists():
            return value
        relative = os.path.relpath(path, folder)
        return f"{relative if relative.startswith('..') else f'./{relative}'}{colon}{function}"

    values = yaml.safe_load(text)
    moved = _replaced(values, shorter)
    same = make_recipe(moved, folder=folder).model_dump() == make_recipe(values, folder=folder).model_dump()
    return yaml.safe_dump(moved, sort_keys=False, allow_unicode=True) if same else text


def at_home(
    recipe: Recipe, folder: Path, before: Mapping[str, str], chosen: Collection[str]
) -> tuple[Recipe, list[str]]:
    """The recipe with the files of the run's own project, and where they are instead, in words.

    An older run names its files by whole paths; a copy of its project must not go on with the original's, and one that was renamed
    finds its own again. UserError where the project's own file is another one. chosen: settings that are left as they are.
    """
    places = (folder.absolute(), folder.resolve())  # a run may be a link to where there is more space
    around = list(dict.fromkeys(parent for place in places for parent in list(place.parents)[:_NEAR]))
    found: dict[str, str] = {}
    for name, path in _files(recipe):
        known = before.get(f"{name}{_CONTENT}")
        if known is None or name in chosen:
            continue
        parts = [part for part in Path(os.path.normpath(path)).parts if part != ".."]
        ends = [Path(*parts[-length:]) for length in range(min(_NEAR, len(parts) - path.is_absolute()), 0, -1)]
        of_path = (n for n, parent in enumerate(around) if path.exists() and path.is_relative_to(parent))
        nearer = around[: next(of_path, None)]
        own = next((parent / end for parent in nearer for end in ends if (parent / end).exists()), None)
        if own is not None and own.resolve() != path.resolve():
            if _hash(own) != known and path.exists():
                raise UserError(
                    f"{name}: the run began with {path}, and this project has a file of that name with another content, {own}. "
                    f"Say which: --set {name}={path}, or --set {name}={own} --allow {name}"
                )
            found[str(path)] = str(own)
    if not found:
        return recipe, []

    def own_of(value: str) -> str:
        path, colon, function = _parted(value)
        return f"{found[str(Path(path))]}{colon}{function}" if path and str(Path(path)) in found else value

    lines = [f"{own} instead of {path}: the project was moved or copied" for path, own in found.items()]
    return METHODS.read(_replaced(recipe.model_dump(), own_of)), lines


def _replaced(value: Any, change: Callable[[str], str]) -> Any:
    """Every text in nested values, changed."""
    if isinstance(value, dict):
        return {key: _replaced(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = f"{before}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        elif key == "rewards":
            for reward in value:
                yield from _flat(reward, f"{name}.{reward['name']}.")
        else:
            yield name, json.dumps(value, ensure_ascii=False)


def _templates(folder: Path) -> list[str]:
    """The chat templates of a model or tokenizer folder, which are told of by name; the first may be missing."""
    others = (str(path.relative_to(folder)) for path in folder.glob("additional_chat_templates/*.jinja"))
    return ["chat_template.jinja", *sorted(others)]


def _homes(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every setting that names code of the user's, with the file or module."""
    of_rewards = {f"rewards.{spec.name}.function": spec.function for spec in recipe.rewards}
    for name, function in {**recipe.functions, **of_rewards}.items():
        home = function.rpartition(":")[0]
        if home:
            yield name, home


def _files(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """Every setting that may name a file or a folder."""
    for name in ("model", "tokenizer"):
        value = getattr(recipe, name)
        if isinstance(value, str):
            yield name, Path(value)
    if isinstance(recipe.task, DatasetTask):
        yield "task.data", Path(recipe.task.data)
        if recipe.task.evaluation is not None:
            yield "task.evaluation", Path(recipe.task.evaluation)
    yield from ((name, Path(home)) for name, home in _homes(recipe) if home.endswith(".py"))
    for spec in recipe.rewards:
        for option, value in spec.options.items():
            if spec.function == "judge" and option == "cache":  # is written to
                continue
            if isinstance(value, str) and "/" in value and "://" not in value:
                path = Path(value)
                yield (
                    f"rewards.{spec.name}.options.{option}",
                    path / "model" if (path / "recipe.yaml").is_file() else path,
                )


def _hash(path: Path, name: str | None = None) -> str:
    """Of a file, or of those of a model's folder, with their names. name: what a file was called, if not as it is."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in _MODEL_FILES)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{name or file.name} {size} ".encode())
        with file.open("rb") as opened:
            if size <= _WHOLE or path.is_file():
                digest.update(hashlib.file_digest(opened, "sha256").digest())
            else:
                digest.update(opened.read(1 << 20))
                opened.seek(-(1 << 20), 2)
                digest.update(opened.read())
    return digest.hexdigest()
