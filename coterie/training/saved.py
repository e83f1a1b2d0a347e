"""What a run has saved: the model at its end, and the ones of its checkpoints."""

from __future__ import annotations

import re
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from coterie.errors import UserError
from coterie.fast.serve import Policy
from coterie.models.adapters import add_adapter, dequantise
from coterie.models.codec import Codec
from coterie.models.heads import Scorer
from coterie.models.load import start_model
from coterie.recipe import RewardModel, load_recipe
from coterie.runs.checkpoint import STAGES, Position, TrainState, load_checkpoint
from coterie.runs.find import find_run
from coterie.runs.reader import Reader
from coterie.tasks.load import load_codec


@dataclass(frozen=True)
class Saved:
    """A model of a run: after this step, or the one at its end. note: what a person has to know of the choice."""

    run: Path
    step: int | None = None
    note: str = ""

    @classmethod
    def of(cls, source: str, step: int | None = None, *, best: bool = False) -> Saved | None:
        """The model that is meant by a run and perhaps a step, or by the folder of a checkpoint; None where it is no run's.

        Raises UserError where the run has no such model, with those that it has."""
        if step is not None and best:
            raise UserError("--step and --best: choose one checkpoint with one of them")
        path, run = Path(source), find_run(source)
        if run is None and path.parent.name == "checkpoints" and (found := _STEP.fullmatch(path.name)):
            run, step = find_run(str(path.parent.parent)), step if step is not None else int(found[1])
        if run is None:
            if step is not None or best:
                raise UserError(f"{source}: is no run, so it has no checkpoints to choose from")
            return None
        steps = saved_steps(run)
        there = f"its checkpoints: {', '.join(f'--step {number}' for number in steps) or 'none'}"
        if best:
            return cls(run, *best_step(run, steps))
        if step is None and not (run / "model").is_dir():
            raise UserError(
                f"{source}: this run has no model yet; it is written at the end of training. {there[0].upper()}{there[1:]}"
            )
        if step is not None and step not in steps:
            raise UserError(f"{source}: there is no checkpoint of step {step}; {there}")
        return cls(run, step)

    def __str__(self) -> str:
        return str(self.run) if self.step is None else f"{self.run}, step {self.step}"

    def model(self, device: torch.device) -> tuple[PreTrainedModel, Codec]:
        """The model of the checkpoint, adapters merged, and its tokenizer. UserError where the checkpoint is damaged."""
        assert self.step is not None, "the one at the end is a folder that transformers loads"
        recipe = load_recipe(str(self.run / "recipe.yaml"))
        codec = load_codec(recipe)
        model = start_model(recipe, codec, device)
        _load(self.run, 0, TrainState({"model": model}))
        if isinstance(recipe, RewardModel):
            policy = Policy.of(model)
            scorer = Scorer.from_policy(
                policy if recipe.lora is None else policy.with_adapter(recipe.lora, recipe.seed)
            )
            if self.step > 0:
                _load(self.run, self.step, TrainState({"model": scorer}))
            if scorer.adapter is not None:
                scorer.adapter.merge()
            return scorer.model, codec
        if self.step > 0:
            adapter = add_adapter(model, recipe.lora, recipe.seed) if recipe.lora is not None else None
            _load(self.run, self.step, TrainState({"model": adapter or model}))
            if adapter is not None:
                adapter.merge()
        dequantise(model)
        return model.to(device), codec


_STEP = re.compile(r"step_(\d+)")


def saved_steps(run: Path) -> list[int]:
    """The steps of training after which there is a checkpoint; 0 is the start."""
    names = [path.name for path in (run / "checkpoints").glob("step_*")]
    return sorted(int(found[1]) for name in names if (found := _STEP.fullmatch(name)))


def best_step(run: Path, steps: list[int]) -> tuple[int, str]:
    """Of these steps the one with the highest held-out accuracy, or reward where no accuracy was measured; of equals the last.
    Beside it, in words, a better one whose checkpoint was not kept. UserError where none was evaluated."""
    try:
        with Reader(run / "run.db") as record:
            name, values = record.held_out()
    except sqlite3.Error as error:
        raise UserError(f"{run / 'run.db'}: can't be read: {error}") from None
    kept = [step for step in steps if step in values]
    if not kept:
        raise UserError(
            f"{run}: no checkpoint was evaluated; set evaluation.every, and checkpoint.keep_best to keep the best"
        )
    best = max(values, key=lambda step: (values[step], step))
    chosen = max(kept, key=lambda step: (values[step], step))
    note = (
        f"the best held-out {name} was {values[best]:.4f} after step {best}, whose checkpoint was not kept "
        f"(checkpoint.keep_best); the best that was is of step {chosen}: {values[chosen]:.4f}"
    )
    return chosen, note if values[best] > values[chosen] else ""


def export(source: str, to: Path, step: int | None, *, best: bool) -> Saved:
    """Write a run's model and its tokenizer as a Hugging Face folder. Raises UserError where `to` is in use."""
    saved = Saved.of(source, step, best=best)
    if saved is None:
        raise UserError(f"export: {source} is no run")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to {to}: is in use; name a folder that is new or empty")
    try:
        if saved.step is None:
            shutil.copytree(saved.run / "model", to, dirs_exist_ok=True)
        else:
            save_model(to, *saved.model(torch.device("cpu")))
    except OSError as error:
        raise UserError(f"--to {to}: can't be written: {error}") from None
    return saved


def save_model(folder: Path, model: PreTrainedModel, codec: Codec) -> None:
    """A model and its tokenizer in Hugging Face format, whole or not at all."""
    aside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    codec.save(aside, model)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def _load(run: Path, step: int, state: TrainState) -> None:
    load_checkpoint(run / "checkpoints" / Position(STAGES[-1], step).name, state)
