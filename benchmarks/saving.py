"""What saving costs at the quick start's settings: the copy that a step waits for, and the write beside the next steps.

`python benchmarks/saving.py` writes benchmarks/results/saving.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tables import stamp, write_json

import coterie
from coterie.models.load import start_model
from coterie.recipe import load_recipe
from coterie.runs.checkpoint import Position, Snapshot, TrainState, write_checkpoint
from coterie.runs.reader import Reader
from coterie.tasks.load import load_codec
from coterie.training.step import make_optimiser

RECIPE, COLD_STEPS, STEPS, REPEATS = "equations", 200, 30, 9


def cost_of_saving(steps: int = STEPS) -> dict[str, Any]:
    """A step's seconds in a run of the recipe after a shorter cold start; a copy's and a write's, of a state of the same size.

    share_on_average: of copy and write together over the steps between two saves, as if nothing ran at once.
    """
    recipe = load_recipe(RECIPE)
    changes = [f"cold_start.steps={COLD_STEPS}", f"steps={steps}", "evaluation={prompts: 8, samples: 1, every: 0}"]
    with tempfile.TemporaryDirectory() as scratch:
        with contextlib.redirect_stdout(io.StringIO()):
            run = coterie.train(RECIPE, overrides=changes, out=f"{scratch}/run")
        store = Reader(run.folder / "run.db")
        step = statistics.median(
            row["value"] for row in store.read("SELECT value FROM metrics WHERE name = 'time/step_seconds'")
        )
        store.close()
        state = _state(recipe)
        position = Position("train", 1)
        snapshot = Snapshot.of(position, state)
        copy = _median_seconds(lambda: Snapshot.of(position, state))
        write = _median_seconds(lambda: write_checkpoint(Path(scratch), snapshot))
    every = recipe.checkpoint.every
    return {
        "recipe": RECIPE, "steps": steps, "every": every, "megabytes": round(snapshot.num_bytes / 1e6, 2),
        "step_seconds": round(step, 4), "copy_seconds": round(copy, 5), "write_seconds": round(write, 5),
        "share_on_average": round((copy + write) / (every * step), 6), "share_of_its_step": round(copy / step, 5),
        "held": (copy + write) / (every * step) <= 0.03,
    }  # fmt: skip


def _state(recipe: Any) -> TrainState:
    """The recipe's model and an optimiser that has taken a step."""
    model = start_model(recipe, load_codec(recipe), torch.device("cpu"))
    optimiser = make_optimiser(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    return TrainState({"model": model}, {"optimiser": (model, optimiser)})


def _median_seconds(work: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    found = cost_of_saving()
    print(json.dumps(found, indent=1))
    write_json("saving", {**stamp(sys.argv), **found})


if __name__ == "__main__":
    main()
