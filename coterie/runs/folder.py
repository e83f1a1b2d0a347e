"""A run's folder: made, held by one process, written whole; and what is said where it can't be."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sqlite3
import subprocess
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from safetensors import SafetensorError

import coterie
from coterie.errors import UserError
from coterie.redact import hidden_in
from coterie.runs.find import RUNS, is_run
from coterie.types import Scored

Row = tuple[list[int], ...]  # the tokens of a prompt, and of the answers that are learned from


class RunFailedError(RuntimeError):
    """The run can't go on, through no mistake in what the user gave."""


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


def write_rows(file: Path, scored: Scored | None, rows: Sequence[Row], pieces: Any) -> Path:
    """Write what a step learned from as JSON lines: completions with everything that went into the loss, or rows."""
    texts = ([("".join(pieces(tokens)), tokens) for tokens in row] for row in rows)
    written: list[dict[str, Any]] = [
        {"prompt": prompt, "prompt_tokens": tokens, "answers": [{"text": text, "tokens": own} for text, own in answers]}
        for (prompt, tokens), *answers in texts
    ]
    for p, group in enumerate(scored.groups if scored is not None else ()):
        for c, completion in enumerate(group.completions):
            assert scored is not None
            written.append(
                {
                    "prompt": group.prompt.content,
                    "completion": completion.text,
                    "reward": scored.rewards[p, c].item(),
                    "parts": {name: part[p, c].item() for name, part in scored.parts.items()},
                    "tokens": completion.tokens,
                    "sampler_logprobs": completion.logprobs.tolist(),
                }
            )
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(hidden_in(row), ensure_ascii=False) + "\n" for row in written), encoding="utf-8")
    return file


def is_of_a_run(path: Path) -> bool:
    """Whether a run, or anything else, is there: all but what a run leaves that was killed before it was one."""
    return path.name[0] != "." and not path.name.startswith("run.db")


def write_whole(file: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    aside = file.with_name(f".{file.name}.writing")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)


def folder_for(name: str, out: str | None) -> Path:
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


_held: weakref.WeakValueDictionary[Path, TextIO] = (
    weakref.WeakValueDictionary()
)  # a process is not locked out by itself


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


def versions() -> dict[str, str]:
    """What made a run: versions, and the commit where the package lies in a git checkout."""
    found = {"coterie": coterie.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    try:
        home = Path(coterie.__file__).resolve().parent.parent
        asked = subprocess.run(
            ["git", "-C", str(home), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
        inside = (home / ".git").exists() and asked.returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        inside = False
    return {**found, "commit": asked.stdout.strip()} if inside else found
