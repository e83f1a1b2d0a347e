"""A recipe runs no Python from outside its own folder unasked, whatever the command."""

import json
import pickle
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from typer.testing import CliRunner

from coterie import trust
from coterie.cli import app
from coterie.errors import UserError
from coterie.user_code import load_function

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


def test_an_objective_or_advantage_from_elsewhere_is_refused(folders, tmp_path):
    for more in ({"loss": {"objective": "../code.py:f", "kl_weight": 0}}, {"advantage": {"function": "../code.py:f"}}):
        recipe(folders, **more)
        assert "--trust" in str(run("train", "theirs/recipe.yaml", "--out", "run"))
    assert not (tmp_path / "was_run").exists()


def test_code_in_the_recipe_s_folder_runs_and_resumes_unasked(folders):
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


@pytest.mark.parametrize("name", ["coterie.runs.store:Store", "coterie.user_code:load_function", "coterie_other:f"])
def test_not_all_of_coterie_is_trusted(tmp_path, name, monkeypatch):
    """Some of it writes files or runs code that a recipe's options could name."""
    (tmp_path / "coterie_other.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with trust.restricted(tmp_path):
        with pytest.raises(UserError, match="--trust"):
            load_function(name, "rewards")
        assert callable(load_function("coterie.tasks.equation_rewards:right_answer", "rewards"))
    assert callable(load_function("coterie.user_code:load_function", "rewards"))  # in Python everything is


def test_a_run_or_model_folder_brings_no_code(folders, tmp_path, saved_model):
    """A recipe beside the weights, or in a run's folder, with a reward that lies there too."""
    theirs = tmp_path / "model"
    (theirs / "code.py").write_text(REWARD.format(mark=str(theirs / "was_run")))
    (theirs / "data.jsonl").write_text('{"prompt": "1"}\n{"prompt": "2"}\n')
    recipe(theirs)
    assert run("sample", "./model", "1", "-n", "1", "--max-new-tokens", "2") is None
    (theirs / "run.db").touch()
    (theirs / "model").symlink_to(theirs)
    for arguments in (
        ("sample", "./model", "1"),
        ("eval", "./model"),
        ("eval", "./model", "--task", "model/recipe.yaml"),
    ):
        assert "--trust" in str(run(*arguments)), arguments
    for command in ("train", "check"):
        assert "--trust" in str(run(command, "model/recipe.yaml")), command
    assert not (theirs / "was_run").exists()


def test_a_resumed_run_brings_no_code(folders, tmp_path, monkeypatch):
    code = tmp_path / "run" / ".code.py"
    code.parent.mkdir()
    code.write_text(REWARD.format(mark=str(tmp_path / "was_run")))
    recipe(folders, f"{code}:f", steps=2)
    assert run("train", "theirs/recipe.yaml", "--out", "run", "--stop-after", "1", "--trust") is None
    (tmp_path / "was_run").unlink()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user's"))
    assert "--trust" in str(run("train", "--resume", "run"))
    assert not (tmp_path / "was_run").exists()
    assert run("train", "--resume", "run", "--trust") is None


def test_the_users_own_run_is_evaluated_and_sampled_unasked(folders):
    recipe(folders)
    assert run("train", "theirs/recipe.yaml", "--out", "run") is None
    assert run("eval", "run", "--samples", "1") is None
    assert run("sample", "run", "1", "-n", "1", "--max-new-tokens", "2") is None


CODE = {"function": "code", "options": {"function": "f"}}
JUDGE = {"function": "judge", "options": {"model": "m", "rubric": "r", "key_variable": ""}}


def with_options(reward, **options):
    return {**reward, "options": {**reward["options"], **options}}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sandbox": "subprocess"}, "all of this user's rights"),
        ({"seconds": 1e6}, "seconds"),
        ({"memory_megabytes": 10**7}, "memory_megabytes"),
        ({"output_bytes": 10**12}, "output_bytes"),
        ({"workers": 10**6}, "workers"),
    ],
)
def test_a_recipe_cannot_weaken_the_sandbox(folders, options, says):
    recipe(folders, with_options(CODE, **options))
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{says}[\s\S]*--trust"):
            raise run("check", "theirs/recipe.yaml")
        # agreed to once, and asked about again: the next recipe is somebody else's
        agreed = run("check", "theirs/recipe.yaml", "--trust")
        assert "--trust" not in str(agreed), agreed


@pytest.fixture
def listener():
    """A server on this machine that keeps what it is sent."""
    heard = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append(dict(self.headers))
            self.send_response(500)
            self.end_headers()

        def do_POST(self):
            self.do_GET()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", heard
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "reward",
    [
        with_options(JUDGE, url="http://192.0.2.1/v1"),
        with_options(JUDGE, url="https://api.openai.com/v1"),
        with_options(JUDGE, url="http://localhost.example.org/v1"),
        with_options(JUDGE, url="http://127.0.0.1.example.org/v1"),
        with_options(JUDGE, url="{here}", key_variable="AWS_SECRET_ACCESS_KEY"),
        with_options(JUDGE, url="{here}", key_variable="HOME"),
        with_options(CODE, sandbox="http://192.0.2.1:8070"),
        with_options(CODE, sandbox="{here}"),
    ],
)
def test_nothing_is_sent_unasked(folders, saved_model, monkeypatch, listener, command, reward):
    here, heard = listener
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-mine")
    monkeypatch.setenv("COTERIE_SANDBOX_TOKEN", "another-secret")
    recipe(folders, json.loads(json.dumps(reward).replace("{here}", here)))
    error = str(run(*COMMANDS[command]))
    assert "would send" in error
    assert "--trust" in error
    assert "\n" not in error
    assert heard == []


