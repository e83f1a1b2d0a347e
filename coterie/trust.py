"""What a recipe may do: one from somebody else runs no Python from outside its own folder, and sends nothing away, unasked.

In Python, where the caller runs code anyway, everything is trusted. The command restricts itself to the folder of the recipe
that it is given; a folder with a run or a model brings weights and figures, and no code. What its user has said yes to is
remembered: a file by its hash, so that one that has changed is asked about again, and an address with the key that goes there.
So a run, whose recipe lies in the run folder, can be resumed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import ipaddress
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from coterie.errors import UserError

# Not all of coterie: other parts write files and run code that options could name
_OURS = ("coterie.tasks.equation_rewards",)


@dataclass(frozen=True)
class _Trust:
    """folder: whose code runs unasked. asks: in the command. all: everything is trusted, and remembered."""

    folder: Path | None = None
    asks: bool = False
    all: bool = True


_in_force = _Trust()  # for all of the process, so that no thread that a reward starts is trusted with more


@contextmanager
def restricted(folder: Path | None, *, trust: bool = False) -> Iterator[None]:
    """Within the block trust the code in this folder, if there is one, and what was trusted before; or all, and remember it."""
    global _in_force
    before, _in_force = _in_force, _Trust(folder.resolve() if folder is not None else None, True, trust)
    try:
        yield
    finally:
        _in_force = before


def check_code(home: str, setting: str) -> None:
    """UserError where the code of `home`, a file or a module's name, is not trusted. Remembers what is, in the command."""
    if home in _OURS:
        return
    folder = _in_force.folder
    where = f"is not in the recipe's own folder, {folder}," if folder is not None else "no run or model may bring"
    said = f"{setting}: would run {home}, which {where} and has not been run here before as it is now"
    _ask(_entry(home), said, trusted=home.endswith(".py") and _is_own(Path(home)))


def check_sending(what: str, url: str, host: str, variable: str, setting: str) -> None:
    """UserError where `what` would go to another machine, or the value of an environment variable to any, and nobody agreed.

    host: of the url, as the client that sends reads it. variable: whose value goes along; empty for none. An address is agreed
    to together with the variable.
    """
    if _is_this_machine(host) and not variable:
        return
    key = f", with the value of {variable}," if variable else ""
    _ask(
        f"sends {variable or 'no key'} to {url}",
        f"{setting}: would send {what}{key} to {url}, which has not been agreed to here before",
    )


def check_risk(risk: str) -> None:
    """UserError with `risk`, a sentence about what a recipe gives up, unless all is trusted. It is never remembered."""
    if _in_force.asks and not _in_force.all:
        raise UserError(f"{risk}. If you mean that, add --trust, each time")


def check_links(folder: Path) -> None:
    """UserError where something in a run's folder is a link out of it: a run that goes on would write or delete there."""
    home = folder.resolve()
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            target = path.resolve()
            _ask(f"link {path.absolute()} to {target}", f"{path}: is a link to {target}, where the run would write")


def check_writing(folder: Path, setting: str) -> None:
    """UserError where a recipe would make a folder, and write there, that is not inside its own."""
    said = f"{setting}: would write to {folder.resolve()}, which has not been agreed to here before"
    _ask(f"writes to {folder.resolve()}", said, trusted=_is_own(folder))


def _ask(entry: str, what: str, trusted: bool = False) -> None:
    """In the command remember what is trusted; UserError for what is not, and was not before."""
    if not _in_force.asks:
        return
    entry = entry.replace("\n", "\\n")
    if _in_force.all or trusted:
        _remember(entry)
    elif entry not in _known():
        raise UserError(f"{what}. Look at it, and if you trust it add --trust")


def _is_own(path: Path) -> bool:
    return _in_force.folder is not None and path.resolve().is_relative_to(_in_force.folder)


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


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
