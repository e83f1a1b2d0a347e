"""What a run depends on beside the code: its recipe, and the files that it names. A resume compares them with the start's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from coterie.errors import UserError
from coterie.recipe import Recipe
from coterie.settings import DatasetTask

_FREE = ("made_with", "steps")  # what may change without a word
_WHOLE = 1 << 28  # bytes up to which a model's weights are hashed whole; of larger ones their size, start and end
_MODEL_FILES = (".safetensors", ".json", ".model", ".txt")


def inputs_of(recipe: Recipe) -> dict[str, str]:
    """Every setting by its dotted name, and for every local file or model folder among them its hash."""
    found = dict(_flat(recipe.model_dump(mode="json")))
    for name, path in _files(recipe):
        if path.exists():
            found[f"{name} (content)"] = _hash(path)
    return {name: value for name, value in found.items() if name.partition(".")[0] not in _FREE}


def check_inputs(before: Mapping[str, str], now: Mapping[str, str], allowed: Collection[str]) -> list[str]:
    """What has changed and is allowed to, in words. UserError with every change that is not allowed by its name."""
    changed: list[tuple[str, str]] = []
    refused: list[tuple[str, str]] = []
    for name in sorted({*before, *now}):
        if before.get(name) == now.get(name):
            continue
        plain = name.removesuffix(" (content)")
        if name == plain:
            text = f"{name}: was {before.get(name, 'not there')}, is {now.get(name, 'not there')}"
        else:
            text = f"{plain}: the file is not what it was when the run began"
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


def _files(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """Every setting that may name a file or a folder."""
    for name in ("model", "tokenizer"):
        value = getattr(recipe, name)
        if isinstance(value, str):
            yield name, Path(value)
    if isinstance(recipe.task, DatasetTask):
        yield "task.data", Path(recipe.task.data)
    functions = {"loss.objective": recipe.loss.objective, "advantage.function": recipe.advantage.function}
    functions |= {f"rewards.{spec.name}.function": spec.function for spec in recipe.rewards}
    for name, function in functions.items():
        home = (function or "").rpartition(":")[0]
        if home.endswith(".py"):
            yield name, Path(home)
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
