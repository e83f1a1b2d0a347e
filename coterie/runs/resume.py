"""Where a run is gone on from: what was saved and recorded, compared with what is there now, then taken over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coterie.errors import UserError
from coterie.recipe import Recipe
from coterie.runs.checkpoint import STAGES, Position, find_checkpoint
from coterie.runs.console import Console
from coterie.runs.notice import Notice
from coterie.runs.reader import Reader
from coterie.runs.resume_check import at_home, check_inputs, inputs_of, portable
from coterie.runs.store import Store
from coterie.runs.surroundings import surroundings, what_differs
from coterie.runs.writing import write_whole


@dataclass(frozen=True)
class Beginning:
    """What a resume begins with.

    recipe: with its files where they lie now. position: of the newest whole checkpoint; None where nothing was saved. inputs,
    surroundings: by name. notices: which files lie elsewhere than before, what of the surroundings differs, and what else does and was
    allowed. overridden: whether a setting was.
    """

    recipe: Recipe
    position: Position | None
    inputs: Mapping[str, str]
    surroundings: Mapping[str, str]
    notices: Sequence[Notice]
    overridden: bool


def find_beginning(
    folder: Path, recipe: Recipe, store: Store, console: Console, overrides: Sequence[str], allow: Sequence[str]
) -> Beginning:
    """Find where a run stands, and that it is still the same run. Nothing of it is changed yet.

    UserError where a setting but `steps`, or a file that the recipe names, has changed and is not in `allow`.
    """
    before, surroundings_before = store.inputs_before()
    chosen = [override.partition("=")[0].strip() for override in overrides]
    recipe, moved = at_home(recipe, folder, before, chosen)
    now = inputs_of(recipe)
    position = _newest(folder / "checkpoints", console)
    lost = _lost_record(store, position, bool(before))
    was, found = ({"run.db": words} for words in lost) if lost else ({}, {})
    changes = check_inputs({**(before or now), **was}, {**now, **found}, allow)
    if position and position.stage == STAGES[-1] and position.step > recipe.steps:
        raise UserError(f"steps: {position.step} steps are done already, and {recipe.steps} are fewer")
    here = surroundings(recipe)
    made_with = {name: str(value) for name, value in (recipe.made_with or {}).items()}
    differs = what_differs(surroundings_before or made_with, here)
    elsewhere = "goes on in other surroundings, and the bits may differ from here"
    notices = [
        *(Notice("moved", line, f"goes on with {line}") for line in moved),
        *(Notice("surroundings", line, f"{elsewhere}: {line}") for line in differs),
        *(Notice("changed", line, f"goes on with a change: {line}") for line in changes),
    ]
    return Beginning(recipe, position, now, here, notices, bool(overrides))


def _newest(checkpoints: Path, console: Console) -> Position | None:
    """The newest whole checkpoint; None where there is none at all."""
    try:
        return find_checkpoint(checkpoints, console.warn)
    except UserError as error:
        if checkpoints.is_dir() and any(path.name[0] != "." for path in checkpoints.iterdir()):
            raise
        console.say(f"nothing was saved yet ({error}); starting from the beginning")
        return None


def _lost_record(store: Reader, position: Position | None, has_inputs: bool) -> tuple[str, str] | None:
    """What run.db should be and what it is, where it was deleted or an older copy put in its place."""
    if not has_inputs:
        return "the run's", "empty"
    if position is None:
        return None
    missing = position.step - store.num_steps(position.stage, position.step)
    return (f"whole to step {position.step}", f"without {missing} of its steps") if missing else None


def take_over(folder: Path, store: Store, console: Console, beginning: Beginning) -> None:
    """Remove what was recorded after the checkpoint, and record and say what differs from here on."""
    position = beginning.position or Position(STAGES[0], -1)
    store.truncate(position.stage, position.step, STAGES[STAGES.index(position.stage) + 1 :])
    if beginning.overridden or any(notice.kind == "moved" for notice in beginning.notices):
        write_whole(folder / "recipe.yaml", portable(beginning.recipe, folder))
    if beginning.overridden:
        for name in ("report.html", "summary.json"):  # of the run as it was; both are there again once it has ended
            (folder / name).unlink(missing_ok=True)
    store.inputs(beginning.inputs, beginning.surroundings)
    for notice in beginning.notices:
        console.warn(notice.shown)
        store.event(position.stage, max(position.step, 0), notice.kind, notice.text)
