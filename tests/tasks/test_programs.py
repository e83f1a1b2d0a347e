"""The programs task: unseen functions held out, examples and tests that leave no doubt, and demonstrations that do as said."""

import functools
import json
import math
import re
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import coterie
from coterie.models.codec import Codec
from coterie.recipe import load_recipe
from coterie.tasks.functions import KINDS, grammar
from coterie.tasks.load import make_task
from coterie.tasks.programs import (
    BASIC_SHARE,
    FUNCTIONS,
    HELDOUT_SHARE,
    NUM_SHOWN,
    NUM_TESTS,
    QUALITIES,
    SETS_PER_FUNCTION,
    Exercise,
    Programs,
    hard_codes,
    is_heldout,
    make_tokenizer,
    parse_examples,
)
from coterie.types import Completion, Group, Scored

CODEC = Codec.of(make_tokenizer())
TASK = Programs(CODEC)
AGAIN = Programs(CODEC)  # as a resumed run makes it
SOURCES = {function.source: function for function in FUNCTIONS}
HELDOUT = [function for function in FUNCTIONS if is_heldout(function)]


@functools.cache
def compiled(source):
    """A program of ours as a function. Only what the grammar makes is run here."""
    names = {}
    exec(source, names)
    return names["f"]


def results(source, tests):
    """What a program of ours gives, one by one, so that the first that differs can be the last that is asked."""
    return (compiled(source)(*test["args"]) for test in tests)


def passes(source, tests):
    """Whether its results are those expected, type for type."""
    return all(
        repr(result) == repr(test["expected"]) for result, test in zip(results(source, tests), tests, strict=True)
    )


def exercises(every=1):
    return [Exercise(function, key=7) for function in FUNCTIONS[::every]]


def demonstrations(count, seed=0, step=1):
    """Prompts and programs, as text."""
    return [
        (CODEC.decode(prompt), CODEC.decode(answer))
        for prompt, answer in TASK.demonstrations(count, seed=seed, step=step)
    ]


# Functions


def test_no_two_functions_do_the_same():
    for kind in KINDS:
        rows = [json.dumps(row) for row in grammar(kind).outputs]
        assert len(set(rows)) == len(rows) > 60


def test_every_function_s_source_does_what_the_grammar_says():
    """Each program is run as it is written, on every input, and agrees with the table that prompts and tests come from."""
    for function in FUNCTIONS:
        found = grammar(function.kind)
        assert [compiled(function.source)(value) for value in found.inputs] == found.outputs[function.row]


@pytest.mark.parametrize(
    ("kind", "expression", "given", "result"),
    [
        ("number", "3 * x + 4", 5, 19),
        ("number", "x * x + 3 * x + 4", 5, 44),
        ("number", "x * x + 13", 5, 38),
        ("list", "[7] + sorted(xs)", [3, 1, 2], [7, 1, 2, 3]),
        ("list", "sorted(xs)[::-1]", [3, 1, 2], [3, 2, 1]),
        ("list", "[7] + xs[1:] + [0]", [3, 1, 2], [7, 1, 2, 0]),
        ("text", '"w" + s.upper() + "z"', "bcd", "wBCDz"),
        ("text", 's[::-1] + "w"', "bcd", "dcbw"),
    ],
)
def test_functions_worked_by_hand(kind, expression, given, result):
    """Some of these have two texts, so the function is looked for by what it does."""
    source = f"def f({KINDS[kind]}):\n    return {expression}"
    assert compiled(source)(given) == result
    assert [compiled(source)(value) for value in grammar(kind).inputs] in grammar(kind).outputs


def test_a_share_of_the_functions_is_held_out_and_no_single_step():
    assert not any(function.basic for function in HELDOUT)
    for kind in KINDS:
        share = [is_heldout(function) for function in FUNCTIONS if function.kind == kind and not function.basic]
        n, p = len(share), HELDOUT_SHARE
        assert abs(sum(share) - n * p) < 3 * math.sqrt(n * p * (1 - p))


