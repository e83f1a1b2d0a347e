"""What a run depends on beside the code: its recipe, and the files that it names. A resume compares them with the start's."""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Collection, Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import coterie
from coterie.errors import UserError
from coterie.recipe import Recipe
from coterie.settings import DatasetTask

_FREE = ("made_with", "steps")  # what may change without a word
_NOT_SET = json.dumps(None)  # also where a run began before there was such a setting
_PART = " > "  # stands between a setting and what the file that it names uses
_WHOLE = 1 << 28  # bytes up to which a model's weights are hashed whole; of larger ones their size, start and end
_MODEL_FILES = (".safetensors", ".json", ".model", ".txt")
_INSTALLED = ("site-packages", "dist-packages")  # what versions say enough of


def inputs_of(recipe: Recipe) -> dict[str, str]:
    """Every setting by its dotted name, and for every local file or model folder among them its hash."""
    found = dict(_flat(recipe.model_dump(mode="json")))
    for name, path in _files(recipe):
        if path.exists():
            found[f"{name} (content)"] = _hash(path)
        if path.is_dir():
            for part in _templates(path):
                content = _hash(path / part) if (path / part).is_file() else "none"
                found[f"{name}{_PART}{part} (content)"] = content
    for name, home in _homes(recipe):
        for module, path in modules_of(home).items():
            found[f"{name}{_PART}{module} (content)"] = _hash(path)
    return {name: value for name, value in found.items() if name.partition(".")[0] not in _FREE}


def check_inputs(before: Mapping[str, str], now: Mapping[str, str], allowed: Collection[str]) -> list[str]:
    """What has changed and is allowed to, in words. UserError with every change that is not allowed by its name."""
    changed: list[tuple[str, str]] = []
    refused: list[tuple[str, str]] = []
    for name in sorted({*before, *now}):
        if before.get(name, _NOT_SET) == now.get(name, _NOT_SET):
            continue
        plain, _, part = name.removesuffix(" (content)").partition(_PART)
        if part and name not in before:  # begun before such parts were noted; what uses a module is compared itself
            continue
        if not name.endswith(" (content)"):
            text = f"{name}: was {before.get(name, 'not there')}, is {now.get(name, 'not there')}"
        else:
            text = f"{plain}: {f'{part}, which it uses,' if part else 'the file'} is not what it was when the run began"
        (changed if plain in allowed else refused).append((plain, text))
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
    functions = {"loss.objective": recipe.loss.objective, "advantage.function": recipe.advantage.function}
    functions |= {f"rewards.{spec.name}.function": spec.function for spec in recipe.rewards}
    for name, function in functions.items():
        home = (function or "").rpartition(":")[0]
        if home:
            yield name, home


def modules_of(home: str) -> dict[str, Path]:
    """The modules that a file, or a module with itself, imports: those of a package that is installed, and Python's own, left out.

    They are read and never run, so what is imported by another way than `import` is not seen.
    """
    found: dict[str, Path] = {}
    path = Path(home)
    waiting = [("", path, [str(path.parent)])] if home.endswith(".py") else []
    if not waiting:
        waiting = _found(home, [])
        found.update((name, file) for name, file, _ in waiting if not _is_ours(file))
    while waiting:
        name, file, beside = waiting.pop()
        for module in _imports(file, name):
            for entry in _found(module, beside):
                if entry[0] not in found and _is_own(entry[1], home):
                    found[entry[0]] = entry[1]
                    waiting.append(entry)
    return found


def _found(module: str, beside: list[str]) -> list[tuple[str, Path, list[str]]]:
    """The file of a module and of each package around it, with where their own imports are looked for."""
    where: list[str] | None = [*beside, *sys.path]
    files: list[tuple[str, Path, list[str]]] = []
    parts = module.split(".")
    for number in range(1, len(parts) + 1):
        name = ".".join(parts[:number])
        try:
            spec = PathFinder.find_spec(name, where)
        except (ImportError, ValueError):
            spec = None
        if spec is None:
            break
        if spec.origin and spec.origin.endswith(".py"):
            files.append((name, Path(spec.origin), beside))
        where = list(spec.submodule_search_locations or [])
    return files


def _imports(file: Path, name: str) -> Iterator[str]:
    """The names of the modules that a file imports, wherever in it."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            around = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*around, *([node.module] if node.module else [])])
            yield from ([base] if base else [])
            yield from (f"{base}.{alias.name}" if base else alias.name for alias in node.names)


def _is_own(file: Path, home: str) -> bool:
    """Whether a module is the user's: of the same package as their code, or none that was installed or came with Python."""
    parts = file.resolve().parts
    if _is_ours(file):
        return False
    installed = any(part in _INSTALLED for part in parts)
    same = not home.endswith(".py") and home.partition(".")[0] in parts
    return same or not (installed or file.resolve().is_relative_to(Path(ast.__file__).resolve().parent))


def _is_ours(file: Path) -> bool:
    return file.resolve().is_relative_to(Path(coterie.__file__).resolve().parent)


def _files(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """Every setting that may name a file or a folder."""
    for name in ("model", "tokenizer"):
        value = getattr(recipe, name)
        if isinstance(value, str):
            yield name, Path(value)
    if isinstance(recipe.task, DatasetTask):
        yield "task.data", Path(recipe.task.data)
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


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in _MODEL_FILES)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as opened:
            if size <= _WHOLE or path.is_file():
                digest.update(hashlib.file_digest(opened, "sha256").digest())
            else:
                digest.update(opened.read(1 << 20))
                opened.seek(-(1 << 20), 2)
                digest.update(opened.read())
    return digest.hexdigest()
