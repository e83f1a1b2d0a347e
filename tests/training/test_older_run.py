"""A run that an older version began is gone on with. `older_run.tar.gz` is one of commit d1ad225, stopped after step 2 of 4, with what its
uninterrupted twin ended with in `expected`: two thousand parameters, in /project.
"""

import json
import shutil
import sqlite3
import tarfile
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import coterie
from coterie.errors import UserError
from coterie.recipe import load_recipe, make_recipe, older
from coterie.rewards.load import load_rewards
from coterie.runs.reader import Reader
from coterie.runs.report import write_report
from coterie.runs.resume_check import check_inputs, inputs_of
from coterie.runs.store import Store


@pytest.fixture
def project(tmp_path):
    with tarfile.open(Path(__file__).with_name("older_run.tar.gz")) as opened:
        opened.extractall(tmp_path, filter="data")
    return tmp_path / "project"


def events(run, kind):
    with sqlite3.connect(run / "run.db") as db:
        return [message for (message,) in db.execute("SELECT message FROM events WHERE kind = ?", (kind,))]


def test_it_resumes_to_what_it_would_have_ended_with(project, capsys):
    run = project / "runs" / "project"
    coterie.train(resume=str(run))
    expected = load_file(project / "expected" / "model.safetensors")
    found = load_file(run / "model" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():  # to the bit where it was made; another processor rounds otherwise
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)
    record = json.loads((project / "expected" / "record.json").read_text())
    with sqlite3.connect(run / "run.db") as db:
        query = "SELECT step, prompt_number, completion_number, tokens, reward FROM completions ORDER BY 1, 2, 3"
        assert [list(row) for row in db.execute(query)] == record["completions"]
        metrics = {(step, name): value for _, step, name, value in db.execute("SELECT * FROM metrics")}
    for step, name, value in record["metrics"]:
        assert metrics[step, name] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, name)
    assert "goes on in other surroundings" in capsys.readouterr().out
    assert (
        any(line.startswith("commit: was d1ad225583b6") for line in events(run, "surroundings"))
        or not (Path(coterie.__file__).parent.parent / ".git").exists()
    )


def test_it_goes_on_with_the_files_of_the_project_it_lies_in_now(project):
    """Its recipe names /project/data.jsonl, and /project is somewhere else by now."""
    run = project / "runs" / "project"
    coterie.train(resume=str(run), stop_after=3)
    assert len(events(run, "moved")) == 2
    recipe = (run / "recipe.yaml").read_text()
    assert "data: ../../data.jsonl" in recipe
    assert "function: ../../reward.py:letters" in recipe or "/project/" not in recipe.replace(str(project), "")


def test_a_copy_does_not_go_on_with_the_originals_files(project, tmp_path):
    copy = shutil.copytree(project, tmp_path / "copy")
    recipe = copy / "runs" / "project" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("/project/", f"{project}/"))
    (copy / "data.jsonl").write_text('{"prompt": "other"}\n{"prompt": "rows"}\n')
    with pytest.raises(UserError, match=r"task\.data: the run began with .*another content.*--set task\.data="):
        coterie.train(resume=str(copy / "runs" / "project"))


def test_its_report_is_read_without_changing_it(project):
    run = project / "runs" / "project"
    before = (run / "run.db").read_bytes()
    assert "Step 2" in write_report(run).read_text()
    assert (run / "run.db").read_bytes() == before


def test_a_database_of_a_newer_version_is_refused_in_a_sentence(tmp_path):
    with sqlite3.connect(tmp_path / "run.db") as db:
        db.execute("PRAGMA user_version=99")
    for opened in (Reader, Store):
        with pytest.raises(UserError, match=r"run\.db: was written by a newer version of coterie \(its schema is 99"):
            opened(tmp_path / "run.db")


def test_a_column_that_this_version_does_not_know_is_left_alone(project):
    run = project / "runs" / "project"
    with sqlite3.connect(run / "run.db") as db:
        for table in ("metrics", "completions", "events", "evaluations", "examples", "inputs"):
            db.execute(f"ALTER TABLE {table} ADD COLUMN note TEXT")
    coterie.train(resume=str(run))
    assert (run / "report.html").is_file()


def test_a_setting_that_is_new_is_no_change_at_its_default(project):
    """As for a run that was begun before the setting was there."""
    run = project / "runs" / "project"
    with sqlite3.connect(run / "run.db") as db:
        names = (
            "record.max_megabytes_per_step",
            "rewards.letters.weight",
            "task.split",
            "limits.skipped_steps",
            "max_failed_rewards",
        )
        for name in names:
            assert db.execute("DELETE FROM inputs WHERE name = ?", (name,)).rowcount == 1
        db.execute("DELETE FROM inputs WHERE name = 'group_size'")  # 2, and its default is another
    with pytest.raises(UserError, match="group_size: was not there, is 2") as error:
        coterie.train(resume=str(run))
    assert not any(name in str(error.value) for name in names)


def test_what_an_older_version_did_otherwise_is_refused_by_name(project):
    recipe = project / "runs" / "project" / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "unheard_of: 3\n")
    with pytest.raises(UserError, match="unheard_of: there is no such setting"):
        load_recipe(str(recipe))


def test_a_reward_function_that_moved_is_found_by_its_old_name(tmp_path):
    """In a recipe, and in a run that began with it."""
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {type: qwen3}\ntask: equations\nrewards: ['coterie.rewards.steps:right_answer']\n")
    recipe = load_recipe(str(path))
    (reward,) = load_rewards(recipe.rewards)
    assert reward.name == "right_answer"
    assert reward.function(completions=["x = 5", "x = 4"], equation=["3x - 5 = 10"] * 2) == [1.0, 0.0]
    now = inputs_of(recipe)
    before = {**now, "rewards.right_answer.function": '"coterie.rewards.steps:right_answer"'}
    assert check_inputs(before, now, ()) == []
    before["rewards.right_answer.function"] = '"coterie.rewards.steps:written_steps"'
    with pytest.raises(UserError, match=r"rewards\.right_answer\.function: was .*written_steps"):
        check_inputs(before, now, ())


def test_any_recipe_may_use_an_old_name_and_is_told_the_new_one(monkeypatch, tmp_path):
    monkeypatch.setitem(older.RENAMED, "kl.old", "kl.estimator")
    least = {"model": {"type": "qwen3"}, "task": "equations", "rewards": ["m:f"]}
    with pytest.warns(UserWarning, match=r"^recipe: kl\.old is called kl\.estimator now"):
        assert make_recipe({**least, "kl": {"old": "k1"}}).kl.estimator == "k1"
    with pytest.raises(UserError, match=r"kl\.old: is called kl\.estimator now, and both are given"):
        make_recipe({**least, "kl": {"old": "k1", "estimator": "k2"}})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**least, "made_with": {}, "kl": {"old": "k1"}}))
    with warnings.catch_warnings(action="error"):
        recipe = load_recipe(str(tmp_path / "recipe.yaml"))  # a run's own, which nobody wrote by hand
    now = inputs_of(recipe)
    before = {("kl.old" if name == "kl.estimator" else name): value for name, value in now.items()}
    assert check_inputs(before, now, ()) == []
