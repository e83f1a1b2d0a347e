"""Does a test notice? One small change at a time is made to the package, at random places, and the tests that run the line are run.

`python benchmarks/mutants.py` writes benchmarks/results/mutants.json: each mutant, and whether a test failed. The places are drawn by
seed, over all folders of the package, without a look at the tests. A change to a message, a log or a type is none; one that
cannot change what the code does (an equivalent mutant) has to be told by a reader.

The quick tests are run once with coverage.py, to know which of them runs which line; a mutant then meets only those, each at most
`--seconds` in all, until one fails.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tables import stamp, write_json

ROOT = Path(__file__).parent.parent
COMPARED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
            ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is}  # fmt: skip
COMPUTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
            ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}  # fmt: skip
SILENT = {"UserError", "RewardError", "warn", "say", "description", "Field", "help", "isinstance", "add_note"}


@dataclass(frozen=True)
class Mutant:
    """One change: where, what stood there, and what stands there now."""

    file: str
    line: int
    before: str
    after: str


def changes_of(path: Path) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Every expression of a file that can be changed, with what takes its place. Numbers count inside of functions only: elsewhere
    they are settings."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[ast.AST, ast.AST]]:
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in SILENT:
                return
        if isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert):
            return
        children: list[ast.AST] = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            children, inside = list(node.body), True
        elif isinstance(node, ast.AnnAssign):
            children = [node.value] if node.value else []
        if inside or not isinstance(node, ast.Constant):
            yield from ((node, other) for other in variants(node))
        for child in children:
            yield from walk(child, inside)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What could stand in place of an expression by a programmer's slip."""
    changed = copy.copy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARED and len(node.ops) == 1:
        changed.ops = [COMPARED[type(node.ops[0])]()]  # type: ignore[attr-defined]
        yield changed
    elif isinstance(node, ast.BinOp) and type(node.op) in COMPUTED and not text_in(node):
        changed.op = COMPUTED[type(node.op)]()  # type: ignore[attr-defined]
        yield changed
    elif isinstance(node, ast.BoolOp):
        changed.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()  # type: ignore[attr-defined]
        yield changed
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.copy_location(ast.Constant(node.value + 1), node)
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield ast.copy_location(ast.Constant(not node.value), node)


def text_in(node: ast.BinOp) -> bool:
    """Whether a sum is one of texts or lists, where the other operation is an error and no slip."""
    sides = (node.left, node.right)
    return any(isinstance(side, ast.JoinedStr | ast.List | ast.Constant) and not isinstance(getattr(side, "value", None), int | float)
               for side in sides)  # fmt: skip


def drawn(count: int, seed: int) -> list[tuple[Mutant, str]]:
    """Mutants, each with its file's whole new text: at least three of each folder, the others by how much there is to change."""
    chooser, of_folder = random.Random(seed), defaultdict(list)
    for path in sorted((ROOT / "coterie").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        folder = name.split("/")[1]
        of_folder["ground" if folder.endswith(".py") else folder].extend((name, *change) for change in changes_of(path))
    queues = {folder: chooser.sample(found, len(found)) for folder, found in sorted(of_folder.items()) if found}
    chosen = [queue.pop() for queue in queues.values() for _ in range(min(3, len(queue)))]
    others = [change for queue in queues.values() for change in queue]
    chosen += chooser.sample(others, max(0, count - len(chosen)))
    return [made(*change) for change in chosen[:count]]


def made(name: str, node: ast.AST, other: ast.AST) -> tuple[Mutant, str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    starts = [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    first = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
    last = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
    raw, new = text.encode(), f"({ast.unparse(other)})"
    before = raw[first:last].decode()
    return Mutant(name, node.lineno, before, new), (raw[:first] + new.encode() + raw[last:]).decode()  # type: ignore[attr-defined]


def tests_by_line(folder: Path, kept: Path) -> dict[tuple[str, int], set[str]]:
    """Which test functions run which line of the package: (file, line) -> "tests/...py::name"."""
    if not kept.exists():
        (folder / ".coveragerc").write_text("[run]\nsource = coterie\ndynamic_context = test_function\n")
        command = [
            sys.executable,
            "-m",
            "coverage",
            "run",
            f"--data-file={kept}",
            "-m",
            "pytest",
            "-q",
            "-m",
            "not slow",
            "-p",
            "no:cacheprovider",
        ]
        subprocess.run(command, cwd=folder, env=environment(folder), check=False)
    from coverage.numbits import numbits_to_nums

    found = defaultdict(set)
    with sqlite3.connect(kept) as db:
        rows = db.execute(
            "SELECT path, context, numbits FROM line_bits JOIN file ON file.id = file_id JOIN context ON context.id = context_id"
        )
        for path, context, bits in rows:
            if context:
                name = path[path.rindex("/coterie/") + 1 :]
                for line in numbits_to_nums(bits):
                    found[name, line].add(context)
    return found


def selected(contexts: set[str], folder: Path) -> list[str]:
    """ "tests.training.test_run.test_it" -> "tests/training/test_run.py::test_it", as pytest names them."""
    names = []
    for context in sorted(contexts):
        module, _, function = context.rpartition(".")
        for path in (folder / "tests").rglob(module.split(".")[-1] + ".py"):
            names.append(f"{path.relative_to(folder)}::{function}")
    return names


def killed(folder: Path, tests: list[str], seconds: float) -> bool:
    """Whether one of the tests fails, or they take too long."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    try:
        ended = subprocess.run(
            command, cwd=folder, env=environment(folder), capture_output=True, timeout=seconds, text=True
        )
    except subprocess.TimeoutExpired:
        return True
    return ended.returncode not in (0, 5)


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--map", type=Path, default=Path(tempfile.gettempdir()) / "coterie_mutants.coverage")
    parser.add_argument("--show", action="store_true", help="show the mutants and run nothing")
    options = parser.parse_args()
    mutants = drawn(options.count, options.seed)
    if options.show:
        for mutant, _ in mutants:
            print(json.dumps(asdict(mutant)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__"))
        by_line = tests_by_line(folder, options.map)
        rows = []
        for mutant, text in mutants:
            original = (folder / mutant.file).read_text(encoding="utf-8")
            tests = selected(by_line.get((mutant.file, mutant.line), set()), folder)
            (folder / mutant.file).write_text(text, encoding="utf-8")
            try:
                fate = killed(folder, tests, options.seconds) if tests else False
            finally:
                (folder / mutant.file).write_text(original, encoding="utf-8")
            rows.append({**asdict(mutant), "num_tests": len(tests), "killed": fate})
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    found = {
        **stamp(sys.argv),
        "seed": options.seed,
        "num_killed": sum(row["killed"] for row in rows),
        "num_mutants": len(rows),
        "mutants": rows,
    }
    write_json("mutants", found)


if __name__ == "__main__":
    main()
