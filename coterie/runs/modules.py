"""The modules that a user's code imports, found by reading it: nothing of it is run.

Those of a package that was installed are left out, for versions say enough of them, and Python's own.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import coterie

_INSTALLED = ("site-packages", "dist-packages")


def modules_of(home: str) -> dict[str, Path]:
    """The modules that a file, or a module with itself, imports: those of a package that is installed, and Python's own, left out.

    They are read and never run, so of other ways to import only `import_module` with a name is seen. Where a file changes `sys.path`, the
    folders around it are looked into.
    """
    found: dict[str, Path] = {}
    waiting = [("", Path(home), _beside(Path(home)))] if home.endswith(".py") else []
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


def _beside(file: Path) -> list[str]:
    """Where a file may find what it imports, beside where Python looks."""
    folder = file.resolve().parent
    if not file.is_file() or b"sys.path" not in file.read_bytes():
        return [str(folder)]
    return [*map(str, (folder, *sorted(inner for inner in folder.iterdir() if inner.is_dir()), folder.parent))]


def _found(module: str, beside: list[str]) -> list[tuple[str, Path, list[str]]]:
    """The file of a module and of each package around it, with where their own imports are looked for."""
    where: list[str] | None = [*beside, *sys.path]
    files: list[tuple[str, Path, list[str]]] = []
    parts = module.split(".")
    for number in range(1, len(parts) + 1):
        name = ".".join(parts[:number])
        try:
            # By its whole name, a folder without __init__.py would be looked for in a parent that is imported.
            spec = PathFinder.find_spec(parts[number - 1], where)
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
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield from ([str(node.args[0].value)] if called in ("import_module", "__import__") else [])


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
