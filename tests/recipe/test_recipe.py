"""Recipes: strict, explained, and the same after a round trip."""

import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

import pytest
import yaml

from coterie.algorithms.advantages import BASELINES, SCALES
from coterie.algorithms.aggregate import AGGREGATIONS
from coterie.algorithms.kl import ESTIMATORS
from coterie.algorithms.ratios import RATIOS
from coterie.errors import UserError, closest
from coterie.recipe import Recipe, find_recipe, load_recipe, make_recipe
from coterie.recipe.objectives import LOSSES, Clip
from coterie.recipe.presets import PRESETS
from coterie.recipe.settings import KL, Advantage
from coterie.rewards.load import load_rewards

BUNDLED = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
LEAST = {"model": {"type": "qwen3"}, "task": "equations", "rewards": ["coterie.tasks.equation_rewards:right_answer"]}


def made(**settings) -> Recipe:
    return make_recipe({**LEAST, **settings})


def refusal(**settings) -> str:
    with pytest.raises(UserError) as error:
        made(**settings)
    return str(error.value)


@pytest.fixture
def write(tmp_path):
    """A recipe file with this text; what is needed at least stands before it."""

    def file(text: str, least: bool = True) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text((yaml.safe_dump(LEAST) if least else "") + text, encoding="utf-8")
        return str(path)

    return file


