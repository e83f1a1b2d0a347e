"""A run, its folder, and its exact resume."""

import json
import shutil
import signal
import sqlite3
import threading

import pytest
import small_runs
import torch
from conftest import some_quick
from safetensors.torch import load_file
from small_runs import digests, plan, recorded, select, trained
from transformers import AutoModelForCausalLM, AutoTokenizer

import coterie
from coterie.errors import RunFailedError, UserError
from coterie.runs import checkpoint
from coterie.runs.checkpoint import find_checkpoint
from coterie.runs.store import Store


@pytest.fixture
def finished():
    return small_runs.finished()


def test_the_run_folder_holds_what_it_promises(finished):
    for name in (
        "recipe.yaml",
        "run.db",
        "report.html",
        "summary.json",
        "checkpoints/step_000006",
        "model/config.json",
    ):
        assert (finished / name).exists(), name
    summary = json.loads((finished / "summary.json").read_text())
    for when in ("before", "after"):
        assert 0 <= summary[when]["accuracy"] <= 1
        assert 0 <= summary[when]["all_steps"] <= 1
        low, high = summary[when]["accuracy_interval"]
        assert low <= summary[when]["accuracy"] <= high
    assert summary["seed"] == 0
    assert summary["seconds"] > 0
    shown = summary["examples"]
    assert len(shown) == 4
    assert all(e["before_correct"] in (0, 1) and e["after_reward"] is not None for e in shown)
    with sqlite3.connect(finished / "run.db") as db:
        of_step = [
            db.execute("SELECT number, text FROM examples WHERE step = ? ORDER BY number", (n,)).fetchall()
            for n in (0, 6)
        ]
    changed = sum(before != after for before, after in zip(*of_step, strict=True))
    assert sum(e["before"] != e["after"] for e in shown) == min(4, changed)  # those that have changed come first


def test_steps_have_their_metrics_and_completions_their_records(finished):
    with sqlite3.connect(finished / "run.db") as db:
        for step in range(1, 7):
            names = {
                name for (name,) in db.execute("SELECT name FROM metrics WHERE stage = 'train' AND step = ?", (step,))
            }
            assert names >= {
                "reward/mean", "reward/right_answer", "reward/written_steps", "policy/entropy", "policy/kl",
                "policy/clip_low_share", "policy/clip_high_share", "completion/tokens_mean", "completion/truncated_share",
                "group/no_signal_share", "policy/ratio_max", "optimiser/learning_rate", "optimiser/grad_norm", "loss/total",
            }  # fmt: skip
        rows = db.execute(
            "SELECT tokens, pieces, sampler_logprobs, advantage, reward, reward_parts, ended, text FROM completions"
        ).fetchall()
    assert len(rows) == 6 * 3 * 4
    for tokens, pieces, logprobs, advantage, reward, parts, ended, text in rows:
        tokens, pieces, logprobs, parts = (json.loads(value) for value in (tokens, pieces, logprobs, parts))
        assert len(tokens) == len(pieces) == len(logprobs) > 0
        assert all(value <= 0 for value in logprobs)
        assert reward == pytest.approx(6 * parts["right_answer"] + 3 * parts["written_steps"])
        assert ended in ("stop", "length")
        assert "".join(pieces).removesuffix("<end>") == text
        assert isinstance(advantage, float)


