"""The models that a run has saved: at its end and at its checkpoints, to measure, sample and export."""

import functools
import json
import shutil
import sqlite3

import pytest
import torch
from conftest import some_quick
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

import coterie
from coterie.cli import main
from coterie.commands.models import evaluate_model, export_model, sample_model
from coterie.errors import UserError
from coterie.training.saved import Saved, best_step, saved_steps

SMALL = [
    "model={type: qwen3, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 1, head_dim: 16, max_position_embeddings: 128, tie_word_embeddings: true}",
    "steps=4", "prompts_per_step=2", "checkpoint={every: 2}", "evaluation.prompts=8", "optimiser={learning_rate: 3.0e-2}",
]  # fmt: skip
GRPO = [*SMALL, "cold_start=null", "sampling.max_new_tokens=8", "group_size=4", "evaluation={prompts: 8, samples: 1, every: 2}",
        'rewards=[{function: "coterie.rewards.texts.shape:repetition"}]']  # fmt: skip
LORA = "lora={rank: 4, alpha: 8}"


KINDS = {
    "plain": ("equations_sft", SMALL),
    "lora": ("equations_sft", [*SMALL, LORA]),
    "scorer": ("equations_reward_model", [*SMALL, "cold_start.steps=6"]),
    "lora_scorer": ("equations_reward_model", [*SMALL, "cold_start.steps=6", LORA]),
}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """The folder of a finished run of a kind, which is trained when it is first asked for."""
    home = tmp_path_factory.mktemp("runs")

    @functools.cache
    def train(kind):
        recipe, overrides = KINDS[kind]
        return coterie.train(recipe, overrides=overrides, out=str(home / kind)).folder

    return train


@pytest.mark.parametrize("name", some_quick(KINDS, "plain", "lora", "scorer"))
def test_the_last_checkpoint_exported_is_the_model_at_the_end(run_of, name, tmp_path, capsys):
    run = run_of(name)
    assert saved_steps(run) == [0, 2, 4]
    export_model(str(run), tmp_path / "last", 4, False)
    export_model(str(run), tmp_path / "end", None, False)
    export_model(str(run / "checkpoints" / "step_000002"), tmp_path / "middle", None, False)
    assert f"step 2 to {tmp_path / 'middle'}" in capsys.readouterr().out
    end = load_file(run / "model" / "model.safetensors")
    of_each = {folder: load_file(tmp_path / folder / "model.safetensors") for folder in ("last", "end", "middle")}
    assert of_each["last"].keys() == of_each["end"].keys() == of_each["middle"].keys() == end.keys()
    assert not any("lora" in key for key in end)
    assert all(torch.equal(of_each[folder][key], end[key]) for folder in ("last", "end") for key in end)
    assert not all(torch.equal(of_each["middle"][key], end[key]) for key in end)
    assert AutoTokenizer.from_pretrained(tmp_path / "middle").eos_token is not None
    kind = AutoModelForSequenceClassification if "scorer" in name else AutoModelForCausalLM
    assert kind.from_pretrained(tmp_path / "middle")
    if "scorer" not in name:
        assert GenerationConfig.from_pretrained(tmp_path / "middle").eos_token_id is not None


def test_a_checkpoint_is_measured_and_sampled_like_its_export(run_of, tmp_path, capsys):
    run = str(run_of("lora"))
    export_model(run, tmp_path / "out", 2, False)
    capsys.readouterr()

    def said(do, *arguments, **options):
        do(*arguments, **options)
        return capsys.readouterr().out

    sampled = [said(sample_model, model, "Solve x = 3", 2, {"max_new_tokens": 6}, run + "/recipe.yaml", 0, step=step)
               for model, step in ((run, 2), (str(tmp_path / "out"), None), (f"{run}/checkpoints/step_000002", None), (run, 4))]  # fmt: skip
    assert sampled[0] == sampled[1] == sampled[2] != sampled[3]
    measure = "equations", 2, 8, None, 0, ["sampling.max_new_tokens=6"]
    measured = [said(evaluate_model, model, *measure, step=step).partition("\n")
                for model, step in ((run, 2), (str(tmp_path / "out"), None))]  # fmt: skip
    assert measured[0][0].startswith(f"{run}, step 2: ")
    assert measured[0][2] == measured[1][2]
    compared = said(evaluate_model, run, "equations", 2, 8, f"{run}/checkpoints/step_000000", *measure[4:], step=4)
    assert f"accuracy, {run}, step 4 minus {run}, step 0, paired by prompt" in compared


