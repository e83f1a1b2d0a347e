"""Runs that train LoRA's matrices alone: every method, exact resume, checkpoints, and the model at the end."""

import json
import math
import shutil
import sqlite3

import pytest
import torch
from conftest import some_quick
from safetensors.torch import load_file
from small_runs import METHODS, TINY, digests, finished, finished_on_letters, metrics, plan, recorded
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import coterie
from coterie.commands.models import check_recipe, evaluate_model, sample_model
from coterie.errors import UserError
from coterie.fast.serve import Policy
from coterie.models.load import load_model
from coterie.models.logprobs import token_logprobs
from coterie.recipe import load_recipe
from coterie.rollouts.pack import Row, make_stream
from coterie.training.saved import Saved

LORA = "lora={rank: 4, alpha: 8}"
CHOSEN = ("grpo", "ppo", "dpo", "sft", "reward_model", "anchored", "replaced", "exact", "rloo")


def saved(folder, step, name="model"):
    return load_file(folder / "checkpoints" / f"step_00000{step}" / f"{name}.safetensors")


def trained_policy(folder, step):
    """The policy of a checkpoint: the start's weights, and the matrices that were trained beside them."""
    recipe = load_recipe(str(folder / "recipe.yaml"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    start = saved(folder, 0)
    policy = Policy.of(model).with_adapter(recipe.lora, recipe.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" not in name:
                parameter.copy_(start[name.replace(".base_layer.", ".")])
        matrices = saved(folder, step)
        for name, parameter in policy.named_parameters():
            parameter.copy_(matrices[name])
    return policy


def some_logprobs(policy):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, (30,), generator=generator).tolist()
    with torch.no_grad():
        return token_logprobs(
            policy, make_stream([(tokens[:9], [Row.written(tokens[9:20]), Row.written(tokens[20:])])])
        )


@pytest.mark.parametrize("method", some_quick(CHOSEN, "grpo"))
def test_every_method_trains_lora_and_resumes_to_the_same_bits(train, method):
    whole = finished_on_letters(*METHODS[method], LORA)
    weights = saved(whole, 0)
    matrices = saved(whole, 4)
    assert not any(".lora_" in name for name in weights)
    assert {name.rpartition(".")[2] for name in matrices} <= {"lora_A", "lora_B", "weight"}
    assert sum(name.endswith("lora_B") for name in matrices) == 14
    assert all(matrices[name].abs().max() > 0 for name in matrices if name.endswith("lora_B"))
    for step in range(1, 5):
        found = metrics(whole, step)
        assert all(math.isfinite(value) for value in found.values()), found
        assert found["optimiser/skipped_share"] == 0
    state = saved(whole, 4, "optimiser")
    assert {place.rpartition("/")[0] for place in state} == matrices.keys()
    stopped = train("stopped", *METHODS[method], LORA, stop_after=3)
    coterie.train(resume=str(stopped))
    assert digests(stopped) == digests(whole)
    assert recorded(stopped) == recorded(whole)


@pytest.mark.parametrize("method", some_quick(["grpo", "ppo", "dpo", "sft", "reward_model"], "grpo"))
@pytest.mark.parametrize("lora", [pytest.param((), marks=pytest.mark.slow), (LORA,)])
def test_activation_checkpointing_ends_with_the_same_bits(train, method, lora):
    plain = finished_on_letters(*METHODS[method], *lora)
    folder = train("recomputed", *METHODS[method], *lora, "optimiser.activation_checkpointing=true")
    assert digests(folder) == digests(plain)
    assert recorded(folder) == recorded(plain)


@pytest.mark.parametrize(
    ("base", "method"),
    [
        ("int8", "grpo"),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (("int4", "grpo"), ("int8", "ppo"), ("int4", "reward_model"))
        ),
    ],
)
def test_a_base_in_few_bits_resumes_to_the_same_bits_and_ends_as_a_plain_model(train, base, method):
    source = finished() / "model"
    packed = f"lora={{rank: 4, alpha: 8, base: {base}}}"
    more = (*METHODS[method], f"model={source}", "cold_start=null", "optimiser={learning_rate: 1.0e-2}", packed)
    whole = train("whole", *more)
    start = saved(whole, 0)
    codes = [name for name in start if name.endswith(".codes")]
    assert len(codes) == 14
    assert all(start[name].dtype == (torch.int8 if base == "int8" else torch.uint8) for name in codes)
    stopped = train("stopped", *more, stop_after=3)
    coterie.train(resume=str(stopped))
    assert digests(stopped) == digests(whole)
    assert recorded(stopped) == recorded(whole)
    if method != "grpo":
        return
    policy = Policy.of(load_model(str(source), torch.device("cpu"), base))
    policy = policy.with_adapter(load_recipe(str(whole / "recipe.yaml")).lora, seed=0)
    matrices = saved(whole, 4)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(matrices[name])
    plain = AutoModelForCausalLM.from_pretrained(whole / "model")
    assert {name for name, _ in plain.named_parameters()} == load_file(source / "model.safetensors").keys()
    torch.testing.assert_close(some_logprobs(Policy.of(plain)), some_logprobs(policy), rtol=0, atol=1e-5)
    for step in (0, 4):
        exported, _ = Saved.of(str(whole), step).model(torch.device("cpu"))
        assert {parameter.dtype for parameter in exported.parameters()} == {torch.float32}
    torch.testing.assert_close(some_logprobs(Policy.of(exported)), some_logprobs(policy), rtol=0, atol=1e-5)


def test_a_base_in_few_bits_is_said_and_has_to_be_pretrained(capsys):
    source = finished() / "model"
    more = [*TINY, f"model={source}", "cold_start=null", "lora={base: int4}"]
    check_recipe(load_recipe("equations", more))
    printed = capsys.readouterr().out
    weights = sum(weight.numel() for weight in load_file(source / "model.safetensors").values())
    assert f"model: Qwen3ForCausalLM, {weights:,} parameters" in printed
    packed = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48)  # of both layers
    assert f"lora.base: {packed:,} weights are kept in int4, 0.0 MB" in printed
    with pytest.raises(
        UserError, match=r"lora\.base: int4 keeps a pretrained model's weights; a fresh one has none yet"
    ):
        load_recipe("equations", [*TINY, "cold_start=null", "lora={base: int4}"])
    with pytest.raises(UserError, match=r"lora\.base: int4 has no room for what a cold_start adds"):
        load_recipe("equations", [*TINY, f"model={source}", "lora={base: int4}"])


