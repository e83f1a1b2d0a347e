"""What a resume compares with the start: settings by name, and the content of files."""

import json
from pathlib import Path

import pytest

from coterie.errors import UserError
from coterie.recipe import load_recipe, make_recipe
from coterie.recipe.presets import PRESETS
from coterie.runs.resume_check import at_home, check_inputs, inputs_of


@pytest.fixture
def inputs(tmp_path):
    """Those of a recipe with a data file, a reward file, a model folder and a file among a reward's options."""
    for name, text in {
        "data.jsonl": "{}",
        "mine.py": "",
        "rubric.txt": "be kind",
        "model/config.json": "{}",
        "model/notes.md": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    def make(**changes):
        values = {"model": str(tmp_path / "model"), "task": {"data": str(tmp_path / "data.jsonl")}, "preset": "grpo",
                  "rewards": [{"function": f"{tmp_path}/mine.py:f", "options": {"rubric": f"{tmp_path}/rubric.txt"}}],
                  **changes}  # fmt: skip
        return inputs_of(make_recipe(values))

    return make


def test_nothing_has_changed(inputs):
    assert check_inputs(inputs(), inputs(), []) == []
    assert check_inputs(inputs(), inputs(steps=7), []) == []  # more steps are no change


def test_every_changed_setting_is_named_with_what_it_was_and_is(inputs):
    with pytest.raises(UserError) as error:
        check_inputs(inputs(), inputs(group_size=4, optimiser={"learning_rate": 0.5}), [])
    assert "group_size: was 8, is 4" in str(error.value)
    assert "optimiser.learning_rate: was 1e-06, is 0.5" in str(error.value)
    assert "--allow group_size --allow optimiser.learning_rate" in str(error.value)


def test_what_is_allowed_is_told_of_and_nothing_else_is(inputs):
    now = inputs(group_size=4, seed=3)
    assert check_inputs(inputs(), now, ["group_size", "seed"]) == ["group_size: was 8, is 4", "seed: was 0, is 3"]
    with pytest.raises(UserError, match="seed: was 0") as error:
        check_inputs(inputs(), now, ["group_size"])
    assert "group_size" not in str(error.value)
    with pytest.raises(UserError, match="--allow grop_size"):
        check_inputs(inputs(), inputs(), ["grop_size"])


FILES = {"data.jsonl": "task.data", "mine.py": "rewards.f.function", "rubric.txt": "rewards.f.options.rubric", "model/config.json": "model"}  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_has_changed_or_gone_is_named_by_its_setting(inputs, tmp_path, file):
    before = inputs()
    (tmp_path / file).write_text(json.dumps("else"))
    with pytest.raises(UserError, match=f"{FILES[file]}: the file is not what it was"):
        check_inputs(before, inputs(), [])
    assert len(check_inputs(before, inputs(), [FILES[file]])) == 1
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match=FILES[file]):
        check_inputs(before, inputs(), [])


def test_a_file_that_is_called_otherwise_is_no_change(inputs, tmp_path):
    before = inputs()
    for old, new in (("data.jsonl", "rows.jsonl"), ("mine.py", "ours.py")):
        (tmp_path / old).rename(tmp_path / new)
    changed = {
        "task": {"data": str(tmp_path / "rows.jsonl")},
        "rewards": [
            {"function": f"{tmp_path}/ours.py:f", "name": "f", "options": {"rubric": f"{tmp_path}/rubric.txt"}}
        ],
    }
    assert check_inputs(before, inputs(**changed), []) == []
    (tmp_path / "rows.jsonl").write_text("[]")
    with pytest.raises(UserError, match=r"task\.data: the file is not what it was"):
        check_inputs(before, inputs(**changed), [])
    (tmp_path / "rows.jsonl").write_text("{}")
    changed["rewards"][0]["function"] = f"{tmp_path}/ours.py:g"
    with pytest.raises(UserError, match=r"rewards\.f\.function: was .*mine\.py:f"):
        check_inputs(before, inputs(**changed), [])


