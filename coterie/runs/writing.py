"""Writing in a run's folder: whole or not at all, and what is said where it can't be."""

from __future__ import annotations

import errno
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from coterie.errors import RunFailedError


@contextmanager
def told_of(folder: Path) -> Iterator[None]:
    """RunFailedError for what goes wrong in writing a run's folder, with the free space and what to do."""
    try:
        yield
    except (sqlite3.Error, SafetensorError, OSError) as error:
        if type(error) is sqlite3.DatabaseError:  # and no kind of its own: the file is not what SQLite wrote
            raise RunFailedError(
                f"{folder / 'run.db'}: is damaged: {error}. Put a copy in its place; or move it away and go on without what "
                f"it recorded: coterie train --resume {folder} --allow run.db"
            ) from error
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
            raise RunFailedError(
                f"{folder / 'run.db'}: is held by another program, which has to end first. {how_to_go_on(folder)}"
            ) from error
        try:
            free = f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free"
        except OSError as gone:
            free = str(gone)
        raise RunFailedError(f"{folder}: can't be written: {error}; {free}. {how_to_go_on(folder)}") from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """RunFailedError where the folder can't be written: the disk is full, or the folder gone."""
    with told_of(folder):
        if not (folder / "run.db").exists():  # SQLite would go on with a file that has no name any more
            raise FileNotFoundError(errno.ENOENT, "it was removed while the run went on")
        yield


def how_to_go_on(folder: Path) -> str:
    if not folder.is_dir():
        return "Its checkpoints are gone with it."
    return f"The newest checkpoint stands: coterie train --resume {folder}"


def write_whole(file: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    aside = file.with_name(f".{file.name}.writing")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)
