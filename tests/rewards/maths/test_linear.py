"""Worked steps are checked, not only the answer: a guess gets 6 points, terse 8, complete 9, wrong 0."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.rewards.maths.linear import all_steps, check, parse_equation
from coterie.tasks.equation_rewards import right_answer, written_steps

EQUATION = "3x - 5 = 10"
COMPLETE = "Add 5: 3x = 10 + 5\n3x = 15\nDivide by 3: x = 15 / 3\nx = 5"


def points(text, equation=EQUATION) -> float:
    """As the bundled recipe weighs them."""
    (right,), (steps,) = right_answer([text], [equation]), written_steps([text], [equation])
    return round(6 * right + 3 * steps, 9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 5", 6),
        ("3x = 15\nx = 5", 8),
        ("x = 15 / 3\nx = 5", 8),
        ("3x = 10 + 5\nx = 5", 8),
        ("3x = 10 + 5\n3x = 15\nx = 5", 8),
        ("3x = 15\nx = 15 / 3\nx = 5", 8),
        (COMPLETE, 9),
        ("3x = 10 + 5\n3x = 15\nx = 15 / 3\nx = 5", 9),
        ("3x-5=10\n3x=10+5\n3x=15\nx=15/3\nx=5", 9),
        ("x = 4", 0),
        ("3x = 15\nx = 4", 0),
        ("", 0),
    ],
)
def test_points_of_guess_terse_complete_and_wrong(text, expected):
    assert points(text) == expected


def test_complete_beats_terse_beats_a_lucky_guess():
    assert points(COMPLETE) > points("3x = 15\nx = 5") > points("x = 5") > points("x = 6") == 0


@pytest.mark.parametrize(
    "text",
    [
        "加 5：3x = 10 + 5\n3x = 15\n除以 3：x = 15 / 3\nx = 5",
        "解：3x - 5 = 10。\n两边加 5：3x = 10 + 5。\n3x = 15。\n除以 3：x = 15 / 3。\n答案：x = 5。",
    ],
)
def test_a_chinese_solution_gets_the_same_points(text):
    assert points(text) == 9


@pytest.mark.parametrize("left_out", range(4))
def test_each_of_the_four_steps_is_needed(left_out):
    lines = COMPLETE.splitlines()
    del lines[left_out]
    assert points("\n".join(lines)) == (0 if left_out == 3 else 8)


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (2, 0, 1, 3), (0, 2, 1, 3)])
def test_steps_out_of_order_are_not_complete(order):
    lines = COMPLETE.splitlines()
    assert points("\n".join(lines[number] for number in order)) == 8


@pytest.mark.parametrize(
    "text",
    [
        "3x = 16\nx = 5",  # false
        "3x = 10 - 5\nx = 5",  # the wrong sign
        "3x = 5\nx = 5",
        "x = 15 / 5\nx = 5",
        "3x = 10 + 5\n3x = 14\nx = 15 / 3\nx = 5",
        "x = 4\nx = 5",  # an answer taken back
        "x = x\nx = 5",  # true, and true of any x
        "0 = 0\nx = 5",
        "5 = 5\nx = 5",
        "3x = 15 because I say so\nx = 5",
        "I know the answer\nx = 5",
        "3x = 15 = 10 + 5\nx = 5",
        "3x + 15\nx = 5",
        "y = 5\nx = 5",
        "= 5\nx = 5",
        "x =\nx = 5",
        "x = 5 / 0\nx = 5",
        "3x = 1５\nx = 5",  # a full-width digit
    ],
)
def test_a_line_that_does_not_follow_leaves_the_answer_s_points(text):
    assert points(text) == 6
    assert not check(EQUATION, text).follows


@pytest.mark.parametrize(
    "text",
    [
        "x = 5\nx = 5\nx = 5",
        "x = 5 / 1\nx = 5",
        "x = 5 * 1\nx = 5",
        "x = 5 + 0\nx = 5",
        "x = 10 - 5\nx = 5",
        "x = 10 / 2\nx = 5",
        "x = 5 + 0 / 3\nx = 5",  # a division by the factor, of nothing
        "5 = x\nx = 5",
        "x - 5 = 0\nx = 5",
        "3x - 5 = 10\nx = 5",
        "3x - 5 = 10\n3x - 5 = 10\nx = 5",
        "10 = 3x - 5\nx = 5",
        "-5 + 3x = 10\nx = 5",
        "3x - 5 - 10 = 0\nx = 5",
        "Step one: x = 5\nStep two: x = 5\nx = 5",
    ],
)
def test_padding_that_gets_nowhere_is_worth_nothing(text):
    """Repeating the answer or the problem, and arithmetic with nothing in it."""
    assert points(text) == 6


@pytest.mark.parametrize(
    "text",
    [
        "3x = 15 + 0\n3x = 15\nx = 15 / 3\nx = 5",
        "3x = 15 * 1\n3x = 15\nx = 15 / 3\nx = 5",
        "3x = 15 / 1\n3x = 15\nx = 15 / 3\nx = 5",
        "3x = 15\n3x = 15\nx = 15 / 3\nx = 5",
        "3x = 10 + 5\n3x = 15\nx = 5 / 1\nx = 5",
        "3x = 10 + 5\n3x = 15\nx = 5 + 0 / 3\nx = 5",
    ],
)
def test_padding_does_not_stand_in_for_a_missing_step(text):
    assert points(text) < 9


def test_a_step_counts_once_however_often_it_is_written():
    assert check(EQUATION, "3x = 15\nx = 5").num_steps == check(EQUATION, "3x = 15\n3x = 15\nx = 5").num_steps == 1


@pytest.mark.parametrize(
    "text",
    [
        "x = 5\nx = 4",
        "x = 5\n3x = 15",
        "x = 10 / 2",
        "3x = 15",
        "5",
        "x = 5!",
        "x = 5\nDone",
        "x = 5 6",
        "x = 1 / 0",
        "x: 5",
    ],
)
def test_the_answer_is_the_last_line_and_is_a_number(text):
    assert right_answer([text], [EQUATION]) == [0.0]


@pytest.mark.parametrize(
    "text", ["x = 5", "x=5", "  x  =  5  ", "x = 5.", "x = 5。", "Answer: x = 5", "答案：x = 5", "\n\nx = 5\n\n"]
)
def test_the_answer_is_equal_in_value_not_in_spelling(text):
    assert points(text) == 6


@pytest.mark.parametrize(
    ("equation", "solution"),
    [
        ("2x + 3 = 7", "2x = 7 - 3\n2x = 4\nx = 4 / 2\nx = 2"),
        ("5x = 35", "x = 35 / 5\nx = 7"),
        ("x + 3 = 8", "x = 8 - 3\nx = 5"),
        ("2x + 9 = 3", "2x = 3 - 9\n2x = -6\nx = -6 / 2\nx = -3"),
        ("-3x + 1 = 10", "-3x = 10 - 1\n-3x = 9\nx = 9 / -3\nx = -3"),
        ("5x - 3 = 2x + 9", "5x - 2x = 9 + 3\n3x = 12\nx = 12 / 3\nx = 4"),
        ("3 + 4x = 11", "4x = 11 - 3\n4x = 8\nx = 8 / 4\nx = 2"),
        ("10 = 3x - 5", "3x = 10 + 5\n3x = 15\nx = 15 / 3\nx = 5"),  # the unknown on the right
        ("3 * x = 15", "x = 15 / 3\nx = 5"),
    ],
)
def test_equations_of_other_shapes(equation, solution):
    report = check(equation, solution)
    assert report.right
    assert report.follows
    assert all_steps(report)
    assert points(solution, equation) == 9


def test_a_solution_that_is_a_fraction_can_be_answered():
    """In one of the two spellings of a number that is not whole, at least."""
    assert 1.0 in right_answer(["x = 5 / 2", "x = 2.5"], ["2x + 3 = 8"] * 2)


@pytest.mark.parametrize("text", ["x = 5 / 1\nx = 5", "x = 5 + 0\nx = 5", "x = 5 * 1\nx = 5"])
def test_padding_is_worth_nothing_where_the_factor_is_one(text):
    assert points(text, "x + 3 = 8") == 6


@pytest.mark.parametrize("copy", ["5x = 35", "5 x = 35", "5x = 35.", "x * 5 = 35"])
def test_copying_a_problem_that_is_already_isolated_is_no_step(copy):
    assert points(f"{copy}\nx = 7", "5x = 35") == 6


@pytest.mark.parametrize("equation", ["3 = 3", "x = x + 1", "2x = 2x"])
def test_an_equation_without_one_solution_has_no_right_answer(equation):
    for text in ("x = 0", "x = 3", "3 = 3", "x = x"):
        assert right_answer([text], [equation]) == [0.0]


def test_each_completion_is_checked_against_its_own_equation():
    texts, equations = ["x = 5", "x = 2", "x = 5"], [EQUATION, "2x + 3 = 7", "2x + 3 = 7"]
    assert right_answer(completions=texts, equation=equations, language=["en"] * 3) == [1.0, 1.0, 0.0]


def test_a_completion_may_be_a_chat_message():
    assert points([{"role": "assistant", "content": COMPLETE}]) == 9


@pytest.mark.parametrize(
    ("text", "sides"),
    [
        ("3x - 5 = 10", ((3, -5), (0, 10))),
        ("x = 15 / 3", ((1, 0), (0, 5))),
        ("2x + 3x - 1 + 4 = 2 * 3 - x", ((5, 3), (-1, 6))),
        ("x / 4 = 6 / 8", ((0.25, 0), (0, 0.75))),
        ("-x = -7", ((-1, 0), (0, -7))),
    ],
)
def test_equations_are_read_in_exact_fractions(text, sides):
    equation = parse_equation(text)
    assert tuple((side.slope, side.constant) for side in (equation.left, equation.right)) == sides


@pytest.mark.parametrize(
    "text",
    ["", "=", "x", "x = ", "= 3", "x == 3", "x = 3 = 3", "x * x = 4",
     "3 / x = 1", "x2 = 4", "2 3 = x", "x = 1e3", "x = 3 +",
     "x = * 3", "x = 3 / 0", "x = ٣", "x = 1" + "0" * 30, "x = __import__('os')", "x = 3; y",
     "x = (3)", "x = nan", "\x00=\x00"],
)  # fmt: skip
def test_what_is_no_linear_equation_is_not_read(text):
    assert parse_equation(text) is None


@given(text=st.text(alphabet="0123456789x+-*/=: ：\n.abc解。", max_size=80))
@settings(max_examples=300, deadline=None)
def test_any_text_is_judged_without_an_error(text):
    report = check(EQUATION, text)
    assert report.num_steps >= 0
    assert not report.complete or report.num_steps


@given(text=st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_unicode_is_judged_without_an_error(text):
    assert points(text) == 0 or "5" in text


@given(factor=st.integers(2, 99), offset=st.integers(-99, 99).filter(bool), solution=st.integers(-99, 99))
@settings(max_examples=150, deadline=None)
def test_guess_terse_and_complete_for_any_whole_numbers(factor, offset, solution):
    sign, undo = ("+", "-") if offset > 0 else ("-", "+")
    product = factor * solution
    equation = f"{factor}x {sign} {abs(offset)} = {product + offset}"
    lines = [f"{factor}x = {product + offset} {undo} {abs(offset)}", f"{factor}x = {product}"]
    lines += [f"x = {product} / {factor}", f"x = {solution}"]
    assert points(lines[3], equation) == 6
    assert points("\n".join(lines[1::2]), equation) == 8
    assert points("\n".join(lines), equation) == 9
    assert points(f"x = {solution + 1}", equation) == 0


@pytest.mark.timed
@pytest.mark.parametrize(
    "text",
    [
        "x = 5\n" * 300_000,
        "9" * 1_000_000,
        "x = " + "1 + " * 500_000 + "1",
        "x = " + "1 / 999999999999 " * 100_000,
        "x = " + "999999999999 * " * 100_000 + "1",
        "5 *" + " " * 1_000_000 + "= 1",
        " " * 1_000_000 + "x = 5",
        "=" * 1_000_000,
        ":" * 1_000_000,
        "\n" * 1_000_000,
        "x" * 1_000_000,
        "\x00\ud800" * 100_000,
    ],
    ids=[
        "lines",
        "digits",
        "sums",
        "divisions",
        "products",
        "spaces",
        "indent",
        "equals",
        "colons",
        "breaks",
        "x",
        "junk",
    ],
)
def test_huge_and_hostile_completions_are_judged_at_once(text):
    start = time.perf_counter()
    for _ in range(5):
        check(EQUATION, text)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "text", ["x = 5" + "\n" * 5000 + "x = 6", "x = 5\n" * 333 + "\n\n\nx = 6"], ids=["empty", "repeated"]
)
def test_the_last_line_of_a_very_long_completion_is_what_answers(text):
    """A wrong answer after pages of right ones, or of nothing, is wrong."""
    assert right_answer([text], [EQUATION]) == [0.0]
