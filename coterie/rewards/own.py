"""Find a user's function by name: `package.module:function`, or `file.py:function`. Nothing here imports torch."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from coterie.errors import UserError, nearest
from coterie.trust import check_code


def load_function(name: str, setting: str) -> Callable[..., Any]:
    """The function behind a name that stands under `setting`, which an error starts with."""
    home, _, function = name.rpartition(":")
    if not home or not function:
        raise UserError(f"{setting}: {name!r} names no function; write module:function or file.py:function")
    check_code(home, setting)
    module = _module(home, setting)
    found = getattr(module, function, None)
    if not callable(found):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{setting}: {home} has no function {function!r}; {nearest(function, own)}")
    return found


def _module(home: str, setting: str) -> ModuleType:
    try:
        if not home.endswith(".py"):
            return importlib.import_module(home)
        path = Path(home)
        if not path.is_file():
            raise UserError(f"{setting}: the file {home} does not exist")
        spec = importlib.util.spec_from_file_location(_importable(path.resolve()), path.resolve())
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"{setting}: {home} can't be imported: {error}") from error
    except Exception as error:  # a user's file may raise anything when it is imported
        raise UserError(f"{setting}: {home} fails when imported: {type(error).__name__}: {error}") from error


_ours: set[str] = set()  # the names under which users' files stand in sys.modules


def _importable(path: Path) -> str:
    """A name under which other processes can import a user's file too: those of a multiprocessing pool get it by its name.

    Its folder comes last on the path, so nothing there is taken for a package. A file that is called like one gets a name of its
    own, which no other process knows.
    """
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    importlib.invalidate_caches()
    name = path.stem
    if name in sys.modules and name not in _ours:
        return f"coterie_user_{name}"
    sys.modules.pop(name, None)
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or found.origin != str(path):
        return f"coterie_user_{name}"
    _ours.add(name)
    return name
