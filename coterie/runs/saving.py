"""When a run is saved: its record first, then a copy of its state, and old checkpoints deleted."""

from __future__ import annotations

import threading
from pathlib import Path

from coterie.errors import RunFailedError
from coterie.recipe.settings import Checkpoint
from coterie.runs.checkpoint import (
    STAGES,
    Position,
    Snapshot,
    TrainState,
    prune_checkpoints,
    write_checkpoint,
)
from coterie.runs.console import Console
from coterie.runs.store import Store
from coterie.runs.writing import how_to_go_on, writing


class Checkpoints:
    """Those of one run, written one at a time, each by a thread while training goes on.

    saved: where the run stood when it was saved last in this session. resumed_at: the step that the session began after.
    """

    def __init__(self, folder: Path, store: Store, console: Console, resumed_at: int) -> None:
        self.saved: Position | None = None
        self._folder, self._store, self._console, self._resumed_at = folder, store, console, resumed_at
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None  # of a save that nobody has waited for yet
        self._undeleted: list[str] = []  # old checkpoints that could not be deleted, to be told of

    @property
    def failed(self) -> bool:
        """Whether a save went wrong that nobody has been told of yet."""
        return self._error is not None

    def save(self, position: Position, state: TrainState, settings: Checkpoint, *, patience: float | None) -> None:
        """Copy the state, and write the copy while training goes on. patience: seconds to wait for run.db, if it is held."""
        self.wait()
        kept = {*self._store.best_steps(settings.keep_best), position.step}
        with writing(self._folder):
            self._store.settle(*([patience] if patience is not None else []))
            self._store.sync()
        snapshot, checkpoints = Snapshot.of(position, state), self._folder / "checkpoints"

        def write() -> None:
            try:
                write_checkpoint(checkpoints, snapshot)
                self._undeleted += prune_checkpoints(checkpoints, settings.keep_last, kept)
            except Exception as error:  # of a thread: told to the one that waits for it
                self._error = error

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()
        self.saved = position

    def wait(self) -> None:
        """Until what was begun is written. RunFailedError where that failed. What could not be deleted is told of."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if isinstance(error, OSError):
            raise RunFailedError(
                f"{self._folder / 'checkpoints'}: the checkpoint can't be written: {error}. {how_to_go_on(self._folder)}"
            ) from error
        if error is not None:
            raise error
        for line in self._undeleted:
            self._console.warn(f"an old checkpoint can't be deleted: {line}")
            self._store.event(STAGES[-1], self._resumed_at, "not_deleted", line)
        self._undeleted.clear()
