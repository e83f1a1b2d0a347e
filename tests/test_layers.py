"""Imports go downwards, in the order that docs/architecture.md states."""

import ast
import re
from pathlib import Path

import coterie

LAYERS = {  # lowest first; a file at the top of the package belongs to the ground, unless it is named here
    "ground": ("distributed", "sandbox"),
    "algorithms": ("algorithms",),
    "recipe": ("recipe",),
    "models": ("models",),
    "rollouts": ("rollouts",),
    "fast": ("fast",),
    "tasks": ("rewards", "tasks", "evals"),
    "runs": ("runs",),
    "training": ("training",),
    "commands": ("commands", "cli"),
}
ORDER = list(LAYERS)
PACKAGE = Path(coterie.__file__).parent


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("coterie."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("coterie."))


def layer_of(name):
    return next((layer for layer, names in LAYERS.items() if name in names), "ground")


def test_imports_go_downwards():
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name in ("__init__", "__main__"):
            continue
        for imported in imports_of(path):
            assert ORDER.index(layer_of(imported)) <= ORDER.index(layer_of(name)), (
                f"{path} imports {imported}, which lies above it"
            )


def test_every_folder_is_in_a_layer():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and next(path.glob("*.py"), None)}
    assert folders == {name for names in LAYERS.values() for name in names} - {"cli"}


def test_run_db_is_asked_and_written_in_few_files():
    """So a column can be renamed in two of them alone: `held.py` names none. The judge's cache is a database of its own."""
    allowed = {"runs/store.py", "runs/reader.py", "runs/held.py", "rewards/judge/cache.py"}
    statement = re.compile(r"\b(SELECT|INSERT|DELETE FROM|UPDATE|PRAGMA|CREATE TABLE)\b")
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and statement.search(node.value)
    }
    assert found == allowed


def test_the_order_is_documented():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert " < ".join(ORDER) in text


def test_algorithms_know_tensors_only():
    for path in (PACKAGE / "algorithms").glob("*.py"):
        assert set(imports_of(path)) <= {"types", "algorithms"}, path
