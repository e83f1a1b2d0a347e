"""A run's folder: made or opened again, and held by one process."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from coterie.errors import UserError
from coterie.recipe import Recipe, load_recipe
from coterie.runs.console import Console
from coterie.runs.find import RUNS, is_run, run_at
from coterie.runs.resume import Beginning, find_beginning, take_over
from coterie.runs.resume_check import inputs_of, portable
from coterie.runs.store import Store
from coterie.runs.surroundings import surroundings, versions
from coterie.runs.writing import told_of, write_whole, writing
from coterie.trust import check_links


class RunFolder:
    """A run's folder, locked to this process, with its record open. Make it with `RunFolder.create` or `RunFolder.reopen`.

    beginning: what a reopened run goes on from; None for a new one.
    """

    def __init__(self, path: Path, recipe: Recipe, console: Console) -> None:
        self.path, self.recipe, self.console = path, recipe, console
        self.beginning: Beginning | None = None
        check_links(path)
        self._lock = locked(path)
        self.store = Store(path / "run.db")
        self.store.tell = console.warn

    @classmethod
    def create(cls, recipe: Recipe, name: str, out: str | None, console: Console) -> RunFolder:
        """A new folder: `out`, or the first free one of runs/NAME, runs/NAME-2, ..."""
        path = path_for(name, out)
        try:
            path.mkdir(parents=True, exist_ok=True)
            stored = recipe.model_copy(update={"made_with": {**(recipe.made_with or {}), **versions()}})
            folder = cls(path, recipe, console)
            folder.store.inputs(inputs_of(recipe), surroundings(recipe))
            written = portable(stored, path)
            write_whole(path / "recipe.yaml", written)  # last: from here on it is a run to go on with
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"{path}: can't be written: {error}") from None
        return folder

    @classmethod
    def reopen(cls, name: str, overrides: list[str], console: Console, *, allow: Sequence[str] = ()) -> RunFolder:
        """An earlier run, where it stands at its newest whole checkpoint. Nothing of it is changed yet.

        UserError where a setting but `steps`, or a file that the recipe names, has changed and is not in `allow`.
        """
        path = run_at(name, "--resume")
        recipe = load_recipe(str(path / "recipe.yaml"), overrides)
        with told_of(path):
            folder = cls(path, recipe, console)
        try:
            with writing(path):
                folder.beginning = find_beginning(path, recipe, folder.store, console, overrides, allow)
        except BaseException:
            folder.close()
            raise
        folder.recipe = folder.beginning.recipe
        return folder

    def begin(self) -> None:
        """Take a reopened run over: what was recorded after its checkpoint is removed. Before, a resume can still be refused."""
        if self.beginning is not None:
            with writing(self.path):
                take_over(self.path, self.store, self.console, self.beginning)

    def close(self) -> None:
        self.store.close()
        self._lock.close()


def is_of_a_run(path: Path) -> bool:
    """Whether a run, or anything else, is there: all but what a run leaves that was killed before it was one."""
    return path.name[0] != "." and not path.name.startswith("run.db")


def path_for(name: str, out: str | None) -> Path:
    """`out`, or a new folder for a run of this name. UserError where it is in use."""
    try:
        folder = Path(out) if out else new_folder(RUNS, name)
    except OSError as error:
        raise UserError(f"{RUNS}: can't be written: {error}") from None
    if folder.exists() and (not folder.is_dir() or any(map(is_of_a_run, folder.iterdir()))):
        go_on = f", or go on with what is there: coterie train --resume {folder}" if is_run(folder) else ""
        raise UserError(f"--out {folder}: is in use; give another folder{go_on}")
    return folder


def new_folder(home: Path, name: str) -> Path:
    """The first free one of NAME, NAME-2, ..., made: another run that starts at the same time takes the next."""
    number = 1
    while True:
        folder = home / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


# The locks of `fcntl` belong to the process, which is not locked out by itself: so what it holds is one thing for all of it
_held: weakref.WeakValueDictionary[Path, TextIO] = weakref.WeakValueDictionary()


def locked(folder: Path) -> TextIO:
    """Hold the run for this process. The lock ends with the process, however it ends: what it has forked inherits none."""
    path = (folder / ".lock").absolute()
    mine = _held.get(path)
    if mine is not None and not mine.closed:  # to open and close it again would let go of it
        raise UserError(f"{folder}: is in use by process {os.getpid()}, this one")
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise UserError(f"{folder}: is in use by process {file.read().strip() or 'unknown'}") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    _held[path] = file
    return file