def test_the_first_step_starts_at_the_reference():
    folder = finished_on_letters(*METHODS["grpo"], LORA)
    assert metrics(folder, 1)["policy/ratio_max"] == 1
    assert metrics(folder, 1)["policy/kl"] == pytest.approx(0, abs=1e-8)  # the sampler's rounding
    assert metrics(folder, 4)["policy/kl"] > 1e-6
    folder = finished_on_letters(*METHODS["dpo"], LORA)
    assert metrics(folder, 1)["loss/total"] == pytest.approx(math.log(2), abs=1e-7)
    assert metrics(folder, 1)["preference/margin"] == 0


def test_the_model_at_the_end_is_the_trained_policy(train, capsys):
    folder = train("run", *METHODS["grpo"], LORA, "optimiser={learning_rate: 1.0e-2}")
    start = saved(folder, 0)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert {name for name, _ in model.named_parameters()} == start.keys()
    policy = trained_policy(folder, 4)
    expected = some_logprobs(policy)
    torch.testing.assert_close(some_logprobs(Policy.of(model)), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(start[name])
    assert (some_logprobs(Policy.of(model)) - expected).abs().max() > 1e-3
    evaluate_model(str(folder), None, 1, 8, None, 0, [])
    sample_model(str(folder), "Solve 3x - 5 = 10", 2, {"temperature": 0.0, "max_new_tokens": 12}, None, 0)
    printed = capsys.readouterr().out
    assert "accuracy" in printed
    assert "--- 2" in printed


def test_a_moving_reference_is_saved_as_matrices_of_its_own(train):
    folder = train("run", *METHODS["anchored"], LORA, "reference.decay=0.5", "checkpoint={every: 1, keep_last: 9}")
    average = {name: matrix for name, matrix in saved(folder, 1).items() if name.endswith("lora_B")}
    average = {name: 0.5 * matrix for name, matrix in average.items()}  # it starts at zero
    for step in range(1, 5):
        if step > 1:
            average = {name: 0.5 * held + 0.5 * saved(folder, step)[name] for name, held in average.items()}
        held = saved(folder, step, "reference")
        for name, matrix in average.items():
            torch.testing.assert_close(held[name], matrix, rtol=1e-5, atol=1e-7)


def test_ppo_s_value_model_is_a_head_and_matrices_of_its_own():
    folder = finished_on_letters(*METHODS["ppo"], LORA)
    policy, value = saved(folder, 4), saved(folder, 4, "value")
    assert value.keys() - policy.keys() == {"score.weight"}
    assert value["score.weight"].abs().max() > 0
    assert all(not torch.equal(policy[name], value[name]) for name in policy)


def test_a_reward_model_is_merged_too(train):
    folder = train(
        "run", *METHODS["reward_model"], LORA, "steps=40", "prompts_per_step=16", "optimiser.learning_rate=0.01"
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    assert model.config.num_labels == 1
    with sqlite3.connect(folder / "run.db") as db:
        (last,) = db.execute("SELECT value FROM evaluations WHERE mode = 'pairs' ORDER BY step DESC").fetchone()
    assert last > 0.6


@pytest.mark.slow
def test_grpo_with_matrices_alone_learns(train):
    folder = train(
        "run", "preset=dr_grpo", LORA, "steps=30", "prompts_per_step=8", "group_size=8", "optimiser.learning_rate=0.02",
        "evaluation={prompts: 100, samples: 1}", "cold_start={steps: 60, rows_per_step: 16, learning_rate: 5.0e-3}",
    )  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["after"]["reward_interval"][0] > summary["before"]["reward_interval"][1]


@pytest.fixture
def pretrained(train):
    return train(
        "pretrained", "preset=sft", "cold_start=", "group_size=", "rewards=", "evaluation={prompts: 8, samples: 1}"
    )


@pytest.mark.slow
def test_a_loaded_model_s_cold_start_trains_and_merges_matrices(train, pretrained, monkeypatch):
    """It dies in the cold start, loses the model that it came from, dies again in the stage after, and ends with the same bits."""
    moved = pretrained.with_name("moved")
    shutil.copytree(pretrained / "model", moved)
    settings = ("preset=grpo", LORA, "checkpoint={every: 2, keep_last: 2}")
    whole = train("whole", *settings, f"model={pretrained / 'model'}")
    plan("before_step:6:raise", monkeypatch.setattr)
    with pytest.raises(RuntimeError, match="on purpose"):
        train("died", *settings, f"model={moved}")
    folder = whole.with_name("died")
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"cold_start_000000", "cold_start_000002", "cold_start_000004"}
    matrices = load_file(folder / "checkpoints" / "cold_start_000004" / "model.safetensors")
    assert all(".lora_" in name for name in matrices)
    weights = load_file(moved / "model.safetensors")
    base = load_file(folder / "checkpoints" / "cold_start_000000" / "model.safetensors")
    assert all(torch.equal(base[name], weights[name]) for name in base)
    other = AutoModelForCausalLM.from_pretrained(moved)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.save_pretrained(moved)
    with pytest.raises(UserError, match="--allow model"):
        coterie.train(resume=str(folder))
    plan("before_step:4:raise", monkeypatch.setattr)
    with pytest.raises(RuntimeError, match="on purpose"):
        coterie.train(resume=str(folder), allow=["model"])
    assert any(not torch.equal(saved(folder, 0)[name], base[name]) for name in base)  # what the cold start learned
    coterie.train(resume=str(folder))
    assert digests(folder) == digests(whole)
    assert recorded(folder) == recorded(whole)
    assert not (folder / "checkpoints" / "cold_start_000000").exists()


def test_the_cold_start_of_a_fresh_model_trains_all_of_it(train):
    folder = train("run", "preset=grpo", LORA, "checkpoint={every: 2, keep_last: 9}")
    whole = load_file(folder / "checkpoints" / "cold_start_000006" / "model.safetensors")
    assert not any(".lora_" in name for name in whole)
    assert all(torch.equal(weight, saved(folder, 0)[name]) for name, weight in whole.items())


def test_a_wrong_target_is_refused_before_there_is_a_folder(train, tmp_path):
    with pytest.raises(UserError, match=r"lora\.targets: 'query' matches no linear layer"):
        train("run", "preset=grpo", "lora={targets: query}")
    assert not (tmp_path / "run").exists()


def test_check_says_how_much_is_trained(tiny_recipe, capsys):
    check_recipe(load_recipe("equations", [*tiny_recipe, "lora={rank: 2, targets: [q_proj, down_proj]}"]))
    # two blocks of rank * (in + out): q 32 + 32, down 48 + 32
    assert f"{2 * 2 * (64 + 80)} parameters are trained" in capsys.readouterr().out


def test_in_mixed_precision_what_is_saved_is_float32(train):
    folder = train("lora", "preset=grpo", "precision=mixed", "cold_start=", "checkpoint={every: 4}", LORA)
    for step in (0, 4):
        assert {weight.dtype for weight in saved(folder, step).values()} == {torch.float32}


def test_a_start_says_which_weights_get_no_matrices(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shape = (
        "model={type: qwen3_moe, hidden_size: 32, intermediate_size: 48, moe_intermediate_size: 16, num_hidden_layers: 2, "
        "num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 128, num_experts: 4, num_experts_per_tok: 2, "
        "output_router_logits: true, router_aux_loss_coef: 0.02}"
    )
    small = ["prompts_per_step=2", "group_size=2", "sampling.max_new_tokens=4", "cold_start=null"]
    check_recipe(load_recipe("equations", [shape, LORA, *small]))
    printed = capsys.readouterr().out
    assert f"the {2 * 4 * 3 * 16 * 32:,} in stacks of experts stay as they are" in printed
    assert "router_aux_loss_coef: 0.02" in printed
    assert "is not added" in printed
