"""Whose code a recipe may run: a recipe from somebody else must not run Python from outside its own folder unasked.

In Python, where the caller runs code anyway, everything is trusted. The command restricts itself to the folder of the recipe
that it is given, and to what its user has run before: the hash of each file is remembered, so that a run, whose recipe lies in
the run folder, can be resumed, and a file that has changed since is asked about again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

from coterie.errors import UserError

_OURS = ("coterie.rewards.steps",)  # not all of coterie: other parts write files and run code that options could name
_folder: Path | None = None  # whose code is trusted; None trusts all
_remembers = False


def restrict(folder: Path | None) -> None:
    """From here on trust code in this folder only, and what was trusted before; None trusts all, and remembers it."""
    global _folder, _remembers
    _folder, _remembers = folder.resolve() if folder is not None else None, True


def release() -> None:
    """Trust everything again, as in Python."""
    global _folder, _remembers
    _folder, _remembers = None, False


def check_code(home: str, setting: str) -> None:
    """UserError where the code of `home`, a file or a module's name, is not trusted. Remembers what is, in the command."""
    if not _remembers or home in _OURS:
        return
    entry = _entry(home)
    inside = home.endswith(".py") and _folder is not None and Path(home).resolve().is_relative_to(_folder)
    if _folder is None or inside:
        _remember(entry)
    elif entry not in _known():
        raise UserError(
            f"{setting}: would run {home}, which is not in the recipe's own folder, {_folder}, and has not been run here "
            "before as it is now. Look at it, and if you trust it add --trust"
        )


def _entry(home: str) -> str:
    if not home.endswith(".py"):
        try:  # of the package, not of what is inside, which can't be found without running the package's own code
            found = importlib.util.find_spec(home.partition(".")[0])
        except (ImportError, ValueError):
            found = None
        return f"module {home} {_entry(found.origin)}" if found is not None and found.origin else f"module {home}"
    path = Path(home).resolve()
    content = path.read_bytes() if path.is_file() else b""
    return f"{hashlib.sha256(content).hexdigest()} {path}"


def _file() -> Path:
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "coterie" / "trusted"


def _known() -> set[str]:
    try:
        return set(_file().read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError):
        return set()


def _remember(entry: str) -> None:
    if entry in _known():
        return
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        with _file().open("a", encoding="utf-8") as opened:
            opened.write(entry + "\n")
    except OSError:  # a home that can't be written: it is asked about again
        return
