"""When a run is saved: its record first, then a copy of its state, and old checkpoints deleted."""

from __future__ import annotations

from pathlib import Path

from coterie.errors import RunFailedError
from coterie.recipe.settings import Checkpoint
from coterie.runs.checkpoint import STAGES, Position, Saver, Snapshot, TrainState, prune_checkpoints
from coterie.runs.console import Console
from coterie.runs.store import Store
from coterie.runs.writing import how_to_go_on, writing


class Checkpoints:
    """Those of one run, written while training goes on.

    saved: where the run stood when it was saved last in this session. resumed_at: the step that the session began after.
    """

    def __init__(self, folder: Path, store: Store, console: Console, resumed_at: int) -> None:
        self.saved: Position | None = None
        self._folder, self._store, self._console, self._resumed_at = folder, store, console, resumed_at
        self._saver = Saver(folder / "checkpoints")
        self._undeleted: list[str] = []  # old checkpoints that could not be deleted, to be told of

    @property
    def failed(self) -> bool:
        """Whether a save went wrong that nobody has been told of yet."""
        return self._saver.failed

    def save(self, position: Position, state: TrainState, settings: Checkpoint, *, patience: float | None) -> None:
        """Copy the state, and write the copy while training goes on. patience: seconds to wait for run.db, if it is held."""
        self.wait()
        best = self._store.best_steps(settings.keep_best)
        with writing(self._folder):
            self._store.settle(*([patience] if patience is not None else []))
            self._store.sync()

        def prune() -> None:
            kept = {*best, position.step}
            self._undeleted += prune_checkpoints(self._folder / "checkpoints", settings.keep_last, kept)

        self._saver.save(Snapshot.of(position, state), prune)
        self.saved = position

    def wait(self) -> None:
        """RunFailedError where the save under way failed. What could not be deleted is told of."""
        try:
            self._saver.wait()
        except OSError as error:
            raise RunFailedError(
                f"{self._folder / 'checkpoints'}: the checkpoint can't be written: {error}. {how_to_go_on(self._folder)}"
            ) from error
        for line in self._undeleted:
            self._console.warn(f"an old checkpoint can't be deleted: {line}")
            self._store.event(STAGES[-1], self._resumed_at, "not_deleted", line)
        self._undeleted.clear()