def test_the_saved_model_gives_the_same_logits_in_transformers(finished):
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    trained_weights = load_file(finished / "checkpoints" / "step_000006" / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained_weights[name]), name
    messages = [{"role": "user", "content": "Solve 3x - 5 = 10"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == "Solve 3x - 5 = 10\n"
    with sqlite3.connect(finished / "run.db") as db:
        (text,) = db.execute("SELECT text FROM examples WHERE step = 6 AND number = 0").fetchone()
    answer = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == text


def test_the_report_opens_offline(finished):
    page = (finished / "report.html").read_text()
    assert "Plotly.newPlot" in page
    assert "<script src=" not in page
    assert '<link rel="stylesheet"' not in page
    assert "Step 1" in page
    assert "Step 6" in page


@pytest.mark.parametrize("stop_after", some_quick([1, 3, 5], 3))
def test_stopped_and_resumed_ends_with_the_same_bits(finished, tmp_path, stop_after):
    folder = trained(tmp_path / "run", stop_after=stop_after)
    assert not (folder / "model").exists()
    coterie.train(resume=str(folder))
    assert digests(folder) == digests(finished)
    assert recorded(folder) == recorded(finished)


def test_a_run_that_died_between_checkpoints_repeats_lost_steps(finished, tmp_path, monkeypatch):
    """It dies in the cold start, and then in step 4 of the GRPO stage, after a save at step 2 and the record of step 3."""
    folder = tmp_path / "run"
    plan("before_step:5:raise", monkeypatch.setattr)
    with pytest.raises(RuntimeError, match="on purpose"):
        trained(folder)
    plan("before_step:4:raise", monkeypatch.setattr)
    with pytest.raises(RuntimeError, match="on purpose"):
        coterie.train(resume=str(folder))
    assert (folder / "checkpoints" / "step_000002").exists()
    coterie.train(resume=str(folder))
    assert digests(folder) == digests(finished)
    assert recorded(folder) == recorded(finished)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(finished, tmp_path, capsys):
    folder = trained(tmp_path / "run", stop_after=5)
    weights = folder / "checkpoints" / "step_000005" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    coterie.train(resume=str(folder))
    printed = capsys.readouterr().out
    assert "step_000005" in printed
    assert "model.safetensors was changed" in printed
    assert digests(folder) == digests(finished)
    assert recorded(folder) == recorded(finished)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["model.safetensors", "optimiser.safetensors", "position.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["remove", "truncate", "zero"])
def test_every_damage_is_found(finished, tmp_path, victim, harm):
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / "step_000006" / victim
    size = newest.stat().st_size
    if harm == "remove":
        newest.unlink()
    else:
        newest.write_bytes(newest.read_bytes()[: size // 2] if harm == "truncate" else bytes(size))
    reports = []
    assert find_checkpoint(tmp_path / "checkpoints", reports.append).step < 6
    assert victim in reports[0]


def test_all_damaged_is_a_refusal_that_names_them(finished, tmp_path):
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    for path in (tmp_path / "checkpoints").iterdir():
        (path / "optimiser.safetensors").unlink()
    with pytest.raises(UserError, match=r"(?s)no checkpoint is whole.*step_000006.*step_000000"):
        find_checkpoint(tmp_path / "checkpoints", lambda _: None)


def test_a_folder_in_use_is_refused(finished):
    with pytest.raises(UserError, match=f"is in use.*--resume {finished}"):
        trained(finished)


def test_a_folder_without_a_run_is_no_run_to_go_on_with(tmp_path):
    (tmp_path / "recipe.yaml").write_text("steps: 3")
    with pytest.raises(UserError, match=r"is in use; give another folder$"):
        trained(tmp_path)


@pytest.mark.slow
def test_a_fresh_model_trains_with_no_cold_start(tmp_path):
    folder = trained(tmp_path / "zero", "cold_start=null", "steps=2", "preset=dapo")
    assert (folder / "model" / "model.safetensors").exists()


def test_seeds_differ(finished, tmp_path):
    assert digests(trained(tmp_path / "other", "seed=1")) != digests(finished)


@pytest.mark.slow
def test_a_record_that_is_lost_is_no_small_matter(tmp_path):
    """run.db deleted, an older copy put back, or no database at all: refused, and gone on with where that is allowed."""
    folder = trained(tmp_path / "run", stop_after=4)
    database, copy = folder / "run.db", tmp_path / "copy.db"
    shutil.copy(database, copy)
    with sqlite3.connect(database) as db:
        db.execute("DELETE FROM metrics WHERE stage = 'train' AND step > 2")
    with pytest.raises(
        UserError, match=r"run\.db: was whole to step 4, is without 2 of its steps(?s:.*)--allow run\.db"
    ):
        coterie.train(resume=str(folder))
    database.unlink()
    with pytest.raises(UserError, match=r"--allow run\.db"):
        coterie.train(resume=str(folder))
    database.write_bytes(b"no database" * 1000)
    with pytest.raises(RunFailedError, match=r"run\.db: is damaged"):
        coterie.train(resume=str(folder))
    database.unlink()
    run = coterie.train(resume=str(folder), allow=["run.db"])
    assert json.loads((folder / "summary.json").read_text())["after"]
    with sqlite3.connect(database) as db:
        assert db.execute("SELECT COUNT(*) FROM events WHERE kind = 'changed'").fetchone() == (1,)
    assert run.position.step == 4


def test_fewer_steps_than_are_done_are_refused(finished):
    with pytest.raises(UserError, match="6 steps are done already"):
        coterie.train(resume=str(finished), overrides=["steps=4"])


@pytest.mark.parametrize("lost", ["report.html", "summary.json"])
def test_a_run_killed_at_its_very_end_is_not_taken_for_finished(finished, tmp_path, lost):
    folder = shutil.copytree(finished, tmp_path / "copy")
    (folder / lost).unlink()
    coterie.train(resume=str(folder))
    assert (folder / lost).is_file()
    assert recorded(folder) == recorded(finished)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["after_sample", "in_reward", "before_backward"])
def test_a_signal_leaves_a_step_that_has_changed_nothing_yet(tmp_path, monkeypatch, point):
    """And saves what was there before it, also where that is not one of the steps that are saved anyway."""
    plan(f"{point}:4:term", monkeypatch.setattr)
    folder = tmp_path / "run"
    trained(folder, "cold_start=null", "steps=5", "checkpoint.every=50")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_000000", "step_000003"]
    assert not any(step == 4 for _, step, *_ in recorded(folder)["metrics"])
    coterie.train(resume=str(folder))
    whole = trained(tmp_path / "whole", "cold_start=null", "steps=5", "checkpoint.every=50")
    assert digests(folder) == digests(whole)
    assert recorded(folder) == recorded(whole)


def test_a_signal_lets_a_step_end_whose_weights_move(tmp_path, monkeypatch):
    plan("before_step:4:term", monkeypatch.setattr)
    folder = trained(tmp_path / "run", "cold_start=null", "checkpoint.every=50")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_000000", "step_000004"]


ENDED = """
import os, signal, time

def letters(completions, **columns):
    if not os.path.exists("asked"):
        open("asked", "w").close()
        os.kill(os.getpid(), signal.SIGTERM)
    if open("asked").read() == "":
        open("calls", "a").write(".")
        ENDS
    return [float(len(text)) for text in completions]
"""


@pytest.mark.parametrize(
    "ends", some_quick(["raise RuntimeError('a process ended')", "time.sleep(60)"], "time.sleep(60)")
)
def test_a_reward_that_a_stop_has_broken_is_no_failure(tmp_path, monkeypatch, ends):
    """A scheduler's signal goes to every process of a job: a reward's own die of it, and the reward raises, or waits for them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward.py").write_text(ENDED.replace("ENDS", ends))
    (tmp_path / "asked").write_text("no")
    more = ["cold_start=null", f"rewards=[{{function: '{tmp_path}/reward.py:letters', timeout: 1}}]"]
    trained(tmp_path / "run", *more, stop_after=2)
    (tmp_path / "asked").unlink()
    run = coterie.train(resume=str(tmp_path / "run"))
    assert run.stopped
    assert run.stop_signal == signal.SIGTERM
    assert (tmp_path / "calls").read_text() == "."
    (tmp_path / "asked").write_text("no")
    with sqlite3.connect(tmp_path / "run" / "run.db") as db:
        assert db.execute("SELECT MAX(step) FROM metrics WHERE stage = 'train'").fetchone() == (2,)
        assert db.execute("SELECT COUNT(*) FROM events WHERE kind = 'reward_failure'").fetchone() == (0,)
    coterie.train(resume=str(tmp_path / "run"))
    assert digests(tmp_path / "run") == digests(trained(tmp_path / "whole", *more))


def test_groups_that_do_not_fit_into_the_record_are_counted(tmp_path):
    folder = trained(tmp_path / "run", "cold_start=null", "steps=2", "record.max_megabytes_per_step=1e-6")
    found = recorded(folder)
    counted = {step: value for _, step, name, value in found["metrics"] if name == "record/num_left_out_groups"}
    assert counted == {1: 2.0, 2: 2.0}  # of three; one is always kept
    with sqlite3.connect(folder / "run.db") as db:
        query = "SELECT step, COUNT(DISTINCT prompt_number), COUNT(*) FROM completions GROUP BY step"
        assert db.execute(query).fetchall() == [(1, 1, 4), (2, 1, 4)]


def test_a_resume_reads_its_checkpoint_for_damage_once(tmp_path, monkeypatch):
    folder = trained(tmp_path / "run", stop_after=3)
    hashed = []
    real = checkpoint._sha256
    monkeypatch.setattr(checkpoint, "_sha256", lambda file: hashed.append(file) or real(file))
    coterie.train(resume=str(folder), stop_after=4)
    read = sorted(file.name for file in hashed if file.parent.name == "step_000003")
    assert read == ["model.safetensors", "optimiser.safetensors", "position.json"]


def test_steps_that_are_skipped_are_counted_across_a_resume(tmp_path):
    objective = tmp_path / "objective.py"
    objective.write_text("def never(terms):\n    return terms.policy_logprobs * float('nan')\n")
    more = ["cold_start=null", f"loss={{objective: '{objective}:never', kl_weight: 0}}", "limits.skipped_steps=4"]
    folder = trained(tmp_path / "run", *more, stop_after=2)
    with pytest.raises(RunFailedError, match="4 steps in a row"):
        coterie.train(resume=str(folder))
    assert {step for _, step, name, _ in recorded(folder)["metrics"] if name == "loss/total"} == {1, 2, 3, 4}


def test_a_limit_passed_all_along_is_one_event_across_a_resume(tmp_path):
    folder = trained(tmp_path / "run", "cold_start=null", "limits.entropy=100", stop_after=3)
    coterie.train(resume=str(folder))
    with sqlite3.connect(folder / "run.db") as db:
        assert db.execute("SELECT step FROM events WHERE kind = 'limit'").fetchall() == [(1,)]


def test_what_was_recorded_before_a_save_is_on_the_disk(tmp_path):
    """And not in the write-ahead log alone, which is not synced at every step."""
    store = Store(tmp_path / "run.db")
    store.event("train", 1, "kind", "message")
    store.sync()
    shutil.copy(tmp_path / "run.db", tmp_path / "without_log.db")
    store.close()
    with sqlite3.connect(tmp_path / "without_log.db") as db:
        assert db.execute("SELECT step FROM events").fetchall() == [(1,)]


@pytest.mark.slow
def test_another_writer_is_waited_for(tmp_path):
    """A backup, or a person who looks at the file, for longer than SQLite would wait by itself."""
    store, other = (
        Store(tmp_path / "run.db"),
        sqlite3.connect(tmp_path / "run.db", isolation_level=None, check_same_thread=False),
    )
    other.execute("BEGIN IMMEDIATE")
    free = threading.Timer(6.0, other.execute, ["ROLLBACK"])
    free.start()
    store.event("train", 1, "kind", "message")
    free.join()
    assert len(store.read("SELECT * FROM events")) == 1
    store.close()
    other.close()


@pytest.mark.slow
def test_a_run_without_a_compiler_says_so_and_resumes_exactly(tmp_path, without_kernels, monkeypatch, capsys):
    monkeypatch.setattr("coterie.training.train.why_missing", lambda dtype: "no C compiler (cc) was found")
    whole = trained(tmp_path / "whole")
    assert "no C compiler" in capsys.readouterr().out
    trained(tmp_path / "cut", stop_after=2)
    coterie.train(resume=str(tmp_path / "cut"))
    assert digests(tmp_path / "cut") == digests(whole)
    assert recorded(tmp_path / "cut") == recorded(whole)


EARLY = """
import pathlib

def note(what, completions):
    with pathlib.Path(__file__).with_name("events").open("a") as file:
        file.write(f"{what} {len(completions)}\\n")

def plain(completions):
    return [float(len(completion[0]["content"])) for completion in completions]

class Elsewhere:
    uses_cores = False

    def __call__(self, completions):
        note("called", completions)
        return plain(completions)

    def begin(self, completions):
        note("begun", completions)

elsewhere = Elsewhere()
"""


def test_a_reward_that_begins_during_sampling_changes_nothing(tmp_path):
    """One that asks elsewhere is given each group before it is called; the run is the same without."""
    (tmp_path / "early.py").write_text(EARLY)
    query = "SELECT step, text, reward FROM completions ORDER BY 1, 2"
    found = [
        select(trained(tmp_path / name, f"rewards={tmp_path}/early.py:{name}"), query)
        for name in ("elsewhere", "plain")
    ]
    assert found[0] == found[1]
    events = (tmp_path / "events").read_text().split("\n")
    assert events.count("begun 4") == 6 * 3  # steps, groups of each
    assert not any(event.startswith("begun") and event != "begun 4" for event in events)