@pytest.mark.parametrize("place", ["runs/old/run", "linked"])
def test_a_run_that_lies_elsewhere_finds_its_project_s_files(tmp_path, place):
    """Deeper in its project, or on another disk with a link to it."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "data.jsonl").write_text("{}")
    (project / "mine.py").write_text("")
    values = {"model": {"type": "gpt2"}, "task": {"data": "data.jsonl"}, "rewards": ["mine.py:f"], "preset": "grpo"}
    recipe = make_recipe(values, folder=project)
    folder = project / place
    real = folder if place != "linked" else tmp_path / "disk" / "run"
    real.mkdir(parents=True)
    if real != folder:
        folder.symlink_to(real)
    kept = values | {"task": {"data": "../data.jsonl"}, "rewards": ["../mine.py:f"]}  # as a run's own recipe says it
    found, lines = at_home(make_recipe(kept, folder=real), folder, inputs_of(recipe), [])
    assert Path(found.task.data).resolve() == project / "data.jsonl"
    assert Path(found.rewards[0].function.removesuffix(":f")).resolve() == project / "mine.py"
    assert len(lines) == 2
    assert check_inputs(inputs_of(recipe), inputs_of(found), []) == []


def test_a_file_that_is_gone_is_asked_for_as_it_has_to_be_given(inputs, tmp_path):
    before = inputs()
    for name in ("data.jsonl", "mine.py"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError) as error:
        check_inputs(before, inputs(), [])
    assert "--set task.data=PATH" in str(error.value).splitlines()[-1]
    assert str(error.value).splitlines()[-2].endswith("--set rewards.f.function=PATH:f")


def test_of_a_model_folder_only_what_makes_the_model_counts(inputs, tmp_path):
    before = inputs()
    (tmp_path / "model" / "notes.md").write_text("a note")
    assert check_inputs(before, inputs(), []) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_a_run_s_own_copy_of_a_recipe_is_the_same_recipe(tmp_path, preset):
    """It leaves out what does nothing, and must mean the same when it is read back."""
    pairs = {"data": "data.jsonl", "answer": "good", "chosen": "good", "rejected": "bad"}
    values = {"model": {"type": "gpt2"}, "tokenizer": "bytes", "task": pairs, "preset": preset}
    if PRESETS[preset].get("method", "grpo") in ("grpo", "ppo"):
        values |= {"rewards": ["mine.py:f"], "group_size": 4}
    recipe = make_recipe(values, folder=tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert check_inputs(inputs_of(recipe), inputs_of(load_recipe(str(tmp_path / "recipe.yaml"))), []) == []


@pytest.mark.parametrize(
    "recipe", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_a_run_s_own_copy_of_a_bundled_recipe_is_the_same_recipe(tmp_path, recipe):
    loaded = load_recipe(str(recipe))
    (tmp_path / "recipe.yaml").write_text(loaded.to_yaml())
    assert check_inputs(inputs_of(loaded), inputs_of(load_recipe(str(tmp_path / "recipe.yaml"))), []) == []


def test_a_run_as_a_reward_model_is_its_model(inputs, tmp_path):
    run = tmp_path / "scorer"
    (run / "model").mkdir(parents=True)
    (run / "recipe.yaml").write_text("")
    (run / "model" / "model.safetensors").write_text("one")
    rewards = [{"function": "reward_model", "options": {"model": str(run)}}]
    before = inputs(rewards=rewards)
    (run / "model" / "model.safetensors").write_text("two")
    with pytest.raises(UserError, match=r"rewards\.reward_model\.options\.model: the file"):
        check_inputs(before, inputs(rewards=rewards), [])


def test_a_judges_cache_may_change(inputs, tmp_path):
    """It is written to while the run goes on."""
    rewards = [{"function": "judge", "options": {"rubric": "kind", "cache": str(tmp_path / "cache")}}]
    before = inputs(rewards=rewards)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "verdicts.json").write_text("{}")
    assert check_inputs(before, inputs(rewards=rewards), []) == []


def test_a_change_in_the_middle_of_a_large_file_is_seen(inputs, tmp_path):
    with (tmp_path / "data.jsonl").open("wb") as file:
        file.truncate((1 << 28) + (1 << 23))
    before = inputs()
    with (tmp_path / "data.jsonl").open("r+b") as file:
        file.seek(1 << 27)
        file.write(b"x")
    with pytest.raises(UserError, match=r"task\.data: the file"):
        check_inputs(before, inputs(), [])


def test_a_chat_template_that_has_changed_come_or_gone_is_named(inputs, tmp_path):
    template = tmp_path / "model" / "chat_template.jinja"
    without = inputs()
    template.write_text("{{ messages }}")
    first = inputs()
    template.write_text("{{ messages[0] }}")
    for before, now in ((first, inputs()), (without, first), (first, without)):
        with pytest.raises(UserError, match=r"model: chat_template\.jinja, which it uses, is not what it was") as error:
            check_inputs(before, now, [])
        assert "--allow model\n" in f"{error.value}\n"
        assert len(check_inputs(before, now, ["model"])) == 1


@pytest.fixture
def own_package(tmp_path, monkeypatch):
    """A package on the path, with a module that uses two others, and a file beside a reward's file."""
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    for name, text in {
        "lib/scoring_of_mine/__init__.py": "",
        "lib/scoring_of_mine/rewards.py": "import json, numpy\nfrom .words import WORDS\ndef f(**_): ...",
        "lib/scoring_of_mine/words.py": "def late():\n    from scoring_of_mine.deep import table\n",
        "lib/scoring_of_mine/deep/__init__.py": "",
        "lib/scoring_of_mine/deep/table.py": "A = 1",
        "lib/scoring_of_mine/unused.py": "",
        "helpers.py": "B = 2",
        "mine.py": "import helpers\nimport scoring_of_mine.words\nimport missing_module\nimport coterie\n",
        "near/far.py": "D = 4",
        "near/looks.py": "import importlib, sys\nsys.path.insert(0, 'more')\nimport inner\nimportlib.import_module('helpers')\n",
        "near/more/inner.py": "import far",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


USED = {
    "module": ("scoring_of_mine.rewards:f", ("rewards.py", "words.py", "deep/table.py")),
    "file": ("mine.py:f", ("../../helpers.py", "words.py", "deep/table.py")),
    "path": ("near/looks.py:f", ("../../helpers.py", "../../near/more/inner.py", "../../near/far.py")),
}


@pytest.mark.parametrize("kind", USED)
def test_a_changed_module_that_a_reward_imports_is_named(inputs, own_package, kind):
    function, used = USED[kind]
    function = f"{own_package}/{function}" if ".py" in function else function
    rewards = [{"function": function, "name": "own"}]
    before = inputs(rewards=rewards)
    package = own_package / "lib" / "scoring_of_mine"
    (package / "unused.py").write_text("C = 3")
    assert check_inputs(before, inputs(rewards=rewards), []) == []
    for name in used:
        text = (package / name).read_text()
        (package / name).write_text(text + "\n")
        with pytest.raises(UserError, match=r"rewards\.own\.function: .*, which it uses, is not what it was") as error:
            check_inputs(before, inputs(rewards=rewards), [])
        assert Path(name).stem in str(error.value)
        assert "--allow rewards.own.function" in str(error.value)
        (package / name).write_text(text)
    assert check_inputs(before, inputs(rewards=rewards), []) == []


def test_what_is_installed_or_ours_is_told_of_by_versions(inputs, own_package):
    for function in (f"{own_package}/mine.py:f", "coterie.tasks.equation_rewards:right_answer"):
        names = inputs(rewards=[{"function": function, "name": "own"}])
        assert not [name for name in names if any(part in name for part in ("numpy", "json", "coterie"))]


def test_a_run_that_began_before_modules_were_noted_goes_on(inputs, own_package):
    now = inputs(rewards=[{"function": f"{own_package}/mine.py:f", "name": "own"}])
    before = {name: value for name, value in now.items() if " > " not in name}
    assert len(before) < len(now)
    assert check_inputs(before, now, []) == []


def test_folders_without_init_are_followed(inputs, tmp_path, monkeypatch):
    """Packages inside of packages that nobody has imported yet."""
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    (inner / "deep.py").write_text("def f(completions):\n    return [0.0] * len(completions)\n")
    (tmp_path / "mine.py").write_text(
        "def f(completions):\n    from outer.inner import deep\n    return deep.f(completions)\n"
    )
    names = inputs(rewards=[{"function": f"{tmp_path}/mine.py:f", "name": "own"}])
    assert any("outer.inner.deep" in name for name in names)
