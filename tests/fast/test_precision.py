"""What `precision: auto` comes to, and that a run keeps it."""

import pytest
import yaml
from small_runs import TINY, finished, select

import coterie
from coterie.commands.models import check_recipe
from coterie.errors import UserError
from coterie.fast import precision
from coterie.fast.half import has_half_products
from coterie.fast.precision import SMALLEST_WIDTH, with_precision
from coterie.recipe import load_recipe

WIDE = "{type: llama, num_hidden_layers: 1, num_attention_heads: 4, intermediate_size: 64, hidden_size: "


def chosen(model, *more):
    told = []
    recipe = with_precision(load_recipe("equations", [f"model={model}", *more]), told.append)
    return recipe.precision, " ".join(told)


@pytest.mark.skipif(not has_half_products(), reason="no AVX512-BF16 and no AMX here")
def test_a_model_that_gains_is_computed_in_mixed_precision():
    found, told = chosen(f"{WIDE}{SMALLEST_WIDTH}}}", "device=cpu")
    assert found == "mixed"
    assert told == "precision: auto is mixed here: the processor has products of bfloat16 numbers"


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (f"{WIDE}{SMALLEST_WIDTH - 8}}}", "too small"),
        (f"{{type: gpt2, n_layer: 1, n_head: 4, n_embd: {SMALLEST_WIDTH}}}", "gpt2 has no compiled loops"),
    ],
)
def test_others_stay_in_float32(model, why, monkeypatch):
    monkeypatch.setattr(precision, "has_half_products", lambda: True)
    found, told = chosen(model, "device=cpu")
    assert found == "float32"
    assert why in told


def test_without_such_products_everything_stays_in_float32(monkeypatch):
    monkeypatch.setattr(precision, "has_half_products", lambda: False)
    assert chosen(f"{WIDE}{SMALLEST_WIDTH}}}", "device=cpu")[0] == "float32"


@pytest.mark.parametrize("given", ["float32", "mixed"])
def test_what_is_given_is_taken_and_nothing_said(given):
    assert chosen(f"{WIDE}32}}", f"precision={given}") == (given, "")


def test_a_run_keeps_what_it_was_begun_in(tmp_path):
    assert yaml.safe_load((finished() / "recipe.yaml").read_text())["precision"] == "float32"
    assert select(finished(), "SELECT value FROM inputs WHERE name = 'precision'") == [('"float32"',)]
    folder = coterie.train("equations", overrides=[*TINY, "precision=mixed"], out=str(tmp_path / "run"), stop_after=2)
    with pytest.raises(UserError, match=r'precision: was "mixed", is "float32"'):
        coterie.train(resume=str(folder.folder), overrides=["precision=float32"])


def test_check_says_which_it_is(tiny_recipe, capsys):
    check_recipe(load_recipe("equations", tiny_recipe))
    printed = capsys.readouterr().out
    assert "precision: auto is float32 here" in printed
    assert "precision: float32" in printed
