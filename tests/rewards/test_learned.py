"""The built-in `reward_model`: what it says is what the trained model says, whatever it is asked with."""

import json
import shutil
import sqlite3

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

import coterie
from coterie.errors import RewardError, UserError
from coterie.fast.serve import load_scorer
from coterie.models.load import make_byte_tokenizer
from coterie.recipe import load_recipe, make_recipe
from coterie.recipe.settings import RewardSpec
from coterie.rewards.base import Reward
from coterie.rewards.learned import RewardModel
from coterie.rewards.load import load_rewards
from coterie.rewards.score import score
from coterie.training.preferences import evaluate_pairs, pair_streams
from coterie.training.problem import Problem
from coterie.types import Completion, Group, Prompt

MODEL = {"type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 96}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def recipe_of(folder, **more):
    rows = [{"prompt": f"{n} ok? ", "good": "yes" * (1 + n % 3), "bad": "no" * (1 + n % 2)} for n in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {"data": str(folder / "rows.jsonl"), "chosen": "good", "rejected": "bad", "heldout": 0.2}
    return make_recipe(
        {"preset": "reward_model", "model": MODEL, "tokenizer": "bytes", "task": task, "steps": 30, "prompts_per_step": 8,
         "optimiser": {"learning_rate": 3.0e-3}, "evaluation": {"prompts": 8}, **more}
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the preset `reward_model`: yes is better than no."""
    home = tmp_path_factory.mktemp("trained")
    coterie.train(recipe_of(home), out=str(home / "run"))
    return home / "run"


@pytest.fixture
def make_folder(tmp_path):
    """A reward model with random weights, in Hugging Face format."""

    def make(kind="qwen3", template=None, context=64, labels=1):
        torch.manual_seed(3)
        shape = {name: value for name, value in MODEL.items() if name != "type"}
        sizes = {**shape, "max_position_embeddings": context, "vocab_size": 257, "num_labels": labels}
        if kind == "gpt2":
            sizes = {
                "n_embd": 32,
                "n_layer": 2,
                "n_head": 2,
                "n_positions": context,
                "vocab_size": 257,
                "num_labels": 1,
            }
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, pad_token_id=0, **sizes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        tokenizer = make_byte_tokenizer()
        tokenizer.chat_template = template
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return make


def transformers_score(folder, text):
    """The obvious way: one text, the end token after it, through transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = [*make_byte_tokenizer()(text)["input_ids"], 0]
    hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    return model.score(hidden).item()


def test_held_out_pairs_get_the_scores_that_training_gave_them(trained):
    recipe = load_recipe(str(trained / "recipe.yaml"))
    task = Problem.of(recipe).task
    reward = RewardModel(str(trained))
    rows = [row for prompt in task.heldout for row in ((prompt, "good"), (prompt, "bad"))]
    got = reward([prompt.content for prompt, _ in rows], [prompt.columns[name] for prompt, name in rows])
    scorer, _ = load_scorer(str(trained), torch.device("cpu"))
    pairs = [
        (p.tokens, *(reward._loaded[1].encode_answer(p.columns[name]) for name in ("good", "bad")))
        for p in task.heldout
    ]
    with torch.no_grad():
        wanted = [value for stream in pair_streams(pairs, 10_000) for value in scorer.scores(stream).tolist()]
    assert got == pytest.approx(wanted, abs=1e-5)
    (accuracy,) = evaluate_pairs(scorer, task, recipe).estimates["pairs"].values()
    with sqlite3.connect(trained / "run.db") as db:
        (at_the_end,) = db.execute("SELECT value FROM evaluations WHERE mode = 'pairs' ORDER BY step DESC").fetchone()
    right = [good > bad for good, bad in zip(got[::2], got[1::2], strict=True)]
    assert sum(right) / len(right) == accuracy.value == at_the_end > 0.9


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_it_gives_what_transformers_gives_in_any_batch(make_folder, kind):
    folder = make_folder(kind)
    prompts = ["one", "one", "one", "another", "one"]
    texts = ["a", "bb and more", "", "a", "a"]
    wanted = [transformers_score(folder, prompt + text) for prompt, text in zip(prompts, texts, strict=True)]
    assert max(wanted) - min(wanted) > 0.01
    for tokens in (1, 20, 10_000):
        assert RewardModel(str(folder), "cpu", tokens)(prompts, texts) == pytest.approx(wanted, abs=1e-5)


def test_a_chat_goes_through_its_own_template(make_folder):
    folder = make_folder(template=TEMPLATE)
    chat = [{"role": "user", "content": "hi"}]
    (got,) = RewardModel(str(folder), "cpu")([chat], [[{"role": "assistant", "content": "yes"}]])
    assert got == pytest.approx(transformers_score(folder, "[user]hi[assistant]yes"), abs=1e-5)


def test_a_chat_for_a_model_without_a_template_stops_with_a_word(make_folder):
    reward = RewardModel(str(make_folder()), "cpu")
    with pytest.raises(UserError, match="reward_model: the tokenizer has no chat template"):
        reward([[{"role": "user", "content": "hi"}]], ["yes"])


def test_a_chat_that_the_template_refuses_fails_alone(make_folder):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    system, user = ([{"role": role, "content": "hi"}] for role in ("system", "user"))
    refused, taken = RewardModel(str(make_folder(template=template)), "cpu")([system, user], ["a", "a"])
    assert isinstance(refused, RewardError)
    assert "no system" in str(refused)
    assert isinstance(taken, float)


def test_what_does_not_fit_its_context_is_a_failure_and_not_0(make_folder):
    folder = make_folder(context=20)
    fits, long, also = RewardModel(str(folder), "cpu")(["1234567890"] * 3, ["123456789", "1234567890", "1"])
    assert fits == pytest.approx(transformers_score(folder, "1234567890123456789"), abs=1e-5)
    assert isinstance(long, RewardError)
    assert "21 tokens" in str(long)
    assert "context of 20" in str(long)
    assert also == pytest.approx(transformers_score(folder, "12345678901"), abs=1e-5)


def test_an_empty_prompt_is_a_failure(make_folder):
    failed, fine = RewardModel(str(make_folder()), "cpu")(["", "a"], ["x", "x"])
    assert isinstance(failed, RewardError)
    assert isinstance(fine, float)


def test_scores_that_are_no_numbers_are_failures(make_folder):
    folder = make_folder()
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    zeros = torch.zeros(1)
    groups = [Group(Prompt(0, "p", [1]), [Completion([1], zeros, zeros, "stop", text) for text in "ab"])]
    scored = score(groups, [Reward("model", RewardModel(str(folder), "cpu"))])
    assert [failure.reason for failure in scored.failures] == ["returned nan"] * 2
    assert not scored.valid.any()


def test_it_is_loaded_once_at_first_use_frozen_and_in_float32(make_folder):
    folder = make_folder()
    AutoModelForSequenceClassification.from_pretrained(folder).bfloat16().save_pretrained(folder)
    reward = RewardModel(str(folder), "cpu")
    assert "_loaded" not in vars(reward)
    first = reward(["p"], ["a"])
    scorer, _ = reward._loaded
    assert {parameter.dtype for parameter in scorer.model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in scorer.model.parameters())
    shutil.rmtree(folder)
    assert reward(["p"], ["a"]) == first
    reward.close()
    assert "_loaded" not in vars(reward)


def test_what_is_no_reward_model_is_refused_as_the_recipe_loads(make_folder, tmp_path, make_model):
    writes = make_model("llama")
    writes.save_pretrained(tmp_path / "writes")
    three = make_folder(labels=3)
    (tmp_path / "pickled").mkdir()
    shutil.copy(three / "config.json", tmp_path / "pickled")
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "recipe.yaml").write_text("steps: 1\n")
    for name, said in {
        "nothing": "/nothing does not exist",
        "writes": "writes is LlamaForCausalLM",
        "model": "model gives 3 scores",
        "pickled": "pickled weights are refused",
        "unfinished": "unfinished has no model yet",
    }.items():
        with pytest.raises(UserError, match=said) as error:
            load_rewards([RewardSpec(function="reward_model", name="r", options={"model": str(tmp_path / name)})])
        assert str(error.value).startswith("rewards: reward_model: model: ")


def test_weights_that_lack_the_head_are_refused_and_not_made_up(make_folder):
    folder = make_folder()
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights: score\.weight"):
        RewardModel(str(folder), "cpu")(["p"], ["a"])


@pytest.mark.parametrize(
    ("options", "said"),
    [({"device": "tpu"}, "device: 'tpu'"), ({"batch_tokens": 0}, "batch_tokens: 0"), ({"model": 3}, "model: 3")],
)
def test_options_are_checked(trained, options, said):
    with pytest.raises(UserError, match=said):
        RewardModel(**{"model": str(trained), **options})


def test_grpo_learns_what_the_reward_model_prefers(trained, tmp_path, monkeypatch):
    """The model is named relative to the recipe, and the run's own copy of the recipe finds it from anywhere."""
    shutil.copytree(trained, tmp_path / "judge")
    rows = [{"prompt": f"{n} ok? "} for n in range(20)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {json.dumps(MODEL)}\ntokenizer: bytes\ntask: {{data: prompts.jsonl}}\nsteps: 30\nprompts_per_step: 4\n"
        "group_size: 8\nsampling: {max_new_tokens: 6}\noptimiser: {learning_rate: 3.0e-3}\n"
        "evaluation: {prompts: 4, samples: 1}\nrewards: {function: reward_model, options: {model: judge}}\n"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = coterie.train(str(tmp_path / "recipe.yaml"), out="run")
    (spec,) = load_recipe("run/recipe.yaml").rewards
    assert spec.options["model"] == str(tmp_path / "judge")
    with sqlite3.connect(run.folder / "run.db") as db:
        rows = db.execute("SELECT value FROM metrics WHERE name = 'reward/reward_model' ORDER BY step").fetchall()
        failed = db.execute("SELECT SUM(value) FROM metrics WHERE name = 'reward/num_failed'").fetchone()
    values = [value for (value,) in rows]
    assert len(values) == 30
    assert failed == (0,)
    assert sum(values[-5:]) / 5 > sum(values[:5]) / 5 + 0.3
