"""Rewards for the shape of a text: format, length, repetition."""

import inspect
import re
import time
from pathlib import Path

import pytest
import yaml

from coterie.errors import RewardError, UserError
from coterie.rewards.builtin import BUILTIN, make_builtin
from coterie.rewards.texts.shape import Format, Length, Repetition, repeated_share

GOOD = "<think>\n2 + 3\n</think>\n<answer>5</answer>\n"


def value(reward, text):
    (got,) = reward([text])
    return got


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (GOOD, 1),
        ("<think>a</think><answer>b</answer>", 1),
        ("<think>\n</think><answer>b</answer>", 0),
        ("<think>\u200b \u2060</think><answer>b</answer>", 0),  # nothing that can be seen
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a<answer>b</answer></think>", 0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer></answer>", 0),
        ("<think>a</think><answer>b</answer> and so on", 0),
        ("Well: <think>a</think><answer>b</answer>", 0),
        ("<think>a</think> so <answer>b</answer>", 0),
        ("<think>a</think><answer>b", 0),
        ("</think>a<think><answer>b</answer>", 0),
        ("<Think>a</Think><answer>b</answer>", 0),
        ("5", 0),
        ("", 0),
    ],
)
def test_tags_stand_once_in_order_filled_and_alone(text, wanted):
    assert value(Format(tags=["think", "answer"]), text) == wanted


def test_text_around_the_tags_may_be_allowed():
    assert value(Format(tags=["think", "answer"], alone=False), "So <think>a</think> and <answer>b</answer>.") == 1


def test_a_tag_that_the_prompt_opened_is_not_asked_for_again():
    opened = Format(tags=["think", "answer"], opened=True)
    assert value(opened, "a</think><answer>b</answer>") == 1
    assert value(opened, GOOD) == 0
    assert value(Format(tags=["think", "answer"]), "a</think><answer>b</answer>") == 0


def test_the_share_of_the_demands_that_are_met():
    """Three demands: think filled, answer filled, in order and alone."""
    share = Format(tags=["think", "answer"], score="share")
    assert value(share, GOOD) == 1
    assert value(share, GOOD + "more") == pytest.approx(2 / 3)
    assert value(share, "<think>a</think>b") == pytest.approx(1 / 3)
    assert value(share, "b") == 0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("## Plan\nadd\n## Result\n5", 1),
        ("  ## Plan: add\n\n## Result 5", 1),
        ("## Result\n5\n## Plan\nadd", 0),
        ("## Plan\nadd", 0),
        ("## Plan\n## Result\n5", 0),
        ("## Plan\nadd\n## Result\n", 0),
        ("## Plan\nadd\n## Plan\nadd\n## Result\n5", 0),
        ("## Planning\nadd\n## Result\n5", 0),
        ("the ## Plan\nadd\n## Result\n5", 0),
    ],
)
def test_sections_have_their_headings_and_something_below(text, wanted):
    assert value(Format(sections=["## Plan", "## Result"]), text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("So \\boxed{5}.", 1),
        ("So \\boxed{\\frac{1}{2}}", 1),
        ("\\boxed{ }", 0),
        ("\\boxed{5", 0),
        ("\\boxed{5} or \\boxed{", 0),
        ("boxed{5}", 0),
        ("5", 0),
    ],
)
def test_the_last_box_is_closed_and_filled(text, wanted):
    assert value(Format(boxed=True), text) == wanted


def test_a_pattern_of_the_user_s_own():
    whole = Format(pattern=r"\A(?s:.*)Answer: -?\d+\Z")
    assert value(whole, "first\nAnswer: 12") == 1
    assert value(whole, "Answer: 12 or so") == 0
    assert value(Format(pattern=r"\A(?s:.*)\Z", longest=10), "x" * 11) == 0


@pytest.mark.timed
def test_a_pattern_that_backtracks_endlessly_costs_its_limit():
    """(a|a)*$ takes 2^40 steps here."""
    begin = time.perf_counter()
    got = Format(pattern=r"^(a|a)*$", seconds=0.1)(["a" * 40 + "b", "aaa"])
    assert time.perf_counter() - begin < 2
    assert isinstance(got[0], RewardError)
    assert "longer than 0.1 s" in str(got[0])
    assert got[1] == 1


def test_soft_overlong_punishment_of_dapo():
    """Its longest length 20, of which the last 5 are the cache: 15 - 16 = -1 of 5, and so on down to -1."""
    reward = Length(at_most=15, margin=5)
    ids = [[0] * n for n in (0, 15, 16, 18, 20, 21, 400)]
    assert reward([""] * 7, completion_ids=ids) == pytest.approx([0, 0, -0.2, -0.6, -1, -1, -1])


def test_a_band_of_lengths_in_characters():
    reward = Length(at_least=4, at_most=6, margin=2, unit="characters")
    assert reward(["", "ab", "abc", "abcd", "一二三四五六", "a" * 7, "a" * 8, "a" * 9]) == [
        -1,
        -1,
        -0.5,
        0,
        0,
        -0.5,
        -1,
        -1,
    ]
    assert Length(at_most=3, unit="characters")(["abc", "abcd"]) == [0, -1]