@functools.cache
def functions_of():
    """The one function of the grammar that every prompt's examples and tests are of."""
    found = {}
    for prompt in (*TASK.train, *TASK.heldout):
        tests = [*parse_examples(prompt.text), *prompt.columns["tests"]]
        (found[prompt.text],) = (f for f in grammar(prompt.columns["kind"]).functions if passes(f.source, tests))
    return found


def function_of(prompt):
    return functions_of()[prompt.text]


def test_train_and_heldout_prompts_share_no_function():
    train, heldout = ({function_of(prompt).source for prompt in prompts} for prompts in (TASK.train, TASK.heldout))
    assert not train & heldout
    assert train | heldout == set(SOURCES)
    assert heldout == {function.source for function in HELDOUT}


# Prompts and tests


def test_a_prompt_s_examples_and_tests_have_different_inputs():
    for prompt in (*TASK.train, *TASK.heldout):
        shown, tests = parse_examples(prompt.text), prompt.columns["tests"]
        assert len(shown) == NUM_SHOWN
        assert len(tests) == NUM_TESTS
        assert not {json.dumps(test["args"]) for test in shown} & {json.dumps(test["args"]) for test in tests}
        assert prompt.columns["function"] == "f"
        assert json.loads(json.dumps(tests)) == tests


@pytest.mark.parametrize("kind", ["list", "text"])
def test_shown_values_tell_their_place_and_tests_vary(kind):
    """In prompts each place has values of its own, which no function adds. Tests have other lengths, and orders."""
    found = grammar(kind)
    shown, hidden = found.inputs[: found.num_shown], found.inputs[found.num_shown :]
    places = [set(values) for values in zip(*shown, strict=True)]
    assert len(places) == 3
    assert len(set.union(*places)) == sum(map(len, places))
    ends = {
        end
        for f in found.functions
        for end in re.findall(r'\[(\d)\] \+|\+ \[(\d)\]|"(.)"', f.expression)
        for end in end
        if end
    }
    assert ends
    assert not ends & set(map(str, set.union(*places)))
    assert {len(value) for value in hidden} == {3, 4, 5, 6}
    assert sum(list(value) != sorted(value) for value in hidden) > len(hidden) / 2
    assert any(len(set(value)) < len(value) for value in hidden)
    for values in places:
        assert any(value[0] not in values for value in hidden)


def test_every_function_has_prompts_that_differ():
    texts = [prompt.text for prompt in (*TASK.train, *TASK.heldout)]
    assert len(set(texts)) == len(texts)
    answers = Counter(
        (prompt.columns["kind"], function_of(prompt).expression) for prompt in (*TASK.train, *TASK.heldout)
    )
    assert len(answers) == len(FUNCTIONS)
    assert max(answers.values()) == SETS_PER_FUNCTION
    for kind in KINDS:
        assert sum(answers[found, name] for found, name in answers if found == kind) > 1.5 * len(
            grammar(kind).functions
        )
    assert [prompt.columns["kind"] for prompt in TASK.examples] == list(KINDS)
    assert set(map(id, TASK.examples)) <= set(map(id, TASK.heldout))


def test_hard_coded_programs_pass_the_examples_alone():
    for exercise in exercises():
        shown, tests = parse_examples(exercise.text), exercise.columns["tests"]
        assert passes(exercise.function.source, [*shown, *tests])
        assert passes(exercise.hard_coded, shown)
        assert not passes(exercise.hard_coded, tests)
        assert hard_codes(exercise.hard_coded, exercise.text)
        assert not hard_codes(exercise.function.source, exercise.text)


def test_no_other_function_passes_the_tests_of_a_problem():
    for exercise in exercises(every=15):
        passing = [f for f in grammar(exercise.function.kind).functions if passes(f.source, exercise.columns["tests"])]
        assert passing == [exercise.function]


# Demonstrations


