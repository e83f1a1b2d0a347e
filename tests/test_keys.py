"""Keys and passwords stay out of what is written and printed."""

import pytest

from coterie.errors import UserError
from coterie.keys import hidden
from coterie.recipe import make_recipe


def test_what_the_environment_holds_is_hidden(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "0123456789abcdef")
    monkeypatch.setenv("SHORT_KEY", "word")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "not-a-key")
    assert hidden("0123456789abcdef, a word, not-a-key") == "***, a word, not-a-key"


@pytest.mark.parametrize("key", ["sk-proj-abcdefgh12345678", "hf_abcdefghijklmnop1234", "ghp_abcdefghijklmnop1234"])
def test_what_has_the_form_of_a_key_is_hidden(key):
    assert hidden(f"refused: {key}.") == "refused: ***."


VALUES = {"model": {"type": "gpt2"}, "tokenizer": "bytes", "task": {"data": "data.jsonl"}}


@pytest.mark.parametrize(
    "options",
    [
        {"api_key": "my own"},
        {"nested": {"password": "hunter2"}},
        {"header": "Bearer sk-abcdefgh12345678"},
        {"url": "https://me:hunter2@example.org/v1"},
        {"urls": ["https://example.org/v1?api_key=hunter2"]},
    ],
)
def test_a_recipe_that_holds_a_key_is_refused_without_repeating_it(options):
    with pytest.raises(UserError, match=r"rewards\.0\.options.*environment variable") as error:
        make_recipe({**VALUES, "rewards": [{"function": "mine:f", "options": options}]})
    assert not [value for value in ("my own", "hunter2", "sk-abc") if value in str(error.value)]


def test_a_recipe_that_holds_the_value_of_a_key_is_refused(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "0123456789abcdef")
    with pytest.raises(UserError, match=r"rewards\.0\.options\.mine"):
        make_recipe({**VALUES, "rewards": [{"function": "mine:f", "options": {"mine": "0123456789abcdef"}}]})


def test_words_about_keys_are_no_keys():
    options = {"key_variable": "OPENAI_API_KEY", "token": "</answer>", "url": "https://example.org/v1", "max_tokens": 3}
    make_recipe({**VALUES, "rewards": [{"function": "mine:f", "options": options}]})