def test_a_missing_checkpoint_is_answered_with_those_there_are(run_of, tmp_path, monkeypatch, capsys):
    run = str(run_of("plain"))
    for wrong, words in (
        ({"step": 3}, "no checkpoint of step 3; its checkpoints: --step 0, --step 2, --step 4"),
        ({"best": True}, "no checkpoint was evaluated; set evaluation.every"),
    ):
        bare = tmp_path / "bare"
        shutil.copytree(run, bare, dirs_exist_ok=True)
        with sqlite3.connect(bare / "run.db") as db:
            db.execute("DELETE FROM evaluations")
        with pytest.raises(UserError, match=words):
            Saved.of(str(bare), **wrong)
    shutil.rmtree(bare / "model")
    with pytest.raises(UserError, match="no model yet; it is written at the end of training"):
        Saved.of(str(bare))
    with pytest.raises(UserError, match="is no run, so it has no checkpoints"):
        Saved.of(str(run_of("plain") / "model"), 2)
    with pytest.raises(UserError, match="writes no text; it is a reward model"):
        sample_model(str(run_of("scorer")), "Solve x = 3", 1, {}, None, 0, step=2)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    monkeypatch.chdir(tmp_path)  # where there is no runs/equations
    for arguments, words in (
        (["export", run, "--to", str(tmp_path / "taken")], "is in use"),
        (["export", run, "--to", str(tmp_path / "x"), "--step", "2", "--best"], "choose one checkpoint"),
        (["export", "equations", "--to", str(tmp_path / "x")], "equations is no run"),
    ):
        monkeypatch.setattr("sys.argv", ["coterie", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def evaluated(folder, figures, name="accuracy"):
    with sqlite3.connect(folder / "run.db") as db:
        db.execute("DELETE FROM evaluations")
        for step, value in figures.items():
            db.execute("INSERT INTO evaluations VALUES ('train', ?, 'sampled', ?, ?, 0, 1, 8)", (step, name, value))


def test_the_best_checkpoint_has_the_best_held_out_evaluation(run_of, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_of("plain"), run)
    evaluated(run, {0: 0.1, 2: 0.5, 4: 0.3})
    assert Saved.of(str(run), best=True) == Saved(run, 2)
    evaluated(run, {0: 0.1, 2: 0.5, 4: 0.5})
    assert best_step(run, [0, 2, 4]) == (4, "")
    evaluated(run, {0: 3.0, 4: 2.0}, "reward")
    assert best_step(run, [0, 2, 4]) == (0, "")
    evaluated(run, {0: 0.1, 3: 0.9, 4: 0.5})
    chosen, note = best_step(run, [0, 2, 4])
    assert chosen == 4
    assert "the best held-out accuracy was 0.9000 after step 3, whose checkpoint was not kept" in note


def test_an_own_evaluation_set_is_what_training_and_eval_measure(tmp_path, monkeypatch, capsys):
    """Its rows are measured before, on the way and after; all the others are trained on."""

    def rows(name, words):
        (tmp_path / name).write_text("".join(json.dumps({"prompt": word, "wanted": word}) + "\n" for word in words))

    rows("train.jsonl", ["ab", "cd", "ef"])
    rows("test.jsonl", ["ef", "gh"])
    rows("other.jsonl", ["ij"])
    (tmp_path / "seen.py").write_text(
        "import pathlib\n"
        "def seen(prompts, completions, wanted, **columns):\n"
        "    with pathlib.Path(__file__).with_name('seen.txt').open('a') as file:\n"
        "        file.write(''.join(f'{word}\\n' for word in wanted))\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    recipe = {
        "model": {"type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}, "tokenizer": "bytes",
        "task": {"data": "train.jsonl", "evaluation": "test.jsonl"}, "rewards": "seen.py:seen", "loss": {"kl_weight": 0},
        "steps": 2, "prompts_per_step": 3, "group_size": 2, "sampling": {"max_new_tokens": 3}, "evaluation": {"every": 1},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    run = coterie.train(str(tmp_path / "recipe.yaml"), out=str(tmp_path / "run"))
    assert "task.evaluation: 1 of its 2 prompts are also trained on" in capsys.readouterr().out
    seen = (tmp_path / "seen.txt").read_text().split()
    assert {word: seen.count(word) for word in ("ab", "cd")} == {"ab": 4, "cd": 4}  # 2 steps of 2 completions
    assert (
        seen.count("gh") == 2 * (2 + 1 + 1) + 1
    )  # before and after 2 samples, a greedy one and one to show, on the way one
    (tmp_path / "seen.txt").unlink()
    evaluate_model(str(run.folder), None, 1, 8, None, 0, ["task.evaluation=" + str(tmp_path / "other.jsonl")])
    assert set((tmp_path / "seen.txt").read_text().split()) == {"ij"}
    rows("test.jsonl", ["gh", "kl"])
    with pytest.raises(UserError, match=r"task.evaluation: the file is not what it was"):
        coterie.train(resume=str(run.folder), overrides=["steps=3"])