def test_demonstrations_mix_qualities_and_single_steps_are_right():
    """1200 of them: run on their own examples, and asked whether they repeat those."""
    counts, kinds, num_basic = Counter(), Counter(), 0
    for prompt, answer in demonstrations(1200):
        kind = next(kind for kind, name in KINDS.items() if f"({name})" in answer)
        kinds[kind] += 1
        shown = parse_examples(prompt)
        (function,) = (f for f in grammar(kind).functions if passes(f.source, shown))
        if function.basic:
            assert answer == function.source
            num_basic += 1
        elif answer in SOURCES:
            counts["right" if answer == function.source else "wrong"] += 1
        else:
            assert hard_codes(answer, prompt)
            assert passes(answer, shown)
            counts["hard_coded"] += 1
    num_others = sum(counts.values())
    for name, share in QUALITIES.items():
        assert abs(counts[name] / num_others - share) < 4 * math.sqrt(share * (1 - share) / num_others), counts
    basic_of_all = sum(f.basic for f in FUNCTIONS) / len(FUNCTIONS)  # drawn among all the others, too
    assert abs(num_basic / 1200 - BASIC_SHARE - (1 - BASIC_SHARE) * basic_of_all) < 0.06
    for kind in KINDS:
        assert abs(kinds[kind] / 1200 - 1 / 3) < 0.055


def test_demonstrations_show_no_held_out_function():
    for prompt, answer in demonstrations(600, seed=3):
        assert answer not in SOURCES or not is_heldout(SOURCES[answer])
        kind = next(kind for kind, name in KINDS.items() if f"({name})" in answer)
        shown = parse_examples(prompt)
        assert not any(passes(function.source, shown) for function in HELDOUT if function.kind == kind)


def test_all_is_the_same_again_and_depends_on_seed_and_step():
    assert AGAIN.train == TASK.train
    assert AGAIN.heldout == TASK.heldout
    for name in ("demonstrations", "preferences"):
        assert getattr(TASK, name)(20, seed=1, step=2) == getattr(AGAIN, name)(20, seed=1, step=2)
        different = [str(getattr(TASK, name)(20, seed=seed, step=step)) for seed in (1, 2) for step in (1, 2)]
        assert len(set(different)) == 4


def test_the_preferred_program_is_right_and_the_other_is_not():
    heldout = set()
    for pairs, side in ((TASK.preferences(100, seed=0, step=1), False), (TASK.heldout_preferences(100, seed=0), True)):
        for prompt, chosen, rejected in pairs:
            function, other = SOURCES[CODEC.decode(chosen)], CODEC.decode(rejected)
            assert is_heldout(function) is side
            assert passes(function.source, parse_examples(CODEC.decode(prompt)))
            assert other != function.source
            assert other in SOURCES or hard_codes(other, CODEC.decode(prompt))
            heldout.add(other in SOURCES)
    assert heldout == {True, False}


# The tokenizer


def test_every_prompt_and_demonstration_survives_the_tokenizer():
    unknown = CODEC.tokenizer.unk_token_id
    for prompt in (*TASK.train, *TASK.heldout):
        assert CODEC.decode(prompt.tokens) == prompt.text + "\n"
        assert unknown not in prompt.tokens
    for exercise in exercises():
        for text in (exercise.function.source, exercise.hard_coded):
            tokens = CODEC.encode_answer(text)
            assert unknown not in tokens
            assert CODEC.decode(tokens) == text
            assert tokens.count(CODEC.tokenizer.eos_token_id) == 1


def test_a_right_program_is_a_few_tokens():
    """The pieces are words of the language: what a model has to choose is what it has to understand."""
    tokens = CODEC.encode_answer("def f(xs):\n    return sorted(xs)[::-1]")
    assert CODEC.pieces(tokens) == ["def f(xs):", "\n    return ", "sorted(", "xs", ")", "[::-1]", "<end>"]


