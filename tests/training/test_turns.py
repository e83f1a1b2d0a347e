"""Turns in whole runs: the end that is learned, the texts that rewards see, and `coterie sample` after a run."""

import json

import pytest
import torch
from chat_families import FAMILIES, Family
from transformers import AutoModelForCausalLM, AutoTokenizer

import coterie
from coterie.cli import app
from coterie.errors import UserError
from coterie.recipe import load_recipe, make_recipe
from coterie.training.problem import Problem

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
         "max_position_embeddings": 256, "tie_word_embeddings": True}  # fmt: skip
REWARD = """
import json, pathlib
def seen(prompts, completions, completion_ids, **columns):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    with (pathlib.Path(__file__).parent / "seen.jsonl").open("a") as file:
        file.writelines(json.dumps(pair) + "\\n" for pair in zip(texts, completion_ids))
    return [float(len(text)) for text in texts]
"""


@pytest.fixture
def make(tmp_path):
    """A recipe for a fresh model with a family's tokenizer, on rows of its own."""

    def build(family: Family, rows, **values):
        family.tokenizer().save_pretrained(tmp_path / "tokenizer")
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "reward.py").write_text(REWARD)
        common = {"model": {"type": "llama", **SHAPE}, "tokenizer": str(tmp_path / "tokenizer"), "steps": 2,
                  "prompts_per_step": 2, "sampling": {"max_new_tokens": 8}, "evaluation": {"prompts": 2, "samples": 1}}  # fmt: skip
        task = {"data": "rows.jsonl", "heldout": 0.2, **values.pop("task", {})}
        return make_recipe({**common, **values, "task": task}, folder=tmp_path)

    return build


def asked(text):
    return [{"role": "user", "content": text}]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chatml", "qwen3", "glm"])
def test_a_model_that_learns_a_turn_s_end_stops_there(make, tmp_path, name):
    family = FAMILIES[name]
    rows = [{"prompt": asked(f"{n} ok?"), "answer": "yes"} for n in range(20)]
    recipe = make(
        family, rows, preset="sft", steps=60, prompts_per_step=8, task={"answer": "answer"},
        sampling={"max_new_tokens": 30}, optimiser={"learning_rate": 1e-2},
    )  # fmt: skip
    run = coterie.train(recipe, out=str(tmp_path / "run"))
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    inputs = tokenizer.apply_chat_template(
        asked("3 ok?"), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :]
    block = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    assert tokenizer.decode(tokens) == f"{block}yes{family.end}"


@pytest.mark.slow
def test_rewards_see_special_tokens_and_a_stop_text_may_be_one(make, tmp_path):
    family = FAMILIES["deepseek_r1"]
    rows = [{"prompt": asked(f"What is {n}?")} for n in range(6)]
    recipe = make(
        family, rows, rewards=["reward.py:seen"], group_size=64, loss={"kl_weight": 0}, sampling={"max_new_tokens": 60, "stop": ["<|User|>"]},
    )  # fmt: skip
    coterie.train(recipe, out=str(tmp_path / "run"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    stop, think = tokenizer.convert_tokens_to_ids(["<|User|>", "</think>"])
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    for text, tokens in seen:
        ended = tokens[-1] in (stop, tokenizer.eos_token_id)
        assert text == tokenizer.decode(tokens[:-1] if ended else tokens)
        assert stop not in tokens[:-1]
        assert len(tokens) == 60 or ended
    assert any(tokens[-1] == stop for _, tokens in seen)
    assert any(think in tokens and "</think>" in text for text, tokens in seen)


def sampled(capsys, monkeypatch, home, *arguments):
    """What `coterie sample` prints of each completion."""
    monkeypatch.chdir(home)
    capsys.readouterr()
    app(["sample", *arguments, "--trust"], standalone_mode=False)
    return [part.partition("\n")[2].rstrip("\n") for part in capsys.readouterr().out.split("--- ")[1:]]


@pytest.mark.slow
def test_a_run_is_sampled_from_as_it_sampled(make, tmp_path, capsys, monkeypatch):
    """Greedily by top-k, with the recipe's system message, template variables, stop text and limit."""
    family = FAMILIES["qwen3"]
    rows = [{"prompt": asked(f"{n} ok?"), "answer": "yes, it is. Surely."} for n in range(10)]
    recipe = make(
        family, rows, rewards=["reward.py:seen"], group_size=2, loss={"kl_weight": 0}, system_prompt="Be brief.",
        chat_template_kwargs={"enable_thinking": False}, sampling={"max_new_tokens": 14, "stop": [". S"], "top_k": 1},
        task={"answer": "answer"}, cold_start={"steps": 40, "rows_per_step": 8, "learning_rate": 1e-2, "warmup_steps": 0},
    )  # fmt: skip
    run = coterie.train(recipe, out=str(tmp_path / "run"))
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    chat = [{"role": "system", "content": "Be brief."}, *asked("3 ok?")]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True, enable_thinking=False
    )
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=14)[0, inputs["input_ids"].shape[1] :]
    expected = tokenizer.decode(tokens).partition(". S")[0].removesuffix(family.end)
    assert sampled(capsys, monkeypatch, tmp_path, str(run.folder), "3 ok?", "-n", "2") == [expected, expected]
    longer = sampled(
        capsys, monkeypatch, tmp_path, str(run.folder), "3 ok?", "-n", "2", "--top-k", "0", "--temperature", "9"
    )
    assert len(set(longer)) == 2
    problem = Problem.of(load_recipe(str(run.folder / "recipe.yaml")))
    codec, task = problem.codec, problem.task
    assert codec.encode_prompt(task.asked("3 ok?")) == inputs["input_ids"][0].tolist()


