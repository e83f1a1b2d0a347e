"""What a person sees while a run goes on: bars and colours in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from coterie.redact import shown

Made = TypeVar("Made")


class Console:
    """Prints messages, a line of metrics a step, a progress bar, and tables."""

    def __init__(self) -> None:
        self._rich = RichConsole(highlight=False)
        self._live = sys.stdout is not None and sys.stdout.isatty() and self._rich.is_terminal
        self._progress: Progress | None = None
        self._bar: TaskID | None = None

    def say(self, text: str = "") -> None:
        self._print(shown(text))

    def warn(self, text: str) -> None:
        text = shown(text)
        self._print(text if self._live else f"warning: {text}", style="yellow")

    def _print(self, text: str, style: str | None = None) -> None:
        """A stream that can't be written, a notebook's or a program's own, costs nobody a run."""
        with suppress(OSError, ValueError):
            if self._live:
                self._rich.print(text, style=style, markup=False, emoji=False)
            else:
                print(text, flush=True)

    def warning_of(self, make: Callable[[], Made]) -> Made:
        """What `make` returns, with what it warns of shown as a line each."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            made = make()
        for warning in caught:
            self.warn(str(warning.message))
        return made

    @contextmanager
    def progress(self, title: str, done: int, total: int) -> Iterator[None]:
        """A bar with the time left, while the block runs. Nothing where the output is no terminal."""
        if not self._live:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TextColumn("left"), TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=self._rich, transient=True) as self._progress:
            self._bar = self._progress.add_task(title, total=total, completed=done)
            try:
                yield
            finally:
                self._progress = None

    def step_done(self, step: int) -> None:
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, completed=step)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        title, header, rows = (
            shown(title),
            [shown(name) for name in header],
            [[shown(cell) for cell in row] for row in rows],
        )
        if self._live:  # all of it as text: a model, or a file's name, may hold what looks like markup
            table = Table(title=Text(title), title_justify="left")
            for name in header:
                table.add_column(Text(name))
            for row in rows:
                table.add_row(*map(Text, row))
            self._rich.print(table)
            return
        widths = [max(len(str(row[i])) for row in (header, *rows)) for i in range(len(header))]
        self.say(title)
        for row in (header, *rows):
            self.say("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