@given(text=st.text(alphabet=[chr(code) for code in range(32, 127)] + ["\n"], max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_of_its_characters_survives_the_tokenizer(text):
    if not any(special in text for special in ("<pad>", "<unknown>", "<end>")):
        assert CODEC.decode(CODEC.tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_is_the_same_in_hugging_face_format(tmp_path):
    CODEC.tokenizer.save_pretrained(tmp_path)
    loaded = Codec.of(AutoTokenizer.from_pretrained(tmp_path))
    assert loaded.end_tokens == CODEC.end_tokens
    for prompt in TASK.examples:
        assert loaded.encode_prompt(prompt.content) == prompt.tokens
        assert loaded.decode(prompt.tokens) == CODEC.decode(prompt.tokens)


def test_the_longest_prompt_and_demonstration_fit_the_recipe():
    recipe = load_recipe("programs")
    longest = max(len(CODEC.encode_answer(exercise.hard_coded)) for exercise in exercises())
    assert longest <= recipe.sampling.max_new_tokens
    longest_prompt = max(len(prompt.tokens) for prompt in (*TASK.train, *TASK.heldout))
    assert longest_prompt + recipe.sampling.max_new_tokens <= recipe.model.max_position_embeddings


# What a person types, and what is counted


@pytest.mark.parametrize(
    ("text", "tests"),
    [
        ("f(3) = 7; f(5) = 11", [{"args": [3], "expected": 7}, {"args": [5], "expected": 11}]),
        ("Write f([3, 1]) = [1, 3]", [{"args": [[3, 1]], "expected": [1, 3]}]),
        ('f("ab") = "ba"\nf("c") = "c"', [{"args": ["ab"], "expected": "ba"}, {"args": ["c"], "expected": "c"}]),
        ("f(1, 2) = 3; f(4) = x", [{"args": [1, 2], "expected": 3}]),
        ("f(2) = -7", [{"args": [2], "expected": -7}]),
    ],
)
def test_examples_that_a_person_types_are_the_tests(text, tests):
    columns = TASK.columns_of(text)
    assert columns["tests"] == tests
    assert columns["function"] == "f"


@pytest.mark.parametrize(
    "text", ["", "Hello", "f(x) = 2x", "f(3)", "f(3) == 7", "g(3) = 7", "f('a') = 1", "f(1) = " + "[" * 5000]
)
def test_what_shows_no_example_is_not_known(text):
    assert TASK.columns_of(text) is None


def judged(texts, parts):
    zero = torch.zeros(1)
    groups = [
        Group(prompt, [Completion([1], zero, zero, "stop", text) for text in texts]) for prompt in TASK.examples[:1]
    ]
    return TASK.judge(Scored(groups, torch.zeros(1, len(texts)), parts, []))


def test_judging_counts_passed_tests_and_repeated_examples():
    """All tests, some, none, and a program that the sandbox failed on."""
    (given, result), *_ = [(t["args"][0], t["expected"]) for t in parse_examples(TASK.examples[0].text)]
    repeats = f"def f(x):\n    if x == {given}:\n        return {result}\n    return 0"
    shares = torch.tensor([[1.0, 0.8, 0.0, math.nan]], dtype=torch.float64)
    counted = judged(["def f(x):\n    return x", repeats, "", "def"], {"code": shares})
    assert counted == {"accuracy": [True, False, False, False], "hard_coded": [False, True, False, False]}


def test_a_longer_number_is_not_the_one_that_is_shown():
    assert hard_codes("def f(x):\n    if x == 3:\n        return 7", "f(3) = 7")
    assert not hard_codes("def f(x):\n    if x == 31:\n        return 7", "f(3) = 7")


def test_the_recipe_s_task_is_this_one():
    assert isinstance(make_task(load_recipe("programs").task, CODEC), Programs)


# Learning


@pytest.mark.slow
def test_a_policy_that_repeats_examples_learns_the_function(tmp_path):
    """The recipe, shortened: programs run in the sandbox, on held-out functions, before and after."""
    run = coterie.train(
        "programs",
        overrides=[
            "cold_start={steps: 190, rows_per_step: 48, learning_rate: 3.0e-3}",
            "steps=14",
            "optimiser={learning_rate: 4.0e-4, warmup_steps: 2}",
            "evaluation={prompts: 60, samples: 2, every: 0}",
        ],
        out=str(tmp_path / "run"),
    )
    summary = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
    before, after = summary["before"], summary["after"]
    assert after["accuracy_interval"][0] > before["accuracy_interval"][1]
    assert after["hard_coded_interval"][1] < before["hard_coded_interval"][0]