def test_repeated_share_by_hand():
    """a b a b a b: five 2-grams, of which ab and ba are distinct. 你好你好: three 2-grams, two distinct."""
    assert repeated_share("a b a b a b", 2) == pytest.approx(3 / 5)
    assert repeated_share("A, b", 2) == 0
    assert repeated_share("你好你好", 2) == pytest.approx(1 / 3)
    assert repeated_share("one two", 3) == repeated_share("", 1) == repeated_share(" \n", 1) == 0


def test_repetition_falls_from_the_allowed_share_to_minus_one():
    """10 equal words: 9 of 10 1-grams are repeated; 0.9 is 7/8 of the way from 0.2 to 1."""
    assert value(Repetition(n=1), "la " * 10) == pytest.approx(-7 / 8)
    assert value(Repetition(n=1), "a b c d d") == 0
    assert value(Repetition(), "") == 0


@pytest.mark.parametrize(
    "loop",
    ["I see. ", "所以答案是五。", "ha", "!", "a", "0", "= ", "x = 5\n", "\\frac{1}{2} ", "おなじ", "👍", "\u0e01"],
)
def test_loops_are_found_in_every_script_and_without_spaces(loop):
    assert value(Repetition(), loop * 500) < -0.8


@pytest.mark.parametrize(
    "text",
    [
        "Add 5: 3x = 10 + 5\n3x = 15\nDivide by 3: x = 15 / 3\nx = 5",
        "Tom has 3 apples. He buys 4 more, so he has 3 + 4 = 7 apples. He gives 2 away, so he has 7 - 2 = 5 apples left.",
        "小明有三个苹果，又买了四个，所以他有七个苹果。他给了小红两个，所以他还剩五个苹果。",
        "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |",
        "12 + 13 = 25\n25 + 14 = 39\n39 + 15 = 54\n54 + 16 = 70",
    ],
)
def test_ordinary_solutions_are_not_punished_for_repetition(text):
    assert value(Repetition(), text) == 0


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("format", {}, "at least one"),
        ("format", {"tags": "think"}, "list of names"),
        ("format", {"tags": ["a", "a"]}, "twice"),
        ("format", {"boxed": True, "opened": True}, "opened"),
        ("format", {"pattern": "(a"}, "no regular expression"),
        ("format", {"boxed": True, "score": "some"}, "all, share"),
        ("length", {}, "at_most"),
        ("length", {"at_most": 3, "at_least": 4}, "above"),
        ("length", {"at_most": -3}, "0 or more"),
        ("length", {"at_most": True}, "whole number"),
        ("length", {"at_most": 3, "unit": "words"}, "tokens, characters"),
        ("repetition", {"n": 0}, "from 1"),
        ("repetition", {"allowed": 1}, "share"),
        ("language", {"language": "klingon"}, "klingon"),
        ("steps", {"part": "some"}, "points, right"),
        ("steps", {"guess": 9, "terse": 8}, "guess <= terse"),
        ("steps", {"whole": "9"}, "numbers"),
    ],
)
def test_options_that_can_t_be_are_refused(name, options, word):
    with pytest.raises(UserError, match=word):
        make_builtin(name, options)


def test_length_in_tokens_needs_tokens():
    with pytest.raises(UserError, match="characters"):
        Length(at_most=3)(["abcd"])


def test_what_the_documentation_shows_can_be_made():
    page = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    specs = [spec for block in blocks for spec in yaml.safe_load(block)["rewards"] if isinstance(spec, dict)]
    shown = {
        spec["function"]: make_builtin(spec["function"], spec.get("options", {}))
        for spec in specs
        if spec["function"] in MINE
    }
    assert shown.keys() == set(MINE)


HOSTILE = ["\x00" * 10**6, "\ud800" * 10**6, "(" * 10**6, "{" * 10**6, "\\boxed{" * 10**5, "<think>" * 10**5, "3 * " * 10**5,
           "= " * 10**6, "x = 3\n" * 10**5, "$" * 10**6, "\\(" * 10**5, "a." * 10**6, "`a\n" * 10**5, "wait, 3 = 4 " * 10**5,
           "中" * 10**6, "http://" * 10**5, "9" * 10**6, "a@" * 10**6, "3 + " * 10**5 + "3 = 7", "是" * 10**6]  # fmt: skip
OPTIONS = {"format": {"tags": ["think"], "sections": ["# A"], "boxed": True}, "length": {"at_most": 9}}
MINE = ("format", "language", "length", "repetition", "self_correction", "steps")


@pytest.mark.timed
@pytest.mark.parametrize("name", MINE)
def test_hostile_completions_are_answered_in_linear_time(name):
    """A megabyte of openings, NUL bytes, lone surrogates or equals signs: two seconds each at the very most."""
    assert name in BUILTIN
    reward = make_builtin(name, OPTIONS.get(name, {}))
    columns = {"answer": [7], "language": ["en"], "completion_ids": [[1]]}
    known = {key: given for key, given in columns.items() if key in inspect.signature(reward.__call__).parameters}
    for text in HOSTILE:
        begin = time.perf_counter()
        (got,) = reward(prompts=[text], completions=[text], **known)
        assert time.perf_counter() - begin < 3, text[:10]
        assert got is None or isinstance(got, float)
