"""The equations task: disjoint halves, worked demonstrations, its tokenizer, and draws that can be resumed."""

import math
import string
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from coterie.models.codec import Codec
from coterie.rewards.maths.linear import all_steps, check, parse_equation
from coterie.tasks.draw import draw
from coterie.tasks.equation_rewards import right_answer, written_steps
from coterie.tasks.equations import (
    EXAMPLES,
    EXERCISES,
    HELDOUT_SHARE,
    ONE_STEP_SHARE,
    QUALITIES,
    Equations,
    is_heldout,
    make_tokenizer,
)
from coterie.types import Completion, Group, Scored

CODEC = Codec.of(make_tokenizer())
TASK = Equations(CODEC)
AGAIN = Equations(CODEC)  # as a resumed run makes it


def points(text, equation):
    (right,), (steps,) = right_answer([text], [equation]), written_steps([text], [equation])
    return round(6 * right + 3 * steps, 9)


def answers(demonstrations):
    return [CODEC.decode(answer) for _, answer in demonstrations]


def test_every_equation_has_the_solution_that_it_was_made_from():
    assert len(EXERCISES) == len({exercise.equation for exercise in EXERCISES}) == 1241
    assert all(exercise.result >= 1 for exercise in EXERCISES)
    for exercise in EXERCISES:
        assert parse_equation(exercise.equation).solution == exercise.solution


def test_train_and_heldout_share_no_equation_in_any_language():
    train, heldout = ({prompt.columns["equation"] for prompt in prompts} for prompts in (TASK.train, TASK.heldout))
    assert not train & heldout
    assert train | heldout == {exercise.equation for exercise in EXERCISES}
    assert not {prompt.text for prompt in TASK.train} & {prompt.text for prompt in TASK.heldout}


def test_every_equation_stands_in_both_languages_on_its_side():
    for prompts in (TASK.train, TASK.heldout):
        languages = Counter((prompt.columns["equation"], prompt.columns["language"]) for prompt in prompts)
        assert set(languages.values()) == {1}
        assert len(languages) == 2 * len({equation for equation, _ in languages})


def test_the_tokenizer_knows_ascii_that_can_be_printed_alone():
    known = make_tokenizer().get_vocab()
    assert {chr(code) for code in range(128) if chr(code) in known} == {"\n", *string.printable[:95]}


@pytest.mark.parametrize("equation", ["2x + 3 = 7", "3x - 5 = 10"])
def test_the_documented_examples_are_held_out(equation):
    assert equation in EXAMPLES
    assert equation not in {prompt.columns["equation"] for prompt in TASK.train}
    texts = {prompt.text for prompt in TASK.heldout}
    assert {f"Solve {equation}", f"解方程 {equation}"} <= texts


def test_about_the_named_share_is_held_out():
    """Of n exercises the share p, give or take three standard deviations, and the two documented examples."""
    n, p = len(EXERCISES), HELDOUT_SHARE
    assert 0 < p < 0.5
    assert abs(sum(map(is_heldout, EXERCISES)) - n * p) < 3 * math.sqrt(n * p * (1 - p)) + len(EXAMPLES)