def test_consent_to_send_is_remembered_with_its_address_and_key(folders, monkeypatch):
    monkeypatch.setenv("MY_JUDGE", "a-secret-of-mine")
    for url, variable, more, refused in (
        ("http://192.0.2.1/v1", "", ("--trust",), False),
        ("http://192.0.2.1/v1", "", (), False),
        ("http://192.0.2.1/v2", "", (), True),
        ("http://192.0.2.1/v1", "MY_JUDGE", (), True),
        ("http://192.0.2.1/v1", "MY_JUDGE", ("--trust",), False),
        ("http://192.0.2.1/v1", "MY_JUDGE", (), False),
        ("http://192.0.2.2/v1", "MY_JUDGE", (), True),
    ):
        recipe(folders, with_options(JUDGE, url=url, key_variable=variable, attempts=1, step_seconds=0.01))
        error = run("check", "theirs/recipe.yaml", *more)
        assert ("--trust" in str(error)) == refused, (url, variable, more)


def test_a_judge_on_this_machine_without_a_key_is_asked(folders, listener, monkeypatch):
    here, heard = listener
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    recipe(folders, with_options(JUDGE, url=here, attempts=1, step_seconds=2))
    assert "--trust" not in str(run("check", "theirs/recipe.yaml"))
    assert heard
    assert not any("Authorization" in headers for headers in heard)


def test_a_judges_verdicts_are_kept_nowhere_unasked(folders, tmp_path, monkeypatch, listener):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    mine = tmp_path / "mine"
    options = {"url": listener[0], "attempts": 1, "step_seconds": 2, "cache": str(mine / "verdicts")}
    recipe(folders, with_options(JUDGE, **options))
    assert "would write to" in str(run("check", "theirs/recipe.yaml"))
    assert not mine.exists()
    recipe(folders, with_options(JUDGE, **{**options, "cache": str(tmp_path / "theirs" / "verdicts")}))
    assert "would write" not in str(run("check", "theirs/recipe.yaml"))


def test_links_out_of_a_runs_folder_are_not_followed(folders, tmp_path):
    recipe(folders, steps=2)
    assert run("train", "theirs/recipe.yaml", "--out", "run", "--stop-after", "1") is None
    mine = tmp_path / "mine"
    (mine / ".ssh").mkdir(parents=True)
    (mine / "precious").write_text("as it was")
    for name in (
        ".lock",
        ".report.writing",
        ".recipe.yaml.writing",
        "skipped",
        "kept/train_000002.jsonl",
        "model/config.json",
    ):
        link = tmp_path / "run" / name
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(mine / "precious")
        assert "is a link to" in str(run("train", "--resume", "run"))
        link.unlink()
    (tmp_path / "run" / "checkpoints").rename(mine / "checkpoints")
    (mine / "checkpoints" / ".ssh").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(mine / "checkpoints")
    assert "is a link to" in str(run("train", "--resume", "run"))
    assert (mine / "precious").read_text() == "as it was"
    assert run("train", "--resume", "run", "--trust") is None
    assert (mine / "checkpoints" / ".ssh").exists()  # and only what a save has left is cleared away


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


def test_a_model_that_names_code_from_the_hub_is_refused(folders, saved_model, tmp_path):
    config = tmp_path / "model" / "config.json"
    settings = json.loads(config.read_text())
    for name in ("attn_implementation", "_attn_implementation"):
        config.write_text(json.dumps({**settings, name: "somebody/kernel"}))
        error = run("sample", "./model", "1")
        assert error is None or "code from the hub" in str(error)
    config.write_text(json.dumps({**settings, "attn_implementation": "somebody/kernel"}))
    assert "code from the hub" in str(run("sample", "./model", "1"))
    recipe(folders, model={**MODEL, "attn_implementation": "somebody/kernel"})
    assert run("check", "theirs/recipe.yaml") is not None


def test_pickled_weights_and_adapters_are_refused(folders, saved_model, tmp_path):
    model = tmp_path / "model"

    class Runs:
        def __reduce__(self):
            return (Path(model / "was_run").touch, ())

    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "gpt2", "peft_type": "LORA"}))
    assert "is an adapter" in str(run("sample", "./model", "1"))
    (model / "adapter_config.json").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))
    assert run("sample", "./model", "1", "-n", "1", "--max-new-tokens", "2") is None
    (model / "model.safetensors").unlink()
    assert "pickled weights are refused" in str(run("sample", "./model", "1"))
    assert not (model / "was_run").exists()


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
