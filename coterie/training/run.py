"""A run and its folder: where it stands, what is recorded of it, when it is saved, and how it is stopped."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch
import transformers
from torch import Tensor

import coterie
from coterie.errors import UserError
from coterie.evals.evaluate import Evaluation
from coterie.recipe import Recipe, load_recipe
from coterie.runs.console import Console
from coterie.runs.store import Store
from coterie.sections import section
from coterie.training.checkpoint import (
    STAGES,
    Position,
    TrainState,
    find_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from coterie.training.profile import Profiler
from coterie.types import Scored

MAX_SKIPPED_IN_A_ROW = 5


class RunFailedError(RuntimeError):
    """The run can't go on, through no mistake in what the user gave."""


class Run:
    """One run folder, locked to this process. Make it with `Run.create` or `Run.reopen`."""

    def __init__(self, folder: Path, recipe: Recipe, console: Console, *, stop_after: int | None = None) -> None:
        self.folder, self.recipe, self.console = folder, recipe, console
        self._lock = _locked(folder)
        self.store = Store(folder / "run.db")
        self.profiler: Profiler | None = None  # watches some of the steps, if one is put here
        self.position: Position | None = None  # of the checkpoint that was resumed from
        self.stop_signal: int | None = None
        self._stop_after = stop_after
        self._stop_requested = False
        self._seconds_before = 0.0
        self._started = time.monotonic()
        self._skipped_in_a_row = 0

    @classmethod
    def create(cls, recipe: Recipe, name: str, out: str | None, console: Console, *, stop_after: int | None) -> Run:
        """A new folder: `out`, or the first free one of runs/NAME, runs/NAME-2, ..."""
        folder = Path(out) if out else _free_folder(Path("runs"), name)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"--out {folder}: is in use; give another folder, or go on with what is there: coterie train --resume {folder}"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stored = recipe.model_copy(update={"made_with": _versions()})
            (folder / "recipe.yaml").write_text(stored.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{folder}: can't be written: {error.strerror}") from None
        return cls(folder, recipe, console, stop_after=stop_after)

    @classmethod
    def reopen(cls, name: str, overrides: list[str], console: Console, *, stop_after: int | None) -> Run:
        """An earlier run, at its newest whole checkpoint. What was recorded after it is removed."""
        folder = Path(name) if Path(name).exists() else Path("runs") / name
        if not (folder / "recipe.yaml").is_file():
            raise UserError(f"--resume {name}: no run is there: {folder / 'recipe.yaml'} does not exist")
        for override in overrides:
            if not override.startswith("steps="):
                raise UserError(f"--set {override}: a resumed run keeps its recipe; only steps=N can be set anew")
        run = cls(folder, load_recipe(str(folder / "recipe.yaml"), overrides), console, stop_after=stop_after)
        if overrides:
            (folder / "recipe.yaml").write_text(run.recipe.to_yaml(), encoding="utf-8")
            (folder / "summary.json").unlink(missing_ok=True)
        try:
            run.position = find_checkpoint(folder / "checkpoints", console.warn)
        except UserError as error:
            if (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir()):
                raise
            console.say(f"nothing was saved yet ({error}); starting from the beginning")
        position = run.position or Position(STAGES[0], -1)
        run._seconds_before = position.seconds
        later = STAGES[STAGES.index(position.stage) + 1 :]
        run.store.truncate(position.stage, position.step, later)
        return run

    @property
    def seconds(self) -> float:
        """How long the run has taken, all sessions together."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def stopped(self) -> bool:
        """Whether the run was asked to stop before its end."""
        return self._stop_requested

    def remaining(self, stage: str, num_steps: int) -> Iterator[int]:
        """The steps of a stage that are not done yet, numbered from 1, until the run is asked to stop."""
        done = self.position.step if self.position and self.position.stage == stage else 0
        if self.profiler is not None:
            self.profiler.begin_stage(done + 1, self._last_step(stage, done + 1, num_steps))
        with self.console.progress(stage, done, num_steps):
            for step in range(done + 1, num_steps + 1):
                with self.profiler.step(stage, step) if self.profiler is not None else nullcontext():
                    yield step
                self.console.step_done(step)
                if self._should_stop(stage, step):
                    self._stop_requested = step < num_steps or stage != STAGES[-1]
                    return

    def restore(self, stage: str, state: TrainState) -> None:
        """Put what the checkpoint holds in place, if the run was resumed inside this stage."""
        if self.position and self.position.stage == stage and self.position.step > 0:  # step 0 is the start itself
            load_checkpoint(self.folder / "checkpoints" / self.position.name, state)

    @section("record")
    def record(
        self,
        stage: str,
        step: int,
        metrics: Mapping[str, float],
        scored: Scored | None = None,
        advantages: Tensor | None = None,
        pieces: Any = None,
    ) -> None:
        """Write a step: its metrics and its completions, in one transaction."""
        with self.store.transaction():
            self.store.metrics(stage, step, metrics)
            if scored is not None and advantages is not None:
                limit = self.recipe.record.max_megabytes_per_step * 1e6
                self.store.completions(stage, step, scored, advantages, pieces, max_bytes=limit)
        for failure in scored.failures[:3] if scored else ():
            where = f"prompt {failure.group + 1}, completion {failure.completion + 1}"
            self.store.event(stage, step, "reward_failure", f"{failure.reward}, {where}: {failure.reason}")
        if metrics.get("optimiser/skipped_share"):
            self._skipped_in_a_row += 1
            self.store.event(stage, step, "step_skipped", "the loss or its gradient was not finite")
            if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise RunFailedError(
                    f"the loss or its gradient was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row; the weights are as "
                    "they were before. A lower optimiser.learning_rate may help"
                )
        else:
            self._skipped_in_a_row = 0

    @section("record")
    def record_evaluation(
        self, stage: str, step: int, evaluation: Evaluation, examples: list[tuple[str, str]] | None = None
    ) -> None:
        with self.store.transaction():
            for mode, estimates in evaluation.estimates.items():
                for name, e in estimates.items():
                    self.store.evaluation(stage, step, mode, name, e.value, e.low, e.high, e.count)
            for number, (prompt, text) in enumerate(examples or ()):
                self.store.example(stage, step, number, prompt, text)

    def checkpoint(self, stage: str, step: int, state: TrainState, *, last: bool = False) -> None:
        """Save if it is time to, at the end of a stage, and before a stop."""
        if last or step % self.recipe.checkpoint.every == 0 or self._should_stop(stage, step):
            with section("checkpoint"):
                self._save(Position(stage, step, self.seconds), state)

    def _save(self, position: Position, state: TrainState) -> None:
        folder = self.folder / "checkpoints"
        try:
            save_checkpoint(folder, position, state)
        except OSError as error:
            raise RunFailedError(f"{folder}: the checkpoint can't be written: {error}") from error
        prune_checkpoints(folder, self.recipe.checkpoint.keep_last)

    def _last_step(self, stage: str, first: int, num_steps: int) -> int:
        """The last step that this session takes of a stage, unless a signal stops it."""
        stop = self._stop_after if stage == STAGES[-1] else None
        return stop if stop is not None and first <= stop <= num_steps else num_steps

    def _should_stop(self, stage: str, step: int) -> bool:
        return self.stop_signal is not None or (stage == STAGES[-1] and step == self._stop_after)

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM end the run after the step under way, with a checkpoint. A second one ends it at once."""

        def stop(number: int, _: FrameType | None) -> None:
            if self.stop_signal is not None:
                raise KeyboardInterrupt
            self.stop_signal = number
            self.console.say(f"{signal.Signals(number).name}: finishing this step, then saving; again to end at once")

        try:
            before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread, where Python allows no handlers
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def close(self) -> None:
        self.store.close()
        self._lock.close()


def _free_folder(home: Path, name: str) -> Path:
    number = 1
    while (folder := home / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def _locked(folder: Path) -> TextIO:
    """Hold the run for this process. The lock ends with the process, however it ends."""
    file = (folder / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise UserError(f"{folder}: is in use by process {file.read().strip() or 'unknown'}") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _versions() -> dict[str, str]:
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