def test_the_examples_are_the_documented_ones_in_both_languages():
    assert [prompt.text for prompt in TASK.examples] == ["Solve 3x - 5 = 10", "解方程 3x - 5 = 10"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_demonstrations_of_each_quality_get_its_points(language):
    """Every exercise: a right guess 6, a wrong one 0, terse 8, complete 9."""
    for exercise in EXERCISES:
        texts = {quality: exercise.solution_text(language, quality, exercise.solution) for quality in QUALITIES}
        got = {quality: points(text, exercise.equation) for quality, text in texts.items()}
        assert got == {"guess": 6, "terse": 8, "complete": 9}, texts
        assert points(exercise.solution_text(language, "guess", exercise.solution + 1), exercise.equation) == 0


def test_a_demonstration_reads_as_documented():
    exercise = next(exercise for exercise in EXERCISES if exercise.equation == "3x - 5 = 10")
    assert exercise.solution_text("en", "complete", 0) == "Add 5: 3x = 10 + 5\n3x = 15\nDivide by 3: x = 15 / 3\nx = 5"
    assert exercise.solution_text("zh", "complete", 0) == "加 5：3x = 10 + 5\n3x = 15\n除以 3：x = 15 / 3\nx = 5"


def test_demonstrations_mix_qualities_and_most_guesses_are_wrong():
    """2000 demonstrations come in the shares that are named; guesses are right by luck, one in nine."""
    equation_of = {tuple(prompt.tokens): prompt.columns["equation"] for prompt in TASK.train}
    counts = Counter()
    for tokens, answer in TASK.demonstrations(2000, seed=0, step=1):
        equation = equation_of.get(tuple(tokens))
        if equation is None:
            equation = CODEC.decode(tokens).removeprefix("Solve").removeprefix("解方程").strip()
            assert equation.startswith("x ")
            assert all_steps(check(equation, CODEC.decode(answer)))
            counts["one step"] += 1
        else:
            counts[points(CODEC.decode(answer), equation)] += 1
    rest = 1 - ONE_STEP_SHARE
    right = rest * QUALITIES["guess"] / 9
    shares = {
        "one step": ONE_STEP_SHARE,
        0: rest * QUALITIES["guess"] - right,
        6: right,
        8: rest * QUALITIES["terse"],
        9: rest * QUALITIES["complete"],
    }
    assert set(counts) == set(shares)
    assert counts[0] > counts[6]
    for mark, share in shares.items():
        assert abs(counts[mark] / 2000 - share) < 4 * math.sqrt(share * (1 - share) / 2000)


def test_demonstrations_show_no_held_out_equation():
    heldout = {tuple(prompt.tokens) for prompt in TASK.heldout}
    for tokens, answer in TASK.demonstrations(500, seed=3, step=2):
        assert tuple(tokens) not in heldout
        assert answer[-1] == CODEC.tokenizer.eos_token_id
        text = CODEC.decode(answer)
        if ":" in text or "：" in text:
            assert ("：" in text) == CODEC.decode(tokens).startswith("解方程")


def test_demonstrations_depend_on_seed_and_step_only():
    assert TASK.demonstrations(20, seed=1, step=2) == AGAIN.demonstrations(20, seed=1, step=2)
    different = {tuple(answers(TASK.demonstrations(20, seed=seed, step=step))) for seed in (1, 2) for step in (1, 2)}
    assert len(different) == 4


# The tokenizer


def test_every_prompt_and_demonstration_survives_the_tokenizer():
    unknown = CODEC.tokenizer.unk_token_id
    for prompt in (*TASK.train, *TASK.heldout):
        assert CODEC.decode(prompt.tokens) == prompt.text + "\n"
        assert unknown not in prompt.tokens
    for exercise in EXERCISES[::7]:
        for language in ("en", "zh"):
            for quality in QUALITIES:
                text = exercise.solution_text(language, quality, 4)
                tokens = CODEC.encode_answer(text)
                assert unknown not in tokens
                assert CODEC.decode(tokens) == text
                assert tokens.count(CODEC.tokenizer.eos_token_id) == 1


@given(
    text=st.text(alphabet=[chr(code) for code in range(32, 127)] + list("\n：。，答案所以解方程加减除"), max_size=60)
)
@settings(max_examples=200, deadline=None)
def test_any_text_of_its_characters_survives_the_tokenizer(text):
    if not any(special in text for special in ("<pad>", "<unknown>", "<end>")):
        assert CODEC.decode(CODEC.tokenizer(text)["input_ids"]) == text


@given(text=st.text(max_size=40))
@settings(max_examples=50, deadline=None)
def test_any_other_text_has_a_token_too(text):
    assert all(0 <= token < len(CODEC.tokenizer) for token in CODEC.tokenizer(text)["input_ids"])


def test_pieces_put_together_are_the_text():
    tokens = CODEC.encode_answer("Divide by 3: x = 15 / 3\nx = 5")
    assert "".join(CODEC.pieces(tokens)) == "Divide by 3: x = 15 / 3\nx = 5<end>"


def test_the_chat_template_writes_the_prompt_as_training_does():
    """One line for the user, the answer and the end token after it."""
    user = {"role": "user", "content": "Solve 2x + 3 = 7"}
    template = CODEC.tokenizer.apply_chat_template
    assert template([user], tokenize=False, add_generation_prompt=True) == "Solve 2x + 3 = 7\n"
    both = template([user, {"role": "assistant", "content": "x = 2"}], tokenize=True, return_dict=False)
    assert both[:-1] == CODEC.encode_prompt([user]) + CODEC.encode_answer("x = 2")
    content, tokens = CODEC.encode_user("Solve 2x + 3 = 7")
    assert content == [user]
    assert tokens == CODEC.encode_prompt([user]) == CODEC.tokenizer("Solve 2x + 3 = 7\n")["input_ids"]


def test_the_tokenizer_is_the_same_in_hugging_face_format(tmp_path):
    CODEC.tokenizer.save_pretrained(tmp_path)
    loaded = Codec.of(AutoTokenizer.from_pretrained(tmp_path))
    assert loaded.end_tokens == CODEC.end_tokens
    for prompt in TASK.examples:
        assert loaded.encode_prompt(prompt.content) == prompt.tokens
        assert loaded.decode(prompt.tokens) == CODEC.decode(prompt.tokens)
    text = "Add 5 : x =5,  - 3 .\n加 5：x"
    assert loaded.decode(loaded.encode_answer(text)) == text


# Draws


def test_every_prompt_comes_once_an_epoch():
    """2 epochs in steps of 7 that do not divide the size: every prompt twice, once in each."""
    size, count = len(TASK.train), 7
    steps = math.ceil(2 * size / count)
    texts = [prompt.text for step in range(1, steps + 1) for prompt in draw(TASK, count, seed=0, step=step)]
    everything = {prompt.text for prompt in TASK.train}
    assert len(texts[:size]) == len(set(texts[:size])) == size
    assert set(texts[:size]) == set(texts[size : 2 * size]) == everything
    assert texts[:size] != texts[size : 2 * size]


def test_a_draw_depends_on_seed_and_step_and_no_earlier_draw():
    forwards = [draw(TASK, 5, seed=1, step=step) for step in (1, 2, 3)]
    backwards = [draw(AGAIN, 5, seed=1, step=step) for step in (3, 2, 1)]
    assert forwards == backwards[::-1]
    assert draw(TASK, 5, seed=2, step=1) != forwards[0]


@pytest.mark.parametrize("count", [1, 3, 100, 5000])
def test_the_prompts_of_a_step_have_keys_of_their_own(count):
    """Also where a step is longer than an epoch and draws a prompt twice."""
    for step in (1, 2):
        keys = [prompt.key for prompt in draw(TASK, count, seed=0, step=step)]
        assert len(set(keys)) == count


def test_however_a_batch_is_cut_the_order_of_prompts_is_the_same():
    whole = draw(TASK, 12, seed=0, step=1)
    assert [p for step in range(1, 5) for p in draw(TASK, 3, seed=0, step=step)] == whole


# What a person types, and what is counted


@pytest.mark.parametrize(
    ("text", "equation", "language"),
    [
        ("Solve 2x + 3 = 7", "2x + 3 = 7", "en"),
        ("解方程 3x - 5 = 10", "3x - 5 = 10", "zh"),
        ("Please solve -4x + 1 = 9", "-4x + 1 = 9", "en"),
        ("3x = 12", "3x = 12", "en"),
        ("Explain 2x + 3 = 7", "2x + 3 = 7", "en"),
    ],
)
def test_an_equation_that_a_person_types_is_known(text, equation, language):
    assert TASK.columns_of(text) == {"equation": equation, "language": language}


@pytest.mark.parametrize(
    "text", ["", "Hello", "Solve x = x", "Solve 0x = 3", "Solve y + 1 = 2", "a = b", "1 = 1", "x * x = 4"]
)
def test_what_is_no_equation_with_one_solution_is_not_known(text):
    assert TASK.columns_of(text) is None


def test_judging_counts_answers_and_steps_in_order():
    texts = ["x = 5", "3x = 10 + 5\n3x = 15\nx = 15 / 3\nx = 5", "x = 4"]
    zero = torch.zeros(1)
    completions = [Completion([1], zero, zero, "stop", text) for text in texts]
    groups = [Group(prompt, completions) for prompt in TASK.examples]
    judged = TASK.judge(Scored(groups, torch.zeros(2, 3), {}, []))
    assert judged == {"accuracy": [True, True, False] * 2, "all_steps": [False, True, False] * 2}
    assert check("3x - 5 = 10", texts[1]).complete