def test_what_all_prompts_share_is_part_of_one_that_is_typed(make):
    system, begun = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "It is"}
    rows = [{"prompt": [system, *asked(f"{n} ok?"), begun]} for n in range(5)]
    rewards = {"rewards": ["reward.py:seen"], "loss": {"kl_weight": 0}}
    task = Problem.of(make(FAMILIES["chatml"], rows, **rewards)).task
    assert task.asked("hello") == [system, *asked("hello"), begun]
    assert task.asked("3 ok?\nIt is") == task.asked("3 ok?") == [system, *asked("3 ok?"), begun]
    assert task.columns_of("3 ok?") == {}
    assert task.columns_of("hello") is None
    assert {prompt.text for prompt in (*task.train, *task.heldout)} == {f"{n} ok?\nIt is" for n in range(5)}
    texts = Problem.of(make(FAMILIES["chatml"], [{"prompt": f"{n} ok?"} for n in range(5)], **rewards)).task
    assert texts.asked("hello") == "hello"


def test_chat_settings_for_prompts_that_are_texts_are_refused(make):
    rewards = {"rewards": ["reward.py:seen"], "loss": {"kl_weight": 0}}
    recipe = make(FAMILIES["qwen3"], [{"prompt": "3 ok?"}], system_prompt="Be brief.", **rewards)
    with pytest.raises(UserError, match="system_prompt: has no effect: the prompts of the task are text"):
        Problem.of(recipe)
    with pytest.raises(UserError, match=r"chat_template_kwargs.*'tokenize' is no variable"):
        make(FAMILIES["qwen3"], [{"prompt": asked("3")}], chat_template_kwargs={"tokenize": True}, **rewards)


def test_a_row_whose_template_or_tokenizer_fails_has_its_line(make):
    refusing = Family(
        "{% for m in messages %}{{ raise_exception('no tools') if m.role == 'tool' else m.content }}{% endfor %}"
    )
    rows = [{"prompt": asked("3")}, {"prompt": [*asked("4"), {"role": "tool", "content": "5"}]}]
    rewards = {"rewards": ["reward.py:seen"], "loss": {"kl_weight": 0}}
    with pytest.raises(UserError, match=r"rows\.jsonl:2: the chat template of .*refuses these messages: no tools"):
        Problem.of(make(refusing, rows, **rewards))


def test_an_update_names_a_token_that_the_model_does_not_know(make_model):
    model = make_model("llama")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
    given = {"rewards": [[0.0, 1.0]], "settings": {"loss": {"kl_weight": 0}}}
    with pytest.raises(UserError, match="prompt 0 holds the token 61, and the model knows those from 0 to 60"):
        coterie.update(model, optimiser, prompts=[[1, 61]], completions=[[[3], [4]]], **given)
    with pytest.raises(UserError, match="completion 1 of prompt 0 holds the token -1"):
        coterie.update(model, optimiser, prompts=[[1]], completions=[[[3], [4, -1]]], **given)
