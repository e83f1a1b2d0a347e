"""A recipe runs no Python from outside its own folder unasked, whatever the command."""

import json
import sys

import pytest
from typer.testing import CliRunner

from coterie import trust
from coterie.cli import app
from coterie.errors import UserError
from coterie.rewards.own import load_function

REWARD = "from pathlib import Path\nPath({mark!r}).touch()\n\ndef f(completions=(), **columns):\n    return [1.0] * len(completions)\n"
MODEL = {"type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A recipe's folder, and code beside it that leaves a mark when it is run."""
    home = tmp_path / "theirs"
    home.mkdir()
    for folder in (home, tmp_path):
        (folder / "code.py").write_text(REWARD.format(mark=str(folder / "was_run")))
    (home / "data.jsonl").write_text("".join(json.dumps({"prompt": f"{n}"}) + "\n" for n in range(4)))
    monkeypatch.chdir(tmp_path)
    return home


def recipe(home, reward="code.py:f", **more):
    values = {"model": MODEL, "tokenizer": "bytes", "task": {"data": "data.jsonl"}, "rewards": [reward], "steps": 1,
              "prompts_per_step": 2, "group_size": 2, "sampling": {"max_new_tokens": 4}, "loss": {"kl_weight": 0},
              "preset": "grpo", "evaluation": {"prompts": 1, "samples": 1}, **more}  # fmt: skip
    (home / "recipe.yaml").write_text(json.dumps(values))


def run(*arguments):
    """The command: what refused it, or None."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, UserError):
        raise result.exception
    return result.exception


COMMANDS = {
    "train": ("train", "theirs/recipe.yaml", "--out", "run"),
    "check": ("check", "theirs/recipe.yaml"),
    "eval": ("eval", "./model", "--task", "theirs/recipe.yaml"),
    "sample": ("sample", "./model", "1", "--task", "theirs/recipe.yaml"),
}


@pytest.mark.parametrize(
    "reward", ["../code.py:f", "{tmp}/code.py:f", "link/code.py:f", "subprocess:getoutput", "os:system"]
)
@pytest.mark.parametrize("command", COMMANDS)
def test_code_from_elsewhere_is_refused_unread(folders, tmp_path, command, reward, saved_model):
    (folders / "link").symlink_to(tmp_path)
    recipe(folders, reward.format(tmp=tmp_path))
    error = run(*COMMANDS[command])
    assert "--trust" in str(error)
    assert reward.partition(":")[0].rpartition("/")[2] in str(error)
    assert not (tmp_path / "was_run").exists()


@pytest.fixture
def saved_model(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    from coterie.models.load import make_byte_tokenizer

    tokenizer = make_byte_tokenizer()
    shape = {name: value for name, value in MODEL.items() if name != "type"}
    config = AutoConfig.for_model("gpt2", vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=0, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")


def test_an_objective_and_advantages_from_elsewhere_are_refused_too(folders, tmp_path):
    for more in ({"loss": {"objective": "../code.py:f", "kl_weight": 0}}, {"advantage": {"function": "../code.py:f"}}):
        recipe(folders, **more)
        assert "--trust" in str(run("train", "theirs/recipe.yaml", "--out", "run"))
    assert not (tmp_path / "was_run").exists()


def test_code_in_the_recipes_folder_runs_and_the_run_goes_on_unasked(folders):
    recipe(folders, steps=2)
    assert run("train", "theirs/recipe.yaml", "--out", "run", "--stop-after", "1") is None
    assert (folders / "was_run").exists()
    assert run("train", "--resume", "run") is None


def test_what_was_trusted_is_remembered_by_its_content(folders, tmp_path):
    recipe(folders, "../code.py:f")
    assert run("check", "theirs/recipe.yaml", "--trust") is None
    assert (tmp_path / "was_run").exists()
    assert run("check", "theirs/recipe.yaml") is None
    with (tmp_path / "code.py").open("a") as opened:
        opened.write("# changed\n")
    assert "--trust" in str(run("check", "theirs/recipe.yaml"))


def test_a_run_whose_code_has_changed_is_asked_about_again(folders):
    recipe(folders, steps=2)
    assert run("train", "theirs/recipe.yaml", "--out", "run", "--stop-after", "1") is None
    with (folders / "code.py").open("a") as opened:
        opened.write("# changed\n")
    assert "content" in str(run("train", "--resume", "run")) or "is not what it was" in str(
        run("train", "--resume", "run")
    )
    allowed = ("train", "--resume", "run", "--allow", "rewards.f.function")
    assert "--trust" in str(run(*allowed))
    assert run(*allowed, "--trust") is None


@pytest.mark.parametrize("name", ["coterie.runs.store:Store", "coterie.rewards.own:load_function", "coterie_other:f"])
def test_not_all_of_coterie_is_trusted(tmp_path, name):
    """Some of it writes files or runs code that a recipe's options could name."""
    trust.restrict(tmp_path)
    with pytest.raises(UserError, match="--trust"):
        load_function(name, "rewards")
    assert callable(load_function("coterie.rewards.steps:right_answer", "rewards"))


def test_in_python_everything_is_trusted(folders):
    assert callable(load_function("subprocess:getoutput", "rewards"))
    assert callable(load_function("code.py:f", "rewards"))


def test_a_home_that_cannot_be_written_asks_again(folders, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    recipe(folders, "../code.py:f")
    assert run("check", "theirs/recipe.yaml", "--trust") is None
    assert "--trust" in str(run("check", "theirs/recipe.yaml"))


def test_a_module_that_was_trusted_is_not_another_of_its_name(folders, tmp_path, monkeypatch):
    """As one that lies where the command is run, in another folder."""
    names = ("here", "there")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "judged_by_me.py").write_text(REWARD.format(mark=str(tmp_path / name / "was_run")))
    recipe(folders, "judged_by_me:f")
    for name, more, refused in (("here", "--trust", False), ("here", None, False), ("there", None, True)):
        with monkeypatch.context() as patched:
            patched.syspath_prepend(str(tmp_path / name))
            error = run("check", "theirs/recipe.yaml", *filter(None, [more]))
            sys.modules.pop("judged_by_me", None)
        assert (error is not None) == refused, name
    assert [(tmp_path / name / "was_run").exists() for name in names] == [True, False]


def test_code_that_a_model_brings_is_never_run_nor_asked_about(folders, monkeypatch):
    model = folders / "model"
    model.mkdir()
    (model / "model.safetensors").touch()
    config = {"model_type": "theirs", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(
        REWARD.format(mark=str(model / "was_run")) + "from transformers import PretrainedConfig as C\n"
    )
    recipe(folders, model="./model")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert "custom code" in str(run("check", "theirs/recipe.yaml", "--trust"))
    assert not (model / "was_run").exists()
