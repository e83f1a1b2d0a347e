"""Checkpoints are written beside training, and the right ones are kept."""

import json
import os
import threading

import pytest
import torch

from coterie.errors import RunFailedError, UserError
from coterie.recipe.settings import Checkpoint
from coterie.runs import saving
from coterie.runs.checkpoint import (
    Position,
    Snapshot,
    TrainState,
    find_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    write_checkpoint,
)
from coterie.runs.console import Console
from coterie.runs.saving import Checkpoints
from coterie.runs.store import Store


@pytest.fixture
def state():
    model = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimiser.step()
    return TrainState({"model": model}, {"optimiser": (model, optimiser)}, {"kl_weight": 0.1})


def saved(folder, state, *steps):
    for step in steps:
        write_checkpoint(folder, Snapshot.of(Position("train", step), state))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def checkpoints(tmp_path):
    store = Store(tmp_path / "run.db")
    yield Checkpoints(tmp_path, store, Console(), 0)
    store.close()


def test_what_is_written_is_the_state_of_the_moment_it_was_taken(state, tmp_path, checkpoints, monkeypatch):
    """Training goes on while the write has not begun."""
    model = state.models["model"]
    before = model.weight.detach().clone()
    begin = threading.Event()

    def late(*given):
        begin.wait(10)
        return write_checkpoint(*given)

    monkeypatch.setattr(saving, "write_checkpoint", late)
    checkpoints.save(Position("train", 1), state, Checkpoint(), patience=None)
    with torch.no_grad():
        model.weight.add_(1.0)
    state.numbers["kl_weight"] = 9.0
    begin.set()
    checkpoints.wait()
    load_checkpoint(tmp_path / "checkpoints" / "step_000001", state)
    assert torch.equal(model.weight, before)
    assert state.numbers["kl_weight"] == 0.1


def test_a_save_that_failed_is_told_of_once(state, tmp_path, checkpoints):
    (tmp_path / "checkpoints").touch()
    checkpoints.save(Position("train", 1), state, Checkpoint(), patience=None)
    with pytest.raises(RunFailedError, match="this save needs"):
        checkpoints.wait()
    checkpoints.wait()
    assert not checkpoints.failed


def test_the_newest_the_best_and_the_start_are_kept(state, tmp_path):
    saved(tmp_path, state, 0, 2, 4, 6, 8)
    (tmp_path / ".step_000010.writing").mkdir()
    assert prune_checkpoints(tmp_path, 2, {4}) == []
    assert names(tmp_path) == ["step_000000", "step_000004", "step_000006", "step_000008"]


def test_a_checkpoint_is_written_anew_over_one_of_its_name(state, tmp_path):
    saved(tmp_path, state, 2)
    (tmp_path / "step_000002" / "model.safetensors").write_bytes(b"damaged")
    saved(tmp_path, state, 2)
    assert find_checkpoint(tmp_path, print).step == 2
    assert names(tmp_path) == ["step_000002"]


def test_a_checkpoint_of_another_model_is_refused(state, tmp_path):
    saved(tmp_path, state, 2)
    with pytest.raises(UserError, match="does not fit the model at weight"):
        load_checkpoint(tmp_path / "step_000002", TrainState({"model": torch.nn.Linear(3, 2)}))


def test_the_best_on_the_way_is_kept_until_the_end(tiny_recipe, tmp_path):
    import sqlite3

    import coterie

    given = [*tiny_recipe, "cold_start=null", "evaluation={prompts: 8, samples: 1, every: 2}", "optimiser.learning_rate=0.01",
             "checkpoint={every: 6, keep_last: 1, keep_best: 1}"]  # fmt: skip
    run = coterie.train("equations", overrides=given, out=str(tmp_path / "run"))
    with sqlite3.connect(run.folder / "run.db") as db:
        rows = db.execute(
            "SELECT step FROM evaluations WHERE mode = 'sampled' AND name = 'accuracy' AND step BETWEEN 1 AND 5 "
            "ORDER BY value DESC, step DESC"
        ).fetchall()
    assert f"step_{rows[0][0]:06d}" in names(run.folder / "checkpoints")


def test_the_best_of_a_reward_model_is_kept_too(tiny_recipe, tmp_path):
    """Its held-out figure is the share of pairs in the right order."""
    import coterie

    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}: ", "good": f"yes {n}", "bad": f"no {n}"}) + "\n" for n in range(12))
    )
    columns = "prompt: prompt, chosen: good, rejected: bad, heldout: 0.5"
    given = [tiny_recipe[0], "steps=6", "preset=reward_model", f"task={{data: {tmp_path / 'pairs.jsonl'}, {columns}}}",
             "tokenizer=bytes", "evaluation={every: 2}", "checkpoint={every: 6, keep_last: 1, keep_best: 1}"]  # fmt: skip
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    run = coterie.train(str(tmp_path / "recipe.yaml"), overrides=given, out=str(tmp_path / "run"))
    kept = names(run.folder / "checkpoints")
    assert [name for name in kept if name in ("step_000002", "step_000004")]


def with_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def without_the_optimiser(folder):
    (folder / "value_optimiser.safetensors").unlink()
    with_manifest(folder, lambda manifest: manifest.pop("value_optimiser.safetensors"))


def a_link_to_nowhere(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "gone")


def a_folder_for_a_file(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def a_file_that_cannot_be_read(folder):
    """Reading the start of a process's memory is an input/output error, as on a bad sector."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/proc/self/mem")
    with_manifest(folder, lambda manifest: manifest["model.safetensors"].update(bytes=0))


def pipe(file):
    file.unlink()
    os.mkfifo(file)


DAMAGE = {
    "the value model's optimiser gone, and from the manifest": (without_the_optimiser, "value_optimiser.safetensors"),
    "a link to nowhere": (a_link_to_nowhere, "model.safetensors is missing"),
    "a folder for a file": (a_folder_for_a_file, "model.safetensors is missing"),
    "a file that can't be read": (a_file_that_cannot_be_read, "model.safetensors can't be read"),
    "a manifest that nests": (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "manifest.json"),
    "a position that never ends": (lambda folder: pipe(folder / "position.json"), "position.json"),
    "a manifest that never ends": (lambda folder: pipe(folder / "manifest.json"), "manifest.json"),
    "a position that nests": (lambda folder: (folder / "position.json").write_text("[" * 100_000), "position.json"),
    "a manifest that is a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json"),
    "a manifest of wrong entries": (
        lambda folder: with_manifest(folder, lambda manifest: manifest.update({"model.safetensors": 3})), "manifest.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_other_damage_is_named_and_the_one_before_it_used(state, tmp_path, name):
    harm, words = DAMAGE[name]
    with_value = TrainState(state.models, {**state.optimisers, "value_optimiser": state.optimisers["optimiser"]})
    saved(tmp_path, with_value, 2, 4)
    harm(tmp_path / "step_000004")
    reports = []
    assert find_checkpoint(tmp_path, reports.append).step == 2
    assert len(reports) == 1
    assert words in reports[0]


def test_a_file_that_is_linked_or_too_many_is_no_damage(state, tmp_path):
    saved(tmp_path, state, 4)
    weights = tmp_path / "step_000004" / "model.safetensors"
    os.replace(weights, tmp_path / ".elsewhere")
    weights.symlink_to(tmp_path / ".elsewhere")
    (tmp_path / "step_000004" / "notes.txt").write_text("mine")
    assert find_checkpoint(tmp_path, pytest.fail).step == 4
