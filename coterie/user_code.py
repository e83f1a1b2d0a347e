"""Find a user's function by name: `package.module:function`, or `file.py:function`. Nothing here imports torch."""

import asyncio
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from coterie.errors import UserError, closest, nearest
from coterie.trust import check_code


def load_function(name: str, setting: str) -> Callable[..., Any]:
    """The function behind a name that stands under `setting`, which an error starts with."""
    home, _, function = name.rpartition(":")
    if not home or not function:
        raise UserError(f"{setting}: {name!r} names no function; write module:function or file.py:function")
    check_home(home, setting)
    module = _module(home, setting)
    found = getattr(module, function, None)
    if not callable(found):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{setting}: {home} has no function {function!r}; {nearest(function, own)}")
    return found


def awaited(answer: Any) -> Any:
    """What a function gave, waited for where the function is async."""

    async def wait() -> Any:
        return await answer

    return asyncio.run(wait()) if inspect.isawaitable(answer) else answer


def check_home(home: str, setting: str) -> None:
    """UserError where a file or a module is not there, and where it is not trusted. Nothing of it is run."""
    path = Path(home)
    if home.endswith(".py"):
        if not path.is_file():
            beside = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
            near = closest(path.name, beside)
            there = f"there are: {', '.join(sorted(beside))}" if beside else "no .py file lies in that folder"
            there = f"did you mean {near!r}?" if near else there
            raise UserError(f"{setting}: the file {home} does not exist; {there}")
    elif not _is_there(home.partition(".")[0]):
        raise UserError(
            f"{setting}: there is no module {home!r} here; a file beside the recipe is written {home}.py:function"
        )
    check_code(home, setting)


def _is_there(package: str) -> bool:
    try:
        return package in sys.modules or importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _module(home: str, setting: str) -> ModuleType:
    try:
        if not home.endswith(".py"):
            return importlib.import_module(home)
        path = Path(home)
        spec = importlib.util.spec_from_file_location(_importable(path.resolve()), path.resolve())
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        setattr(module, _MARK, True)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"{setting}: {home} can't be imported: {error}{in_place(error)}") from error
    except Exception as error:  # a user's file may raise anything when it is imported
        raise UserError(f"{setting}: {home} fails when imported: {described(error)}") from error


def described(error: BaseException) -> str:
    """An exception in words, with where it was raised."""
    return f"{type(error).__name__}: {error}{'' if isinstance(error, SyntaxError) else in_place(error)}"


def in_place(error: BaseException) -> str:
    """` (rewards.py, line 12, in right)`: the last place of a traceback that is neither ours nor a library's; else empty.

    Where all of it is a library's, as of a reward that is installed, it is the place at which our code called it.
    """
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    called = [(code, line) for code, line in frames if not code.co_filename.startswith(_COTERIE)]
    own = [(code, line) for code, line in called if not code.co_filename.startswith(("<", *_LIBRARIES))]
    if not called:
        return ""
    code, line = own[-1] if own else called[0]
    return f" ({code.co_filename.removeprefix(os.getcwd() + os.sep)}, line {line}, in {code.co_name})"


_COTERIE = str(Path(__file__).resolve().parent) + os.sep
_LIBRARIES = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")})


_MARK = "__of_the_user__"  # stands in the modules that were made here of users' files


def _importable(path: Path) -> str:
    """A name under which other processes can import a user's file too: those of a multiprocessing pool get it by its name.

    Its folder comes last on the path, so nothing there is taken for a package. A file that is called like one gets a name of its
    own, which no other process knows.
    """
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    importlib.invalidate_caches()
    name = path.stem
    if name in sys.modules and not hasattr(sys.modules[name], _MARK):
        return f"coterie_user_{name}"
    sys.modules.pop(name, None)
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or found.origin != str(path):
        return f"coterie_user_{name}"
    return name