def refused_file(path: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    return str(error.value)


# The bundled ones


def test_there_are_bundled_recipes():
    assert "equations" in [path.stem for path in BUNDLED]


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_every_bundled_recipe_loads_and_its_rewards_exist(path, monkeypatch, tmp_path):
    by_path = load_recipe(str(path))
    assert by_path.rewards or not by_path.samples
    of_another_run = path.stem == "dialogue"  # its reward model is what another recipe trains
    with pytest.raises(UserError, match="dialogue_reward_model") if of_another_run else nullcontext():
        load_rewards(by_path.rewards)
    monkeypatch.chdir(tmp_path)
    for name in (path.stem, path.name, f"recipes/{path.name}"):
        assert load_recipe(name) == by_path


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_every_bundled_recipe_is_the_same_after_a_round_trip(path, tmp_path):
    recipe = load_recipe(str(path))
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(str(resolved)) == recipe
    assert load_recipe(str(resolved)).to_yaml() == recipe.to_yaml()


def test_the_quick_start_is_equations_with_six_and_three_points():
    recipe = load_recipe("equations")
    assert (recipe.task, [spec.weight for spec in recipe.rewards]) == ("equations", [6, 3])


@pytest.mark.parametrize("name", ["equation", "equations.yml", "nowhere/equations.yaml", "recipes"])
def test_a_recipe_that_is_not_there_is_named_with_those_that_are(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if name == "recipes":
        (tmp_path / "recipes").mkdir()
    with pytest.raises(UserError, match="equations") as error:
        find_recipe(name)
    assert repr(name) in str(error.value)


def test_loading_a_recipe_does_not_import_torch():
    code = (
        "import sys; from coterie.recipe import load_recipe; load_recipe('equations').to_yaml(); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Choices


@pytest.mark.parametrize(
    ("section", "setting", "choices"),
    [
        (Advantage, "baseline", BASELINES),
        (Advantage, "scale", SCALES),
        (Clip, "ratio", RATIOS),
        (Clip, "aggregation", AGGREGATIONS),
        (KL, "estimator", (*ESTIMATORS, "exact")),
        (Recipe, "preset", PRESETS),
    ],
)
def test_the_choices_of_a_recipe_are_those_of_the_algorithms(section, setting, choices):
    assert get_args(section.model_fields[setting].annotation) == tuple(choices)


def with_preset(preset, **more):
    """A recipe that gives a preset what its method needs, and nothing that it has no use for."""
    method = PRESETS[preset].get("method", "grpo")
    if method in ("dpo", "reward_model"):
        more["task"] = {"data": "d.jsonl", "chosen": "good", "rejected": "bad"}
    elif method == "sft":
        more["task"] = {"data": "d.jsonl", "answer": "answer"}
    if method == "reward_model":
        more["rewards"] = None
    return made(preset=preset, **more)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_gives_values_and_the_recipe_has_the_last_word(preset):
    recipe = with_preset(preset)
    for section, settings in PRESETS[preset].items():
        if not isinstance(settings, dict):
            assert getattr(recipe, section) == settings
            continue
        for setting, value in settings.items():
            assert getattr(getattr(recipe, section), setting) == value
    changed = with_preset(preset, optimiser={"max_grad_norm": 0.7})
    optimiser = recipe.optimiser.model_copy(update={"max_grad_norm": 0.7})
    assert changed == recipe.model_copy(update={"optimiser": optimiser})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resolved_preset_reads_back_as_itself(preset):
    """What is stored with a run names no setting without effect, and is the same recipe."""
    recipe = with_preset(preset)
    assert make_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("objective", LOSSES.kinds)
def test_another_objective_may_be_chosen_over_any_preset(objective):
    for preset in ("grpo", "sapo", "gmpo", "anchored", "rloo"):
        assert made(preset=preset, loss={"objective": objective}).loss.objective == objective


@pytest.mark.parametrize(
    ("values", "named", "why"),
    [
        ({"preset": "sapo", "loss": {"clip_high": 0.3}}, "loss.clip_high", "objective is sapo"),
        ({"preset": "gmpo", "loss": {"ratio": "sequence"}}, "loss.ratio", "objective is gmpo"),
        ({"loss": {"anchor_alpha": 0.3}}, "loss.anchor_alpha", "objective is clip"),
        ({"loss": {"clip_ceiling": 2}}, "loss.clip_ceiling", "objective is clip"),
        ({"preset": "dr_grpo", "kl": {"place": "reward"}}, "kl.place", "kl_weight is 0"),
        ({"kl": {"adapt_rate": 0.3}}, "kl.adapt_rate", "target is not set"),
        ({"entropy": {"adapt_rate": 0.3}}, "entropy.adapt_rate", "target is not set"),
        ({"reference": {"decay": 0.9}}, "reference.decay", "kind is frozen"),
        ({"preset": "dr_grpo", "reference": {"kind": "moving"}}, "reference.kind", "kl_weight is 0"),
        ({"correction": {"limit": 3}}, "correction.limit", "kind is none"),
        ({"overlong": {"penalty": 3}}, "overlong.penalty", "treatment is keep"),
        ({"value": {"clip": 3}}, "value", "method is grpo"),
        ({"preset": "ppo", "advantage": {"scale": "none"}}, "advantage", "method is ppo"),
        ({"preset": "ppo", "dynamic_sampling": {"rounds": 2}}, "dynamic_sampling", "method is ppo"),
        ({"group_size": 1}, "group_size", "nothing to compare with"),
        ({"kl": {"target": 0.1, "adapt_rate": 1}}, "kl.adapt_rate", "1"),
        ({"preset": "ppo", "value": {"warmup_steps": 100}}, "value.warmup_steps", "100"),
        ({"rewards": [{"function": "m:f", "name": "kl"}]}, "rewards", "taken by a metric"),
        ({"rewards": ["m:f", {"function": "m:g", "name": "f_group_std"}]}, "rewards", "taken by a metric"),
        ({"preset": "dpo", "record": {"max_megabytes_per_step": 1}}, "record", "method is dpo"),
        ({"preset": "gdpo", "overlong": {"treatment": "punish"}}, "overlong.treatment", "normalise away"),
        ({"preset": "gdpo", "loss": {"kl_weight": 0.1}, "kl": {"place": "reward"}}, "kl.place", "normalise away"),
        ({"advantage": {"baseline": "batch"}}, "advantage.scale", "baseline is batch"),
        ({"advantage": {"baseline": "none", "scale": "batch", "combine": "each"}}, "advantage.combine", "not none"),
        ({"preset": "dpo", "task": {"data": "d.jsonl"}}, "task.chosen", "learns from it"),
        ({"preset": "sft", "task": {"data": "d.jsonl"}}, "task.answer", "learns from it"),
        ({"loss": {"objective": "clipp"}}, "loss.objective", "clip"),
        ({"loss": {"objective": "anchored", "anchor_alpha": 1.0}}, "loss.anchor_alpha", "1"),
    ],
)
def test_what_contradicts_or_does_nothing_is_refused_with_reason(values, named, why):
    with pytest.raises(UserError) as error:
        made(**values)
    assert f"{named}:" in str(error.value)
    assert why in str(error.value)


@pytest.mark.parametrize("objective", LOSSES.kinds)
def test_what_other_objectives_alone_have_is_refused_by_the_choice(objective):
    """Whatever the union says: no list of what does nothing is kept."""
    own = LOSSES.kinds[objective].model_fields
    for name in LOSSES.fields().keys() - own.keys():
        message = refusal(loss={"objective": objective, name: 0.5})
        assert (
            f"loss.{name}: has no effect while loss.objective is {objective}; change that, or leave this out" in message
        )
    assert made(loss={"objective": "mine.py:f", "gate_positive": 0.5, "clip_ceiling": 2}).loss.gate_positive == 0.5


def test_presets_are_what_their_papers_say():
    """DAPO: two bounds, all tokens, no KL. Dr. GRPO: no std, a fixed length, no KL. GRPO: one bound, a KL of 0.04."""
    grpo, dr_grpo, dapo = (made(preset=name) for name in ("grpo", "dr_grpo", "dapo"))
    assert (dapo.loss.clip_low, dapo.loss.clip_high, dapo.loss.aggregation, dapo.loss.kl_weight) == (
        0.2,
        0.28,
        "token_mean",
        0,
    )
    assert (dr_grpo.advantage.scale, dr_grpo.loss.aggregation, dr_grpo.loss.kl_weight) == ("none", "fixed_length", 0)
    assert (grpo.advantage.scale, grpo.loss.aggregation, grpo.loss.kl_weight) == ("sample", "sequence_mean", 0.04)
    assert grpo.loss.clip_low == grpo.loss.clip_high == 0.2


# What is refused


@pytest.mark.parametrize(
    ("settings", "key", "hint"),
    [
        ({"stpes": 3}, "stpes", "did you mean 'steps'"),
        ({"loss": {"clip_hihg": 0.3}}, "loss.clip_hihg", "did you mean 'clip_high'"),
        ({"loss": {"temperature": 0.3}}, "loss.temperature", "did you mean 'sampling.temperature'"),
        ({"learning_rate": 0.3}, "learning_rate", "did you mean"),
        ({"optimizer": {"learning_rate": 0.3}}, "optimizer", "did you mean 'optimiser'"),
        ({"task": {"data": "x.jsonl", "promt": "q"}}, "task.promt", "did you mean 'prompt'"),
        ({"rewards": [{"function": "m:f", "wieght": 2}]}, "rewards.0.wieght", "did you mean 'weight'"),
        ({"cold_start": {"rows": 2}}, "cold_start.rows", "rows_per_step"),
        ({"preset": "grop"}, "preset", "did you mean 'grpo'"),
        ({"preset": "gpro"}, "preset", "did you mean 'grpo'"),
        ({"preset": "GRPO"}, "preset", "did you mean 'grpo'"),
        ({"preset": "dr_gpro"}, "preset", "did you mean 'dr_grpo'"),
        ({"preset": "gdop"}, "preset", "did you mean 'gdpo'"),
        ({"task": "equation"}, "task", "did you mean 'equations'"),
        ({"loss": {"ratio": "tokens"}}, "loss.ratio", "did you mean 'token'"),
        ({"kl": {"estimator": "k4"}}, "kl.estimator", "k1, k2, k3"),
        ({"method": "gpro"}, "method", "did you mean 'grpo'"),
        ({"loss": {"objective": "spao", "gate_positive": 2}}, "loss.objective", "did you mean 'sapo'"),
        ({"lora": {"dropout": 0.1}}, "lora.dropout", "rank"),
        ({"lora": {"targts": "q_proj"}}, "lora.targts", "did you mean 'targets'"),
        (
            {"optimiser": {"gradient_checkpointing": True}},
            "optimiser.gradient_checkpointing",
            "'activation_checkpointing'",
        ),
        ({"advantage": {"scale": "std"}}, "advantage.scale", "population"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(settings, key, hint):
    message = refusal(**settings)
    assert f"{key}:" in message
    assert hint in message


def test_the_letters_of_a_misspelt_name_decide():
    """By hand: `min` lacks four of its letters; `min_main` lacks one and has two others."""
    assert closest("minmnin", ["min", "min_main"]) == "min_main"


@pytest.mark.parametrize(
    ("settings", "key", "given"),
    [
        ({"steps": "many"}, "steps", "'many'"),
        ({"steps": 2.5}, "steps", "2.5"),
        ({"steps": True}, "steps", "True"),
        ({"loss": {"clip_high": True}}, "loss.clip_high", "True"),
        ({"steps": [3]}, "steps", "[3]"),
        ({"loss": {"clip_low": None}}, "loss.clip_low", "None"),
        ({"loss": 3}, "loss", "3"),
        ({"loss": ["clip_low"]}, "loss", "clip_low"),
        ({"loss": {"clip_low": "low"}}, "loss.clip_low", "'low'"),
        ({"model": 5}, "model", "5"),
        ({"rewards": 5}, "rewards", "5"),
        ({"rewards": [{"function": 5}]}, "rewards.0.function", "5"),
        ({"preset": ["grpo"]}, "preset", "grpo"),
        ({"seed": {}}, "seed", "{}"),
        ({"lora": True}, "lora", "True"),
        ({"lora": {"targets": 3}}, "lora.targets", "3"),
        ({"lora": {"rank": 1.5}}, "lora.rank", "1.5"),
        ({"optimiser": {"activation_checkpointing": []}}, "optimiser.activation_checkpointing", "[]"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_was_given(settings, key, given):
    message = refusal(**settings)
    assert f"{key}:" in message
    assert given in message


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"steps": 0}, "steps"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"group_size": 1}, "group_size"),
        ({"loss": {"clip_low": 1.5}}, "loss.clip_low"),
        ({"loss": {"clip_low": 0}}, "loss.clip_low"),
        ({"loss": {"clip_high": float("inf")}}, "loss.clip_high"),
        ({"loss": {"kl_weight": -0.1}}, "loss.kl_weight"),
        ({"loss": {"kl_weight": float("nan")}}, "loss.kl_weight"),
        ({"sampling": {"top_p": 0}}, "sampling.top_p"),
        ({"sampling": {"top_p": float("nan")}}, "sampling.top_p"),
        ({"sampling": {"top_k": -1}}, "sampling.top_k"),
        ({"sampling": {"temperature": -1}}, "sampling.temperature"),
        ({"max_failed_rewards": 1.1}, "max_failed_rewards"),
        ({"optimiser": {"learning_rate": 0}}, "optimiser.learning_rate"),
        ({"optimiser": {"beta1": 1}}, "optimiser.beta1"),
        ({"checkpoint": {"every": 0}}, "checkpoint.every"),
        ({"rewards": [{"function": "m:f", "weight": float("nan")}]}, "rewards.0.weight"),
        ({"task": {"data": "x.jsonl", "heldout": 1.01}}, "task.heldout"),
        ({"lora": {"rank": 0}}, "lora.rank"),
        ({"lora": {"alpha": 0}}, "lora.alpha"),
        ({"lora": {"targets": []}}, "lora.targets"),
        ({"lora": {"targets": ["q_proj", ""]}}, "lora.targets"),
        ({"lora": {"targets": ["all-linear", "q_proj"]}}, "lora.targets"),
    ],
)
def test_a_value_out_of_range_is_named(settings, key):
    assert f"{key}:" in refusal(**settings)


@pytest.mark.parametrize("missing", ["model", "task", "rewards"])
def test_what_is_needed_is_asked_for(missing):
    with pytest.raises(UserError, match=f"{missing}:"):
        make_recipe({key: value for key, value in LEAST.items() if key != missing})


def test_a_section_of_lora_trains_it_and_one_target_is_enough():
    assert made().lora is None
    assert made(lora={}).lora == made(lora={"rank": 16, "alpha": 32, "targets": "all-linear"}).lora
    assert made(lora={"targets": "q_proj"}).lora.targets == ("q_proj",)


def test_an_empty_section_is_no_section():
    assert made(loss=None, kl=None, preset="dapo") == made(preset="dapo")


def test_every_mistake_is_told_at_once():
    message = refusal(stpes=3, seed=-1, loss={"clip_low": "low"})
    assert all(f"{key}:" in message for key in ("stpes", "seed", "loss.clip_low"))
    message = refusal(preset="reward_model", loss={"clip_low": 0.1}, sampling={"top_k": 3}, group_size=4)
    assert all(f"{key}: has no effect" in message for key in ("loss", "sampling", "rewards", "group_size"))


@pytest.mark.parametrize(
    ("settings", "key", "word"),
    [
        ({"kl": {"estimator": "k1"}, "loss": {"kl_weight": 0}}, "kl.estimator", "no effect"),
        ({"preset": "dapo", "kl": {"estimator": "k3"}}, "kl.estimator", "no effect"),
        ({"task": {"data": "x", "evaluation": "y", "heldout": 0.2}}, "task.heldout", "while task.evaluation is set"),
        (
            {"task": {"data": "x", "evaluation_split": "dev"}},
            "task.evaluation_split",
            "while task.evaluation is not set",
        ),
        ({"sampling": {"temperature": 0}}, "sampling.temperature", "greedy"),
        ({"task": {"data": "x.jsonl"}, "cold_start": {}}, "cold_start", "demonstrations"),
        ({"rewards": []}, "rewards", "at least one"),
        ({"rewards": ["a:f", "b:f"]}, "rewards", "same name"),
        ({"preset": "dr_grpo", "advantage": {"epsilon": 1e-3}}, "advantage.epsilon", "no effect"),
        ({"optimiser": {"schedule": "constant", "final_share": 0.1}}, "optimiser.final_share", "no effect"),
        ({"checkpoint": {"keep_best": 1}}, "checkpoint.keep_best", "no effect"),
    ],
)
def test_a_contradiction_or_a_setting_without_effect_is_refused(settings, key, word):
    message = refusal(**settings)
    assert key in message
    assert word in message


def test_two_rewards_of_the_same_function_need_names():
    recipe = made(rewards=[{"function": "a:f", "name": "one"}, {"function": "a:f", "name": "two"}])
    assert [spec.name for spec in recipe.rewards] == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [("steps: 3\nseed: 1\nsteps: 4\n", 3, "steps"), ("loss:\n  clip_low: 0.1\n  clip_low: 0.2\n", 3, "clip_low")],
)
def test_a_key_that_stands_twice_is_named_with_its_line(text, line, key, write):
    path = write(text, least=False)
    message = refused_file(path)
    assert path in message
    assert f"line {line}" in message
    assert repr(key) in message


@pytest.mark.parametrize(
    "text",
    ["", "- a\n", "words\n", "a: [\n", "? [a]\n: 3\n", "1: 2\n", "a: !!python/object/apply:os.getcwd []\n",
     "\x00", "a: &x [*x]\n",
     "steps: 1e999\n", "[" * 5000],
    ids=["empty", "list", "text", "open", "list key", "number key", "python", "nul", "loop", "infinite", "deep"],
)  # fmt: skip
def test_hostile_yaml_is_refused_in_a_paragraph_with_its_file(text, write):
    path = write(text, least=False)
    assert path in refused_file(path)


def test_broken_yaml_is_named_with_its_line(write):
    path = write("steps: 3\nloss: {clip_low: 0.1\nseed: 1\n", least=False)
    assert f"{path}:3" in refused_file(path)


def test_a_recipe_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"seed: \xff\xfe\n")
    assert str(path) in refused_file(str(path))


# --set


def test_set_changes_what_the_file_says(write):
    path = write("loss: {clip_low: 0.1}\n")
    recipe = load_recipe(path, ["loss.clip_high=0.5", "steps=7", "optimiser.learning_rate=1e-5", "kl.estimator=k1"])
    assert (recipe.loss.clip_low, recipe.loss.clip_high, recipe.steps) == (0.1, 0.5, 7)
    assert (recipe.optimiser.learning_rate, recipe.kl.estimator) == (1e-5, "k1")


def test_a_later_set_wins_and_may_hold_a_section_or_an_equals(write):
    recipe = load_recipe(write(""), ["seed=1", "seed=2", "loss={clip_low: 0.3, clip_high: 0.4}", "tokenizer=a=b"])
    assert (recipe.seed, recipe.loss.clip_low, recipe.loss.clip_high, recipe.tokenizer) == (2, 0.3, 0.4, "a=b")


def test_set_can_choose_another_preset(write):
    assert load_recipe(write("preset: grpo\n"), ["preset=dapo"]).loss.clip_high == 0.28


@pytest.mark.parametrize(
    "override",
    ["steps", "=3", "loss.=3", ".clip_low=3", "loss..clip_low=3", "", "seed=[1", "seed.inner=3", "seed={a: 1, a: 2}"],
)
def test_set_refuses_what_it_cannot_read_and_shows_it(override, write):
    message = refused_file(write("seed: 4\n"), override)
    assert override in message
    assert "--set" in message


def test_set_of_an_unknown_key_names_the_nearest(write):
    assert "did you mean 'clip_high'" in refused_file(write(""), "loss.clip_hig=0.3")


def test_set_changes_a_reward_by_its_name(write):
    own = {**LEAST, "preset": "grpo", "rewards": ["m:f", {"function": "m:g", "name": "other", "weight": 2}]}
    overrides = ["rewards.f.weight=3", "rewards.other.function=n:h", "rewards.other.options.deep=1"]
    found = load_recipe(write(yaml.safe_dump(own), least=False), overrides).rewards
    assert [(spec.function, spec.name, spec.weight) for spec in found] == [("m:f", "f", 3), ("n:h", "other", 2)]
    assert found[1].options == {"deep": 1}


def test_set_of_an_unknown_reward_names_the_nearest(write):
    assert "did you mean 'right_answer'" in refused_file(write(""), "rewards.right_anwser.weight=1")


# The resolved recipe


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preset": "dapo"},
        {"preset": "dr_grpo", "loss": {"kl_weight": 0.02}, "kl": {"estimator": "k1"}},
        {
            "task": {"data": "none.jsonl", "prompt": "问题", "correct_above": -0.5},
            "tokenizer": "bytes",
            "max_failed_rewards": 0,
        },
        {
            "rewards": [{"function": "a:f", "weight": -2.5}, {"function": "b:f", "name": "g"}],
            "cold_start": {"steps": 3},
        },
        {"optimiser": {"learning_rate": 1e-7, "schedule": "cosine", "final_share": 0.1}},
        {"lora": {}, "optimiser": {"activation_checkpointing": True}},
        {"lora": {"rank": 4, "targets": ["q_proj", "layers.0.mlp.up_proj"]}},
        {
            "model": {"type": "llama", "hidden_size": 64, "rope_theta": 1e6},
            "made_with": {"torch": "2.13", "commit": None},
        },
    ],
)
def test_a_resolved_recipe_says_all_and_comes_back_the_same(settings):
    recipe = made(**settings)
    again = make_recipe(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


def test_a_resolved_recipe_does_not_lean_on_its_preset():
    values = yaml.safe_load(made(preset="dapo").to_yaml())
    for section, settings in PRESETS["dapo"].items():
        assert settings.items() <= values[section].items()


@pytest.mark.parametrize(
    ("settings", "section", "setting"),
    [
        ({"preset": "dapo"}, "kl", "estimator"),
        ({"preset": "dr_grpo"}, "advantage", "epsilon"),
        ({"optimiser": {"schedule": "constant"}}, "optimiser", "final_share"),
    ],
)
def test_a_resolved_recipe_holds_nothing_that_does_not_act(settings, section, setting):
    assert setting not in yaml.safe_load(made(**settings).to_yaml()).get(section, {})


def test_the_short_form_says_what_acts_in_the_objective():
    """By hand: no entropy with a weight of 0, nothing that is not set, and no setting that the others leave without effect."""
    advantage = "advantage.baseline=group advantage.scale=none advantage.combine=sum"
    clipped = "loss.ratio=token loss.clip_low=0.2 loss.clip_high=0.2 loss.clip_bounds=fixed"
    assert made(preset="dr_grpo", seed=3).in_short() == (
        f"preset dr_grpo, seed 3: {advantage} loss.objective=clip loss.aggregation=fixed_length loss.kl_weight=0.0 {clipped}"
    )


def test_files_beside_a_recipe_are_found_from_anywhere(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    (home / "rows.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    (home / "mine.py").write_text(
        "def good(completions, **_):\n    return [1.0] * len(completions)\n", encoding="utf-8"
    )
    values = {
        "model": {"type": "qwen3"},
        "task": {"data": "rows.jsonl"},
        "rewards": "mine.py:good",
        "tokenizer": "bytes",
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("home/recipe.yaml")
    assert recipe.task.data == str(home / "rows.jsonl")
    assert recipe.rewards[0].name == "good"
    (reward,) = load_rewards(recipe.rewards)
    assert reward.function(completions=["a"]) == [1.0]


@pytest.mark.parametrize(
    ("function", "word"),
    [
        ("coterie.tasks.equation_rewards:right_anwser", "did you mean 'right_answer'"),
        ("coterie.rewards.nothing:f", "can't be imported"),
        ("nothing.py:f", "does not exist"),
        ("right_answer", "your own is module:function"),
    ],
)
def test_a_reward_that_is_not_there_is_named(function, word):
    with pytest.raises(UserError, match=word):
        load_rewards(made(rewards=[function]).rewards)


def test_a_recipe_cannot_be_changed_once_made():
    with pytest.raises(ValueError, match="frozen"):
        made().steps = 3


def test_files_of_a_reward_s_options_are_found_beside_the_recipe(tmp_path):
    """Of a function of the user's what is written as a path; of a built-in reward the options that are paths."""
    for name in ("model", "lists", "judge"):
        (tmp_path / name).mkdir()
    (tmp_path / "lists" / "words.txt").write_text("")
    rewards = [
        {
            "function": "mine:f",
            "options": {"words": "lists/words.txt", "mode": "model", "deep": 1, "text": "a/b" * 9999},
        },
        {"function": "reward_model", "options": {"model": "model"}},
        {"function": "judge", "options": {"model": "model", "cache": "judge"}},
    ]
    values = {"model": {"type": "gpt2"}, "task": "equations", "rewards": rewards, "device": "cpu"}
    mine, learned, judge = make_recipe(values, folder=tmp_path).rewards
    assert mine.options == {
        "words": str(tmp_path / "lists/words.txt"),
        "mode": "model",
        "deep": 1,
        "text": "a/b" * 9999,
    }
    assert learned.options == {"model": str(tmp_path / "model"), "device": "cpu"}
    assert judge.options == {"model": "model", "cache": str(tmp_path / "judge")}
    rewards[1]["options"]["device"] = "auto"
    assert make_recipe(values, folder=tmp_path).rewards[1].options["device"] == "auto"


def _bomb(line):
    """Ten names of ten names of ...: 10**12 values in a few hundred bytes."""
    levels = [f"a{n}: &a{n} " + line(n) for n in range(1, 13)]
    return "\n".join(["a0: &a0 [x]", *levels])


HUGE = {
    "lists of aliases": _bomb(lambda n: "[" + ", ".join([f"*a{n - 1}"] * 10) + "]"),
    "merged aliases": "a0: &a0 {x: 1}\n"
    + "\n".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 9)),
    "what holds itself": "a: &a [*a]",
    "what holds itself in a mapping": "a: &a {b: *a}",
    "deep lists": "[" * 50_000,
    "deep mappings": "{a: " * 5000,
    "forty levels": "a: " + "[" * 40 + "]" * 40,
    "unknown settings": "\n".join(f"setting_{n}: 1" for n in range(5000)),
    "unknown settings inside": "model: {type: gpt2}\nloss:\n" + "\n".join(f"  setting_{n}: 1" for n in range(4000)),
    "too many values": "a: [" + "1, " * 20_000 + "]",
    "a huge file": "a: " + "x" * 10_000_000,
    "a long name": "x" * 1000 + ": 1",
    "a long text": "steps: " + "x" * 90_000,
    "many digits": "steps: " + "9" * 50_000,
    "many hexadecimal digits": "steps: 0x" + "f" * 50_000,
    "base sixty": "steps: " + ":".join(["59"] * 20_000),
    "a number that is too large": "steps: 1000000000000000000000000",
    "an infinite number": "loss: {clip_low: 1.0e+999}",
    "a date that there is not": "seed: 2001-99-99",
    "bytes": "seed: !!binary ////",
    "an object": "seed: !!python/object/apply:os.system [x]",
    "no character": "seed: '\x00'",
}


@pytest.mark.timed
@pytest.mark.parametrize("name", HUGE)
@pytest.mark.parametrize("where", ["file", "set"])
def test_a_recipe_of_any_size_is_refused_at_once_and_briefly(tmp_path, name, where):
    start = time.perf_counter()
    path, overrides = tmp_path / "recipe.yaml", []
    path.write_text(HUGE[name] if where == "file" else "model: {type: gpt2}\ntask: equations\n", encoding="utf-8")
    if where == "set":
        value = HUGE[name].partition(": ")[2] if name in ("many digits", "base sixty", "a long text") else HUGE[name]
        overrides = [f"steps={value}"]
    with pytest.raises(UserError) as error:
        load_recipe(str(path), overrides)
    assert len(str(error.value)) < 3000
    assert time.perf_counter() - start < 5


def test_aliases_and_merges_of_a_usual_size_are_read(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "model: {type: gpt2}\ntask: equations\nrewards:\n- &first {function: steps, name: one, options: {}}\n- {<<: *first, name: two}\n"
    )
    assert [spec.name for spec in load_recipe(str(tmp_path / "recipe.yaml")).rewards] == ["one", "two"]


def test_a_pipe_or_a_device_is_no_recipe(tmp_path):
    os.mkfifo(tmp_path / "recipe.yaml")
    for path in (tmp_path / "recipe.yaml", "/dev/zero"):
        with pytest.raises(UserError, match=r"was not found|no plain file"):
            load_recipe(str(path))


def test_a_run_s_own_settings_give_way_to_what_is_set(tmp_path):
    """A run's recipe names every setting; what has no effect beside what somebody sets now is no mistake of theirs."""
    data = tmp_path / "other.jsonl"
    data.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    values = {
        "model": {"type": "llama"},
        "tokenizer": "bytes",
        "rewards": "coterie.rewards:answer",
        "task": {"data": str(data)},
    }
    own = make_recipe({**values, "made_with": {"torch": "2.13"}})
    (tmp_path / "recipe.yaml").write_text(own.to_yaml())
    file = str(tmp_path / "recipe.yaml")

    evaluated = load_recipe(file, [f"task.evaluation={data}"])
    assert evaluated.task.evaluation == str(data)
    gated = load_recipe(file, ["loss.objective=sapo", "loss.gate_positive=2"])
    assert gated.loss.objective == "sapo"
    assert gated.loss.gate_positive == 2
    with pytest.raises(UserError, match=r"loss.clip_low: has no effect while loss.objective is sapo"):
        load_recipe(file, ["loss.objective=sapo", "loss.clip_low=0.1"])
