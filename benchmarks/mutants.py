"""Does a test notice? One small change at a time is made to the package, at random places, and the tests that run the line are run.

`python benchmarks/mutants.py` writes benchmarks/results/mutants.json: each mutant, and whether a test failed. The places are drawn by
seed, over all folders of the package, without a look at the tests. A change to a message, a log or a type is none; one that
cannot change what the code does (an equivalent mutant) has to be told by a reader.

The quick tests are run once with coverage.py, child processes too, to know which of them run which line; a mutant then meets only
those, at most `--seconds`, until one fails. A line that no quick test runs meets all tests of its folder, the slow ones too. What
failed has to pass on the package as it is, or it has killed nothing.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from queue import Queue

from tables import stamp, write_json

ROOT = Path(__file__).parent.parent
COMPARED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
            ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is}  # fmt: skip
COMPUTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
            ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}  # fmt: skip
SILENT = {"UserError", "RewardError", "warn", "say", "description", "Field", "help", "isinstance", "add_note"}

QUICK = ["-p", "no:cacheprovider", "-m", "not slow"]


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


COVERAGE = """[run]
source = coterie
parallel = True
patch = subprocess
dynamic_context = test_function
context = ${PYTEST_CURRENT_TEST-}
"""


def tests_by_line(folder: Path, kept: Path) -> dict[tuple[str, int], set[str]]:
    """Which tests run which line of the package: (file, line) -> "tests/...py::name". A child process is known by the variable in
    which pytest names the test that started it."""
    if not kept.exists():
        (folder / ".coveragerc").write_text(COVERAGE)
        coverage, data = [sys.executable, "-m", "coverage"], f"--data-file={kept}"
        run = [*coverage, "run", data, "-m", "pytest", *QUICK, "-n", "2"]
        subprocess.run(run, cwd=folder, env=environment(folder), check=False)
        subprocess.run([*coverage, "combine", "-q", data], cwd=folder, env=environment(folder), check=True)
    from coverage.numbits import numbits_to_nums

    found = defaultdict(set)
    with sqlite3.connect(kept) as db:
        rows = db.execute(
            "SELECT path, context, numbits FROM line_bits JOIN file ON file.id = file_id JOIN context ON context.id = context_id"
        )
        for path, context, bits in rows:
            if test := test_of(context, folder):
                name = path[path.rindex("/coterie/") + 1 :]
                for line in numbits_to_nums(bits):
                    found[name, line].add(test)
    return found


@cache
def test_of(context: str, folder: Path) -> str | None:
    """ "tests.training.test_run.test_it", or "tests/training/test_run.py::test_it[4] (call)" of a child: as pytest names the function."""
    if "::" in context:
        return context.split("|")[0].split(" (")[0].split("[")[0]
    module, _, function = context.rpartition(".")
    found = next((folder / "tests").rglob(module.split(".")[-1] + ".py"), None) if module else None
    return f"{found.relative_to(folder)}::{function}" if found else None


def tests_of_folder(file: str, folder: Path) -> list[str]:
    """The tests that stand where the file stands in the package."""
    mirrored = folder / "tests" / Path(*Path(file).parts[1:-1])
    while not mirrored.is_dir():
        mirrored = mirrored.parent
    names = [mirrored] if Path(file).parts[1:-1] else sorted(mirrored.glob("test_*.py"))
    return [str(name.relative_to(folder)) for name in names]


def failed(folder: Path, tests: list[str], seconds: float) -> str | None:
    """The first test that fails; "time" where they take too long."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-rfE", "--tb=no", *tests]
    try:
        ended = subprocess.run(
            command, cwd=folder, env=environment(folder), capture_output=True, timeout=seconds, text=True
        )
    except subprocess.TimeoutExpired:
        return "time"
    if ended.returncode in (0, 5):
        return None
    named = [
        line.split(" ", 1)[1].split(" - ")[0]
        for line in ended.stdout.splitlines()
        if line.startswith(("FAILED ", "ERROR "))
    ]
    return named[0] if named else "the process"


def fate(
    mutant: Mutant, text: str, folder: Path, by_line: dict[tuple[str, int], set[str]], seconds: float
) -> dict[str, object]:
    """What the tests make of one mutant in a copy of the project. Only what passes without the mutant can kill it."""
    tests, original = (
        sorted(by_line.get((mutant.file, mutant.line), ())),
        (folder / mutant.file).read_text(encoding="utf-8"),
    )
    chosen = [*QUICK[2:], *tests] if tests else tests_of_folder(mutant.file, folder)
    while True:
        (folder / mutant.file).write_text(text, encoding="utf-8")
        try:
            by = failed(folder, chosen, seconds)
        finally:
            (folder / mutant.file).write_text(original, encoding="utf-8")
        if by is None or failed(folder, chosen if by in ("time", "the process") else [by], seconds) is None:
            return {**asdict(mutant), "num_tests": len(tests), "killed": by is not None, "by": by}
        assert by not in ("time", "the process"), f"{chosen} fail without a mutant too, by {by}"
        chosen += ["--deselect", by]  # it fails without the mutant too


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--map", type=Path, default=Path(tempfile.gettempdir()) / "coterie_mutants.coverage")
    parser.add_argument("--show", action="store_true", help="show the mutants and run nothing")
    options = parser.parse_args()
    mutants = drawn(options.count, options.seed)
    if options.show:
        for mutant, _ in mutants:
            print(json.dumps(asdict(mutant)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folders: Queue[Path] = Queue()
        for index in range(options.jobs):
            folder = Path(scratch) / f"copy{index}"
            subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
            folders.put(folder)
        by_line = tests_by_line(Path(scratch) / "copy0", options.map)

        def run(mutant: Mutant, text: str) -> dict[str, object]:
            folder = folders.get()
            try:
                row = fate(mutant, text, folder, by_line, options.seconds)
            finally:
                folders.put(folder)
            print(json.dumps(row, ensure_ascii=False), flush=True)
            return row

        with ThreadPoolExecutor(options.jobs) as pool:
            rows = list(pool.map(run, *zip(*mutants, strict=True)))
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
