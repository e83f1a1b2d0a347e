"""Imports go downwards, in the order that docs/architecture.md states."""

import ast
from pathlib import Path

import coterie

ORDER = (
    "errors", "keys", "reading", "deadline", "faults", "stopping", "trust", "noise", "sections", "kernels", "types", "distributed", "algorithms", "settings", "older", "paths", "explain", "recipe", "models", "rollouts",
    "rewards", "tasks", "evals", "runs", "training", "scoring", "commands", "cli",
)  # fmt: skip
PACKAGE = Path(coterie.__file__).parent


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("coterie."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("coterie."))


def test_imports_go_downwards():
    for path in PACKAGE.rglob("*.py"):
        layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if layer in ("__init__", "__main__"):
            continue
        assert layer in ORDER, f"{path} is in no layer"
        for imported in imports_of(path):
            assert ORDER.index(imported) <= ORDER.index(layer), f"{path} imports {imported}, which lies above it"


def test_the_order_is_documented():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert " < ".join(ORDER) in text


def test_algorithms_know_tensors_only():
    for path in (PACKAGE / "algorithms").glob("*.py"):
        assert set(imports_of(path)) <= {"types", "algorithms"}, path
